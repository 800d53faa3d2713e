"""From events to OpenAI's answers: whole ones, and chunks of a stream."""

import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kinkajou import __version__
from kinkajou.serve.backend import Alternative, Began, Broken, Event, Piece, Token
from kinkajou.serve.words import Watch, Words

LEAST_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot come; JSON has no infinity."""
FINGERPRINT = f"kinkajou-{__version__}"
DONE = b"data: [DONE]\n\n"
UNFINISHED = "the model stopped before its answer was finished"


@dataclass
class Answer:
    parts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    num_tokens: int = 0
    finish: str = ""

    @property
    def text(self) -> str:
        return "".join(self.parts)


@dataclass
class Answers:
    prompt_tokens: int
    choices: list[Answer]

    @property
    def usage(self) -> dict[str, int]:
        said = sum(answer.num_tokens for answer in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": said,
            "total_tokens": self.prompt_tokens + said,
        }

    def take(self, event: Event) -> None:
        if isinstance(event, Began):
            self.prompt_tokens = event.prompt_tokens
            return
        answer = self.choices[event.choice]
        if event.finish == "content_filter":
            answer.parts.clear()
        answer.parts.append(event.text)
        answer.tokens += event.tokens
        answer.num_tokens = event.num_tokens
        answer.finish = event.finish

    def count(self, event: Event) -> None:
        """As `take`, without keeping what was said."""
        if isinstance(event, Began):
            self.prompt_tokens = event.prompt_tokens
            return
        answer = self.choices[event.choice]
        answer.num_tokens, answer.finish = event.num_tokens, event.finish

    def check_finished(self) -> None:
        """Broken if a choice has no end."""
        if not all(answer.finish for answer in self.choices):
            raise Broken(UNFINISHED)


def blank(n: int) -> Answers:
    return Answers(0, [Answer() for _ in range(n)])


async def collected(events: AsyncIterator[Event], n: int) -> Answers:
    found = blank(n)
    async for event in events:
        found.take(event)
    found.check_finished()
    return found


async def clean(events: AsyncIterator[Event], n: int, words: Words | None) -> AsyncIterator[Event]:
    """The same events with nothing of a word in them; an answer that has one ends in the fixed sentence.

    Ends as soon as every choice has finished.
    """
    if words is None:
        async for event in events:
            yield event
        return
    watches = [Watch(words) for _ in range(n)]
    shown, finished = [False] * n, [False] * n
    async for event in events:
        if isinstance(event, Began):
            yield event
            continue
        i, watch = event.choice, watches[event.choice]
        if finished[i]:
            continue
        text = watch.feed(event.text) + (watch.finish() if event.finish else "")
        shown[i] = shown[i] or bool(text)
        finished[i] = watch.hit or bool(event.finish)
        if watch.hit:
            # A whole answer is the sentence alone: `Answers.take` drops what came before it.
            yield Piece(i, text, event.num_tokens)
            yield Piece(i, words.safe_answer, event.num_tokens, "content_filter")
        else:
            yield Piece(i, text, event.num_tokens, event.finish, event.tokens)
        if all(finished):
            return


# --- log-probabilities --------------------------------------------------------------------------------------


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) and logprob > LEAST_LOGPROB else LEAST_LOGPROB


def _alternative(found: Alternative) -> dict[str, Any]:
    return {"token": found.text, "logprob": finite(found.logprob), "bytes": list(found.bytes)}


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    content = [
        _alternative(token.said) | {"top_logprobs": list(map(_alternative, token.likeliest))} for token in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[Token], start: int = 0) -> tuple[dict[str, Any], int]:
    """The form of /v1/completions; `start` is the first token's place in the text, the second result the next one's."""
    offsets, place = [], start
    for token in tokens:
        offsets.append(place)
        place += len(token.said.text)
    found = {
        "tokens": [token.said.text for token in tokens],
        "token_logprobs": [finite(token.said.logprob) for token in tokens],
        "top_logprobs": [{other.text: finite(other.logprob) for other in token.likeliest} for token in tokens],
        "text_offset": offsets,
    }
    return found, place


# --- answers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What all chunks of one answer have in common."""

    model: str
    chat: bool
    logprobs: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(14))
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }


def whole_answer(head: Head, found: Answers) -> bytes:
    choices = []
    for i, answer in enumerate(found.choices):
        choice: dict[str, Any] = {"index": i, "finish_reason": answer.finish}
        if head.chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
            choice["logprobs"] = chat_logprobs(answer.tokens) if head.logprobs else None
        else:
            choice["text"] = answer.text
            choice["logprobs"] = text_logprobs(answer.tokens)[0] if head.logprobs else None
        choices.append(choice)
    return encoded(head.fields(chunk=False) | {"choices": choices, "usage": found.usage})


def encoded(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class Chunks:
    """The frames of one stream.  What does not change from token to token is written once."""

    def __init__(self, head: Head, n: int, *, usage: bool) -> None:
        self.head, self.usage = head, usage
        self.counted = blank(n)
        self.places = [0] * n
        self.opened = [False] * n
        fixed = encoded(head.fields(chunk=True))[:-1]
        self.begin = b"data: " + fixed + b',"choices":['
        self.end = b'],"usage":null}\n\n' if usage else b"]}\n\n"

    async def frames(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        async for event in events:
            self.counted.count(event)
            if isinstance(event, Piece):
                if frame := self.frame(event):
                    yield frame
            elif self.head.chat and not any(self.opened):
                yield self.roles()
        self.counted.check_finished()
        yield self.last()

    def roles(self) -> bytes:
        """The first chunk of every choice."""
        self.opened = [True] * len(self.opened)
        delta = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return b"".join(self.begin + b'{"index":' + str(i).encode() + delta + self.end for i in range(len(self.opened)))

    def frame(self, piece: Piece) -> bytes:
        """Nothing for a piece that says nothing."""
        frames = b""
        if piece.text or piece.tokens:
            frames = self.chunk(piece.choice, json.dumps(piece.text, ensure_ascii=False), piece.tokens)
        if piece.finish:
            frames += self.chunk(piece.choice, "", (), piece.finish)
        return frames

    def chunk(self, choice: int, text: str, tokens: Sequence[Token], finish: str = "") -> bytes:
        """`text` is already JSON; empty: none."""
        logprobs = self.logprobs(choice, tokens) if tokens and self.head.logprobs else "null"
        if self.head.chat:
            said = f'"delta":{{"content":{text}}}' if text else '"delta":{}'
        else:
            said = f'"text":{text or chr(34) * 2}'
        reason = f'"{finish}"' if finish else "null"
        body = f'{{"index":{choice},{said},"logprobs":{logprobs},"finish_reason":{reason}}}'
        return self.begin + body.encode() + self.end

    def logprobs(self, choice: int, tokens: Sequence[Token]) -> str:
        if self.head.chat:
            return json.dumps(chat_logprobs(tokens), ensure_ascii=False)
        found, self.places[choice] = text_logprobs(tokens, self.places[choice])
        return json.dumps(found, ensure_ascii=False)

    def last(self) -> bytes:
        if not self.usage:
            return DONE
        return self.begin + b'],"usage":' + encoded(self.counted.usage) + b"}\n\n" + DONE
