"""Messages to tokens and mask: the only place that renders templates.

An answer is tokenised apart from what stands before it, so a prompt has the same tokens in training as in
generation.  What a message says never becomes a control token: `<end>` typed by a user is five letters.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import TypeAlias, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from kinkajou.data.records import Message, Messages, Pair
from kinkajou.data.tokenizer import PAD
from kinkajou.errors import UserError

STANDINS = 0xF0000
"""First of the private-use characters that stand for control tokens inside messages while a template renders."""
TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Jinja's own, and those of the Python that a template calls."""
SHOWN = 12
"""Roles that a message about them lists."""
ROWS_AT_ONCE = 1000
"""Rows whose texts go through the tokenizer together."""
Piece: TypeAlias = tuple[int, str, bool]


@dataclass(frozen=True)
class Encoded:
    tokens: list[int]
    counts: list[bool]  # token i is said by the assistant (its end token included)


def encoded(parts: Iterable[tuple[list[int], bool]]) -> Encoded:
    tokens, counts = list[int](), list[bool]()
    for ids, said in parts:
        tokens += ids
        counts += [said] * len(ids)
    return Encoded(tokens, counts)


class ChatFormat:
    """A tokenizer and its template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.source = tokenizer, tokenizer.name_or_path or "this tokenizer"
        # Longest first, so that no control token is found inside another.
        self.controls = sorted(set(tokenizer.get_added_vocab()), key=len, reverse=True)
        self.standins = {word: chr(STANDINS + i) for i, word in enumerate(self.controls)}
        self.control_pattern = re.compile("|".join(map(re.escape, self.controls)))
        self.standin_pattern = re.compile(f"([{chr(STANDINS)}-{chr(STANDINS + len(self.controls))}])")
        self.boundary = chr(STANDINS + len(self.controls))
        self.openings = {word[:k] for word in self.controls for k in range(1, len(word))}
        self.longest = max(map(len, self.openings), default=0)
        self._render = lru_cache(maxsize=64)(self._rendered)  # the two answers of a pair share their prompt's turns
        self.end_word = self._end_word()
        vocabulary = tokenizer.get_vocab()
        if str(tokenizer.pad_token) == self.end_word:
            tokenizer.add_special_tokens({"pad_token": PAD})  # pad must never be a token that counts
            vocabulary = tokenizer.get_vocab()
        self.end_id, self.pad_id = vocabulary[self.end_word], vocabulary[str(tokenizer.pad_token)]
        self.end_ids = frozenset({self.end_id, vocabulary[str(tokenizer.eos_token)]})

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to where the assistant starts to speak."""
        return self.prompts([messages])[0]

    def whole_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's text in one piece: its tokens may join where an earlier answer begins or ends."""
        return list(chain.from_iterable(next(self._ids([[self.render(messages, to_answer=True)]]))))

    def prompts(self, chats: Iterable[Sequence[Message]]) -> list[list[int]]:
        """`prompt` of many, quicker than one by one."""
        return [list(chain.from_iterable(row)) for row in self._ids(map(self._prompt_pieces, chats))]

    def conversation(self, messages: Sequence[Message]) -> Encoded:
        """Tokens of a whole chat; the assistant's words and their end tokens count."""
        return self.conversations([messages])[0]

    def conversations(self, chats: Iterable[Sequence[Message]]) -> list[Encoded]:
        """`conversation` of many, quicker than one by one."""
        pieces = [self._text_pieces(chat[0]) if chat[0].role == "text" else list(self._pieces(chat)) for chat in chats]
        ids = self._ids([text for _, text, _ in row] for row in pieces)
        return [
            encoded((part, said) for part, (_, _, said) in zip(parts, row, strict=True))
            for parts, row in zip(ids, pieces, strict=True)
        ]

    def answered(self, prompt: Sequence[Message], answer: Sequence[Message]) -> tuple[list[int], Encoded]:
        """Tokens before the assistant takes the prompt up, and those from there on."""
        return self.all_answered([(prompt, answer)])[0]

    def all_answered(
        self, chats: Iterable[tuple[Sequence[Message], Sequence[Message]]]
    ) -> list[tuple[list[int], Encoded]]:
        """`answered` of many prompts with an answer, quicker than one by one."""
        split = []
        for prompt, answer in chats:
            row = list(self._pieces((*prompt, *answer)))
            split.append((row, next(k for k, (i, _, said) in enumerate(row) if said and i >= len(prompt))))
        ids = self._ids([text for _, text, _ in row] for row, _ in split)
        return [
            (
                list(chain.from_iterable(parts[:start])),
                encoded((part, said) for part, (_, _, said) in zip(parts[start:], row[start:], strict=True)),
            )
            for parts, (row, start) in zip(ids, split, strict=True)
        ]

    def pair(self, pair: Pair) -> tuple[list[int], list[int]]:
        """Tokens of the chosen and the rejected chat, up to the end token."""
        return self.pairs([pair])[0]

    def pairs(self, pairs: Iterable[Pair]) -> list[tuple[list[int], list[int]]]:
        """`pair` of many, quicker than one by one."""
        chats = ((*pair.prompt, *side) for pair in pairs for side in (pair.chosen, pair.rejected))
        rows = self.conversations(chats)
        return [(chosen.tokens, rejected.tokens) for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)]

    def answer(self, tokens: Sequence[int]) -> str:
        """What the assistant said, without control tokens and outer blanks."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    def render(self, messages: Sequence[Message], *, to_answer: bool) -> str:
        """The template's text; a control token that a message says is one private-use character in it.

        `to_answer`: up to where the assistant starts to speak.
        """
        return self._render(tuple(messages), to_answer)

    def _pieces(self, messages: Sequence[Message]) -> Iterator[Piece]:
        """Number of an assistant's message, text, and whether it is said there or stands before it."""
        done = ""
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self.render(messages[:i], to_answer=True)
            after = self.render(messages[: i + 1], to_answer=False)
            if not after.startswith(before) or not before.startswith(done):
                raise UserError(
                    f"the chat template of {self.source} rewrites earlier turns when an answer is added",
                    evidence=f"prompt ends in {before[-40:]!r}",
                    fix="use --template alpaca, human_assistant or plain",
                )
            end = after.rindex(self.end_word) + (len(self.end_word) if message.ended else 0)
            yield i, before[len(done) :], False
            yield i, after[len(before) : end], True
            done = after[:end]

    def _text_pieces(self, message: Message) -> list[Piece]:
        """Raw text, and the end token."""
        return [(0, self._shield(message.content), True), (0, self.end_word, True)]

    def _prompt_pieces(self, messages: Sequence[Message]) -> list[str]:
        """Earlier answers are tokenised apart here too, so that a later turn's prompt is what training saw."""
        whole = self.render(messages, to_answer=True)
        try:
            pieces = [text for _, text, _ in self._pieces(messages)]
        except UserError:  # a template that rewrites earlier turns can be answered, not trained on
            return [whole]
        before = "".join(pieces)
        return [*pieces, whole.removeprefix(before)] if whole.startswith(before) else [whole]

    def _rendered(self, messages: Messages, to_answer: bool) -> str:
        rows = [{"role": m.role, "content": self._shield(m.content)} for m in messages]
        return self._applied(rows, to_answer)

    def _applied(self, rows: list[dict[str, str]], to_answer: bool) -> str:
        roles = [row["role"] for row in rows]
        try:
            return str(self.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=to_answer))
        except TEMPLATE_FAULTS as fault:
            raise UserError(
                f"the chat template of {self.source} refuses these messages",
                evidence=f"roles {', '.join(roles[:SHOWN])}{', ...' * (len(roles) > SHOWN)}: {str(fault)[:200]}",
                fix="use --template alpaca, human_assistant or plain, or mend the records",
            ) from None

    def _shield(self, text: str) -> str:
        """A control word as its stand-in; after the beginning of one, a boundary that what follows cannot complete."""
        held = self.control_pattern.sub(lambda found: self.standins[found[0]], text)
        opens = any(held[-k:] in self.openings for k in range(1, self.longest + 1))
        return held + self.boundary if opens else held

    def _ids(self, rows: Iterable[Sequence[str]]) -> Iterator[list[list[int]]]:
        """Tokens of each piece of each row; every different piece of a batch goes through the tokenizer once."""
        rest = iter(rows)
        while batch := list(islice(rest, ROWS_AT_ONCE)):
            words = {text: self._words(text) for row in batch for text in row}
            different = list(dict.fromkeys(chain.from_iterable(words.values())))
            ids = dict(zip(different, self._encode(different), strict=True))
            tokens = {text: list(chain.from_iterable(map(ids.__getitem__, parts))) for text, parts in words.items()}
            yield from ([tokens[text] for text in row] for row in batch)

    def _words(self, text: str) -> list[str]:
        """The text in pieces that are encoded apart: a control word that was typed becomes two, neither of them one."""
        words: list[str] = []
        for piece in self.standin_pattern.split(text):
            index = ord(piece) - STANDINS if len(piece) == 1 else -1
            typed = 0 <= index < len(self.controls)
            words += (self.controls[index][:1], self.controls[index][1:]) if typed else (piece,)
        return [word for word in words if word not in ("", self.boundary)]

    def _encode(self, words: list[str]) -> list[list[int]]:
        if not words:
            return []
        found = self.tokenizer(
            words, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )
        return cast(list[list[int]], found.input_ids)

    def _end_word(self) -> str:
        """The control token that the template puts after an answer."""
        probe = [Message("user", "question"), Message("assistant", "answer")]
        rows = [{"role": m.role, "content": m.content} for m in probe]
        text = self._applied(rows, to_answer=False)
        found = self.control_pattern.search(text, max(0, text.rfind("answer")))
        if not found:
            raise UserError(
                f"the chat template of {self.source} puts no end token after an answer",
                evidence=f"it renders {text[-60:]!r}",
                fix="use --template alpaca, human_assistant or plain, or mend the template",
            )
        return found[0]
