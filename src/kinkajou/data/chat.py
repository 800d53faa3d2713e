"""Messages to tokens and mask: the only place that renders templates.

An answer is tokenised apart from what stands before it, so a prompt has the same tokens in training as in
generation.  What a message says never becomes a control token: `<end>` typed by a user is five letters.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kinkajou.data.sources import Message, Pair
from kinkajou.data.tokenizer import PAD
from kinkajou.errors import UserError

STANDINS = 0xF0000
"""First of the private-use characters that stand for control tokens inside messages while a template renders."""


@dataclass(frozen=True)
class Encoded:
    tokens: list[int]
    counts: list[bool]  # token i is said by the assistant (its end token included)


class ChatFormat:
    """A tokenizer and its template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Longest first, so that no control token is found inside another.
        self.controls = sorted(set(tokenizer.get_added_vocab()), key=len, reverse=True)
        self.standins = {word: chr(STANDINS + i) for i, word in enumerate(self.controls)}
        self.control_pattern = re.compile("|".join(map(re.escape, self.controls)))
        self.end_word = self._end_word()
        vocabulary = tokenizer.get_vocab()
        if str(tokenizer.pad_token) == self.end_word:
            tokenizer.add_special_tokens({"pad_token": PAD})  # pad must never be a token that counts
            vocabulary = tokenizer.get_vocab()
        self.end_id, self.pad_id = vocabulary[self.end_word], vocabulary[str(tokenizer.pad_token)]
        self.end_ids = frozenset({self.end_id, vocabulary[str(tokenizer.eos_token)]})

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to where the assistant starts to speak."""
        return self._tokens(self._render(messages, to_answer=True))

    def conversation(self, messages: Sequence[Message]) -> Encoded:
        """Tokens of a whole chat; the assistant's words and their end tokens count."""
        if messages[0].role == "text":
            tokens = [*self._tokens(self._shield(messages[0].content)), self.end_id]
            return Encoded(tokens, [True] * len(tokens))
        tokens, counts = list[int](), list[bool]()
        for _, text, said in self._pieces(messages):
            ids = self._tokens(text)
            tokens += ids
            counts += [said] * len(ids)
        return Encoded(tokens, counts)

    def answered(self, prompt: Sequence[Message], answer: Sequence[Message]) -> tuple[list[int], Encoded]:
        """Tokens before the assistant takes the prompt up, and those from there on."""
        lead, tokens, counts = list[int](), list[int](), list[bool]()
        for i, text, said in self._pieces((*prompt, *answer)):
            ids = self._tokens(text)
            if not counts and not (said and i >= len(prompt)):
                lead += ids
            else:
                tokens += ids
                counts += [said] * len(ids)
        return lead, Encoded(tokens, counts)

    def pair(self, pair: Pair) -> tuple[list[int], list[int]]:
        """Tokens of the chosen and the rejected chat, up to the end token."""
        chosen = self.conversation((*pair.prompt, *pair.chosen))
        rejected = self.conversation((*pair.prompt, *pair.rejected))
        return chosen.tokens, rejected.tokens

    def answer(self, tokens: Sequence[int]) -> str:
        """What the assistant said, without control tokens and outer blanks."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    def _pieces(self, messages: Sequence[Message]) -> Iterator[tuple[int, str, bool]]:
        """Number of an assistant's message, text, and whether it is said there or stands before it."""
        done = 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._render(messages[:i], to_answer=True)
            after = self._render(messages[: i + 1], to_answer=False)
            if not after.startswith(before) or len(before) < done:
                raise UserError(
                    "the chat template rewrites earlier turns when an answer is added",
                    evidence=f"prompt ends in {before[-40:]!r}",
                    fix="use --template alpaca, human_assistant or plain",
                )
            end = after.rindex(self.end_word) + (len(self.end_word) if message.ended else 0)
            yield i, before[done:], False
            yield i, after[len(before) : end], True
            done = end

    def _render(self, messages: Sequence[Message], *, to_answer: bool) -> str:
        rows = [{"role": m.role, "content": self._shield(m.content)} for m in messages]
        return str(self.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=to_answer))

    def _shield(self, text: str) -> str:
        return self.control_pattern.sub(lambda found: self.standins[found[0]], text)

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = []
        for piece in re.split(f"([{chr(STANDINS)}-{chr(STANDINS + len(self.controls))}])", text):
            index = ord(piece) - STANDINS if len(piece) == 1 else -1
            typed = 0 <= index < len(self.controls)
            # A control word that was typed is encoded in two pieces, neither of which is one.
            words = (self.controls[index][:1], self.controls[index][1:]) if typed else (piece,)
            for word in filter(None, words):
                tokens += self.tokenizer.encode(word, add_special_tokens=False)
        return tokens

    def _end_word(self) -> str:
        """The control token that the template puts after an answer."""
        probe = [Message("user", "question"), Message("assistant", "answer")]
        rows = [{"role": m.role, "content": m.content} for m in probe]
        text = str(self.tokenizer.apply_chat_template(rows, tokenize=False))
        found = self.control_pattern.search(text, text.rindex("answer"))
        if not found:
            raise UserError(
                "the chat template puts no end token after an answer",
                evidence=f"it renders {text[-60:]!r}",
                fix="use --template alpaca, human_assistant or plain, or mend the template",
            )
        return found[0]
