"""An answer's text while it comes: whole characters, nothing of a stop text, at a cost that does not grow with it."""

from collections.abc import Callable, Sequence

Decoder = Callable[[list[int]], str]
"""Tokens -> text, without control tokens."""
MARK = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or not yet one."""
WINDOW, KEPT, LONGEST = 16, 8, 64
"""Tokens that are decoded again with each new one: how many before the window moves, after it has, and at most."""


class Detokeniser:
    """Tokens one by one -> their text.

    A tokenizer's decoder may join neighbours (a blank before a word, bytes of one character), so each token is decoded
    with those before it; a window of them, for an answer decoded from its start each time costs the square of its
    length.  A replacement mark at the end is held back until it is known to stay.  Together the pieces are the
    decoded answer where its tokens are UTF-8.  Where not, marks may come in another number, and with decoders of
    SentencePiece's kind, which write bytes out of step as marks altogether, characters among them may differ too.
    """

    def __init__(self, decode: Decoder) -> None:
        self.decode = decode
        self.window: list[int] = []
        self.given = 0
        """Characters of the window's text that have been handed out."""

    def push(self, token: int) -> str:
        self.window.append(token)
        text = self.decode(self.window)
        sure = len(text.rstrip(MARK))
        if len(self.window) >= LONGEST:  # a long run of broken bytes
            sure = len(text)
        fresh = text[self.given : sure]
        self.given = max(self.given, sure)
        if len(self.window) >= WINDOW and len(self.window) % KEPT == 0:
            self._move(text)
        return fresh

    def finish(self) -> str:
        """What was held back."""
        text = self.decode(self.window)
        fresh, self.given = text[self.given :], len(text)
        return fresh

    def _move(self, text: str) -> None:
        """To a shorter window whose text ends alike and does not begin inside a character."""
        rest = text[self.given :]
        for start in range(len(self.window) - KEPT, len(self.window)):
            tail = self.decode(self.window[start:])
            if not tail.startswith(MARK) and len(tail) > len(rest) and text.endswith(tail[-1 - len(rest) :]):
                self.window, self.given = self.window[start:], len(tail) - len(rest)
                return
        if len(self.window) >= LONGEST:
            self.window = self.window[-KEPT:]
            self.given = len(self.decode(self.window))


class Stop:
    """Looks for one text in characters that come one by one (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self.fallback = [0] * len(text)
        """For each prefix, the longest shorter one that it ends with."""
        k = 0
        for i in range(1, len(text)):
            while k and text[i] != text[k]:
                k = self.fallback[k - 1]
            k += text[i] == text[k]
            self.fallback[i] = k

    def feed(self, letter: str) -> bool:
        """Whether the text is complete with this character; `matched` of its characters have come."""
        while self.matched and self.text[self.matched] != letter:
            self.matched = self.fallback[self.matched - 1]
        self.matched += self.text[self.matched] == letter
        return self.matched == len(self.text)


class Cut:
    """Text in pieces -> the part that may be shown.

    It ends before the first stop text that becomes complete (of several at once the longest), wherever the pieces
    are cut.  What may be the beginning of one is held back.  `trimmed`: outer blanks are left out.
    """

    def __init__(self, stops: Sequence[str] = (), *, trimmed: bool = True) -> None:
        self.stops, self.trimmed = [Stop(stop) for stop in stops if stop], trimmed
        self.begun, self.stopped = False, False
        self.held = ""
        self.seen = self.end = 0
        """Characters that have come, and how many of them may be shown once all is said."""

    def push(self, text: str) -> str:
        if self.stopped:
            return ""
        if self.trimmed and not self.begun:
            self.seen += len(text)
            text = text.lstrip()
            self.seen -= len(text)
            self.begun = bool(text)
        for i, letter in enumerate(text if self.stops else ""):
            if found := [len(stop.text) for stop in self.stops if stop.feed(letter)]:
                self.stopped = True
                self.held += text[: i + 1]
                self.held = self.held[: len(self.held) - max(found)]
                self.seen += i + 1
                blanks = len(self.held) - len(self.held.rstrip()) if self.trimmed else 0
                self.end = self.seen - max(found) - blanks
                return self._shown(len(self.held))
        self.held += text
        self.seen += len(text)
        self.end = self.seen
        return self._shown(len(self.held) - max((stop.matched for stop in self.stops), default=0))

    @property
    def shown(self) -> int:
        """Characters that have been given out, of those that may be shown."""
        return self.seen - len(self.held)

    def finish(self) -> str:
        """What was held back, once the last piece has come."""
        shown = self.held.rstrip() if self.trimmed else self.held
        self.held = ""
        return shown

    def _shown(self, sure: int) -> str:
        if self.trimmed:
            sure = len(self.held[:sure].rstrip())
        shown, self.held = self.held[:sure], self.held[sure:]
        return shown


class Answer:
    """Tokens of one answer -> its text as it may be shown."""

    def __init__(self, decode: Decoder, stops: Sequence[str] = (), *, trimmed: bool = True) -> None:
        self.tokens, self.cut = Detokeniser(decode), Cut(stops, trimmed=trimmed)

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come: nothing is shown any more."""
        return self.cut.stopped

    def push(self, token: int) -> str:
        shown = self.cut.push(self.tokens.push(token))
        return shown + self.cut.finish() if self.stopped else shown

    def finish(self) -> str:
        """The last of it, where no stop text came before the end."""
        return self.cut.push(self.tokens.finish()) + self.cut.finish()
