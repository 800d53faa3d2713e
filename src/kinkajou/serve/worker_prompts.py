"""A request's chat or text -> the tokens of its prompt, or why there are none; and what single tokens look like."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kinkajou.data.chat import ChatFormat
from kinkajou.data.fitting import fitting, since, starts_of, surely_longer
from kinkajou.data.records import Message
from kinkajou.errors import UserError
from kinkajou.serve.backend import Alternative, Job, Refused

SPARE = 8
"""A text of so many times the characters that fit as tokens of the longest kind is refused as it is: reading it would
take long, and a tokenizer that makes texts shorter does not do so by that much."""


@dataclass(frozen=True)
class Prompt:
    tokens: tuple[int, ...]
    room: int
    """Tokens that the answer may have."""
    dropped: int = 0
    """Turns that were left out."""


class Prompts:
    """What jobs ask is rendered and tokenised; answers have at most `longest` tokens, all together `context`."""

    def __init__(self, form: ChatFormat, *, context: int, longest: int) -> None:
        self.form, self.context, self.longest = form, context, longest
        begin = form.tokenizer.bos_token_id
        first = form.tokenizer("x").input_ids[:1]
        self.opening: list[int] = first if first == [begin] else []
        """What the tokenizer puts before every text."""
        widest = max(map(len, form.tokenizer.get_vocab()), default=1)
        self.letters = context * widest * (1 if form.tokenizer.backend_tokenizer.normalizer is None else SPARE)
        """Characters of the longest text that may fit."""

    def prompt(self, job: Job) -> Prompt:
        """Raises Refused for what has no prompt, or a longer one than there is room for."""
        asked = min(job.max_tokens or self.longest, self.longest)
        field = "messages" if job.text is None else "prompt"
        if not all(sound(text) for text in (job.text or "", *job.stops, *(turn.content for turn in job.turns))):
            raise Refused("the text has half of a surrogate pair in it, which is no character", param=field)
        messages = [Message(turn.role, turn.content) for turn in job.turns]
        if job.drop_oldest:
            messages = self._shortened(messages)
        if len(job.text or "") + letters_of(messages) > self.letters:
            raise Refused(
                f"the prompt cannot fit: more than {self.letters:,} characters for {self.context:,} tokens",
                param=field,
                code="context_length_exceeded",
            )
        tokens, dropped = self._tokens(job, messages, asked)
        dropped += len(job.turns) - len(messages)
        if not tokens:
            raise Refused("the prompt has no tokens", param=field)
        room = self.context - len(tokens)
        if room < 1:
            raise too_long(f"{len(tokens):,}", self.context, field)
        return Prompt(tuple(tokens), min(asked, room), dropped)

    def _shortened(self, messages: list[Message]) -> list[Message]:
        """Without the oldest that cannot fit, by their characters alone."""
        starts, kept = starts_of(messages), messages
        while starts and letters_of(kept) > self.letters:
            kept = since(messages, starts.pop(0))
        return kept

    def _tokens(self, job: Job, messages: list[Message], asked: int) -> tuple[list[int], int]:
        if job.text is not None:
            whole = self.form.conversation([Message("text", job.text)]).tokens
            return [*self.opening, *whole[:-1]], 0  # without the end token
        try:
            if job.drop_oldest:
                return fitting(self.form, messages, context=self.context, answer=asked)
            if surely_longer(self.form, messages, self.context):
                raise too_long(f"more than {self.context:,}", self.context)
            return self.form.prompt(messages), 0
        except UserError as fault:
            raise refusal(fault, "messages") from None


def too_long(tokens: str, context: int, field: str = "messages") -> Refused:
    problem = f"the prompt has {tokens} tokens; prompt and answer together have room for {context:,}"
    return Refused(problem, param=field, code="context_length_exceeded")


def refusal(fault: UserError, field: str) -> Refused:
    """What the template says of these messages, without where it lies."""
    return Refused(f"the model's chat template does not take these messages: {fault.evidence}", param=field)


def letters_of(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages)


def sound(text: str) -> bool:
    """Whether UTF-8 can write it."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text) if not text.isascii() else True


class Pieces:
    """Single tokens as text and as the bytes that they stand for, which may be part of a character."""

    def __init__(self, form: ChatFormat) -> None:
        self.tokenizer = form.tokenizer
        self.controls = frozenset(self.tokenizer.all_special_ids) | form.end_ids
        self.known: dict[int, tuple[str, bytes]] = {}

    def decode(self, tokens: list[int]) -> str:
        """Their text, control tokens left out; blanks are as the tokenizer has them."""
        return str(self.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True))

    def alternative(self, token: int, logprob: float) -> Alternative:
        if token not in self.known:
            raw = self._bytes(token)
            self.known[token] = (raw.decode(errors="replace"), raw)
        return Alternative(*self.known[token], logprob)

    def _bytes(self, token: int) -> bytes:
        piece = self.tokenizer.backend_tokenizer.id_to_token(token)
        if piece is None:  # rows of the model that the tokenizer has no word for
            return b""
        if token in self.tokenizer.added_tokens_decoder:
            return str(piece).encode()
        if self.byte_level:
            return b"".join(bytes([LETTERS[x]]) if x in LETTERS else x.encode() for x in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        before = self.decode([self.anchor])
        both = self.decode([self.anchor, token])
        return both.removeprefix(before).encode()

    @cached_property
    def byte_level(self) -> bool:
        """Whether the letters of its words stand for bytes."""
        return "ByteLevel" in str(self.tokenizer.backend_tokenizer.decoder)

    @cached_property
    def anchor(self) -> int:
        """A token that another one is decoded after, for some decoders take the blank from the first."""
        vocabulary: dict[str, Any] = self.tokenizer.get_vocab()
        plain = (i for word, i in vocabulary.items() if word.isalnum() and i not in self.controls)
        return int(next(plain, 0))


def letters() -> dict[str, int]:
    """The letter of each byte in GPT-2's vocabularies (Radford 2019): printable Latin-1 as it is, others from 256."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


LETTERS = letters()
