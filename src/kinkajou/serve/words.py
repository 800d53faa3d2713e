"""Words that must not be said: found in a text that comes in pieces, in time linear in its length.

A word counts where it stands by itself, in any case; in scripts that put no blanks between words, anywhere.
"""

import re
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from kinkajou.errors import UserError

MAX_FILE_BYTES, MAX_WORDS, MAX_WORD_CHARS = 1_000_000, 20_000, 200
NO_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Thai, Lao, Burmese, Khmer, kana, Han."""


class _Folds(dict[int, str]):
    """Character -> its form without case, if that is one character."""

    def __missing__(self, code: int) -> str:
        folded = chr(code).casefold()
        found = folded if len(folded) == 1 else chr(code)
        if len(self) < 0x10000:
            self[code] = found
        return found


FOLDS = _Folds()


def in_word(char: str) -> bool:
    """Whether it makes one word with a letter beside it."""
    return bool(char) and (char.isalnum() or char == "_") and not NO_BLANKS.match(char)


@dataclass
class _Node:
    depth: int
    following: "dict[str, _Node]" = field(default_factory=dict)
    back: "_Node | None" = None
    """The longest other beginning of a word that ends here."""
    ending: tuple[int, ...] = ()
    """Lengths of the words that end here."""


class Words:
    """An automaton over all words at once (Aho and Corasick 1975)."""

    def __init__(self, words: list[str], safe_answer: str) -> None:
        self.safe_answer = safe_answer
        self.root = _Node(0)
        for word in words:
            node = self.root
            for char in word.translate(FOLDS):
                node = node.following.setdefault(char, _Node(node.depth + 1))
            node.ending = (node.depth,)
        waiting = deque([self.root])
        while waiting:
            node = waiting.popleft()
            for char, child in node.following.items():
                child.back = self.step(node.back, char) if node.back else self.root
                child.ending += child.back.ending
                waiting.append(child)

    def step(self, node: _Node | None, char: str) -> _Node:
        while node is not None:
            if char in node.following:
                return node.following[char]
            node = node.back
        return self.root

    def found_in(self, text: str) -> bool:
        watch = Watch(self)
        watch.feed(text)
        watch.finish()
        return watch.hit


class Watch:
    """One text as it grows.  What could still become a word is held back."""

    def __init__(self, words: Words) -> None:
        self.words, self.node = words, words.root
        self.held, self.before = "", ""
        """Not yet given out; the last character that was."""
        self.hit = False
        self.undecided = False
        """A word stands at the end, if no letter follows."""

    def feed(self, text: str) -> str:
        """What may be shown of the text so far and was not yet; nothing after a hit."""
        if self.hit:
            return ""
        start, self.held = len(self.held), self.held + text
        for i, char in enumerate(text.translate(FOLDS), start):
            if self.undecided and not in_word(char):
                self.hit = True
                return self._rest("")
            self.node = self.words.step(self.node, char)
            self.undecided = False
            for length in self.node.ending:
                if in_word(self.held[i - length + 1]) and in_word(self._char(i - length)):
                    continue
                if not in_word(char):
                    self.hit = True
                    return self._rest("")
                self.undecided = True
        return self._rest(self.held[len(self.held) - self.node.depth :])

    def finish(self) -> str:
        """The rest, when no more will come."""
        self.hit = self.hit or self.undecided
        return self._rest("")

    def _char(self, i: int) -> str:
        return self.held[i] if i >= 0 else self.before

    def _rest(self, kept: str) -> str:
        shown = "" if self.hit else self.held[: len(self.held) - len(kept)]
        self.before, self.held = shown[-1:] or self.before, kept
        return shown


def read_words(path: str, safe_answer: str) -> Words:
    """The words of a file, one a line; empty lines are passed over.  UserError for what is no such file."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as fault:
        raise UserError(f"the word file {path} cannot be read", evidence=fault.strerror or str(fault)) from None
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"the word file {path} is longer than {MAX_FILE_BYTES:,} bytes")
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as fault:
        raise UserError(f"the word file {path} is not UTF-8", evidence=f"byte {fault.start}") from None
    words = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    for number, line in enumerate(lines, 1):
        if len(line.strip()) > MAX_WORD_CHARS:
            raise UserError(f"{path}:{number}: a word has more than {MAX_WORD_CHARS} characters")
    if not words:
        raise UserError(f"the word file {path} has no words", fix="one word a line, or leave --words out")
    if len(words) > MAX_WORDS:
        raise UserError(f"the word file {path} has more than {MAX_WORDS:,} words")
    return Words(words, safe_answer)
