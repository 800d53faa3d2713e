"""OpenAI's form as another server reads and writes it; nothing that comes from there is trusted to be as it should."""

import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, cast

import httpx

from kinkajou.data.records import shown
from kinkajou.data.strict_json import JSONFault, parse
from kinkajou.serve.backend import Alternative, Broken, Finish, Full, Job, Piece, Refused, Token, Turn
from kinkajou.serve.sse import BadStream

MAX_REPLY_BYTES, MAX_TOLD = 1_000_000, 300
FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "content_filter": "content_filter"}
REFUSES_KEY = (401, 403)
LONG = ("context", "too long", "maximum length", "max_model_len")


def body_of(job: Job, model: str) -> bytes:
    """What is at its usual value is left out: not every server knows every field."""
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if job.text is not None:
        body["prompt"] = job.text
    else:
        body["messages"] = [{"role": turn.role, "content": turn.content} for turn in job.turns]
    usual: dict[str, tuple[Any, Any]] = {
        "max_tokens": (job.max_tokens, None),
        "temperature": (job.temperature, None),
        "top_p": (job.top_p, 1.0),
        "top_k": (job.top_k, 0),
        "min_p": (job.min_p, 0.0),
        "repetition_penalty": (job.repetition_penalty, 1.0),
        "stop": (list(job.stops), []),
        "seed": (job.seed, None),
    }
    body |= {name: value for name, (value, plain) in usual.items() if value != plain}
    if job.logprobs is not None:
        body |= {"logprobs": job.logprobs} if job.text is not None else {"logprobs": True, "top_logprobs": job.logprobs}
    return json.dumps(body).encode()


async def bounded(reply: httpx.Response) -> bytes:
    """The whole body; BadStream where it is longer than a million bytes."""
    content = b""
    async for part in reply.aiter_bytes():
        content += part
        if len(content) > MAX_REPLY_BYTES:
            raise BadStream(f"a reply of more than {MAX_REPLY_BYTES:,} bytes")
    return content


def object_of(content: bytes) -> dict[str, Any]:
    value = parse(content.decode())
    if not isinstance(value, dict):
        raise BadStream("JSON that is no object")
    return value


class Denied(Broken):
    """It wants another key."""


class Unreachable(Broken):
    """There is no connection."""


def fault_of(status: int, content: bytes, retry_after: str = "") -> Refused | Broken:
    """What a reply means that is no success: the request's fault, or the server's."""
    if status == 429:
        return Full("the model's server is busy", wait_s=seconds_of(retry_after))
    if status in REFUSES_KEY:
        return Denied("the model's server failed: it refuses the key")
    if status not in (400, 413, 422):
        what = "it has no such model" if status == 404 else f"HTTP {status}"
        return Broken(f"the model's server failed: {what}")
    try:
        found = object_of(content)
    except (BadStream, JSONFault, UnicodeDecodeError):
        found = {}
    error = found["error"] if isinstance(found.get("error"), dict) else found
    words = next((x for x in (error.get("message"), error.get("detail")) if isinstance(x, str)), f"HTTP {status}")
    names = [x if isinstance(x, str) and x.isprintable() else "" for x in (error.get("param"), error.get("code"))]
    return Refused(f"the model's server: {shown(words, MAX_TOLD)}", param=names[0][:100], code=names[1][:100])


def seconds_of(retry_after: str) -> int | None:
    """Of the header: a number or a date; None for anything else."""
    if re.fullmatch("[0-9]{1,6}", retry_after):
        return max(1, int(retry_after))
    try:
        wait_s = parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, OverflowError, OSError):
        return None
    return max(1, math.ceil(min(wait_s, 999_999)))


def too_long(fault: Refused | Broken) -> bool:
    words = f"{fault} {getattr(fault, 'code', '')}".lower()
    return isinstance(fault, Refused) and any(word in words for word in LONG)


def shorter(turns: Sequence[Turn]) -> list[Turn]:
    """Without half of the oldest turns that are neither the system's nor the last; begins with the user."""
    first = 1 if turns and turns[0].role == "system" else 0
    spare = len(turns) - first - 1
    left = list(turns[first + (spare + 1) // 2 :]) if spare > 0 else list(turns[first:])
    while len(left) > 1 and left[0].role == "assistant":
        left.pop(0)
    return [*turns[:first], *left]


@dataclass
class Said:
    """One answer as far as it has come."""

    chat: bool
    logprobs: bool
    prompt_tokens: int = 0
    num_tokens: int = 0
    finish: Finish = ""
    told: bool = False
    """Whether the numbers are the server's own."""
    scored: bool = False
    """Whether log-probabilities have come: text that was held back follows its tokens."""

    def take(self, chunk: dict[str, Any]) -> Piece | None:
        """The text of one chunk, if it has any; Broken for an error, Refused if log-probabilities are not told."""
        if "error" in chunk:
            raise Broken("the model's server failed within its answer")
        if isinstance(usage := chunk.get("usage"), dict):
            self.prompt_tokens, self.told = count(usage.get("prompt_tokens")), True
            self.num_tokens = count(usage.get("completion_tokens"))
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return None
        if isinstance(reason := choice.get("finish_reason"), str):
            self.finish = FINISHES.get(reason, "stop")
        delta = choice.get("delta")
        text = choice.get("text") if not self.chat else delta.get("content") if isinstance(delta, dict) else None
        tokens = tokens_of(choice.get("logprobs"), chat=self.chat) if self.logprobs else ()
        if not tokens and (not isinstance(text, str) or not text):
            return None
        self.scored = self.scored or bool(tokens)
        if self.logprobs and not self.scored:
            raise Refused("the model's server gives no log-probabilities", param="logprobs")
        if not self.told:
            self.num_tokens += len(tokens) if self.logprobs else 1
        return Piece(0, sound(text), self.num_tokens, tokens=tokens)


def count(value: object) -> int:
    return value if type(value) is int and 0 <= value < 10**9 else 0


def sound(text: object) -> str:
    """Text without halves of characters."""
    return text.encode(errors="replace").decode() if isinstance(text, str) else ""


def tokens_of(value: object, *, chat: bool) -> tuple[Token, ...]:
    """Log-probabilities of a chunk in either form; what is no log-probability is left out."""
    if not isinstance(value, dict):
        return ()
    if chat:
        rows = [row for row in listed(value.get("content")) if isinstance(row, dict)]
        return tuple(
            Token(
                alternative(row), tuple(alternative(x) for x in listed(row.get("top_logprobs")) if isinstance(x, dict))
            )
            for row in rows
        )
    words, logprobs = listed(value.get("tokens")), listed(value.get("token_logprobs"))
    tops = listed(value.get("top_logprobs")) or [None] * len(words)
    return tuple(
        Token(
            alternative({"token": word, "logprob": logprob}),
            tuple(alternative({"token": x, "logprob": y}) for x, y in (top.items() if isinstance(top, dict) else ())),
        )
        for word, logprob, top in zip(words, logprobs, tops, strict=False)
    )


def listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def alternative(row: dict[str, Any]) -> Alternative:
    text, logprob, parts = sound(row.get("token")), row.get("logprob"), row.get("bytes")
    number = -math.inf
    if isinstance(logprob, int | float) and not isinstance(logprob, bool) and abs(logprob) < sys.float_info.max:
        number = float(logprob)
    is_bytes = isinstance(parts, list) and all(type(x) is int and 0 <= x < 256 for x in parts)
    return Alternative(text, bytes(cast(list[int], parts)) if is_bytes else text.encode(), number)
