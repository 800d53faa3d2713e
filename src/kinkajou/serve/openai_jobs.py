"""Checked requests of OpenAI's two endpoints, and of 2023's, as jobs."""

from collections.abc import Sequence
from typing import Literal

from kinkajou.serve.backend import Job, Refused, Turn
from kinkajou.serve.limits import Limits
from kinkajou.serve.schema import Asked, ChatRequest, CompletionRequest, GenerateRequest, Message

ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "developer": "system",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}


def turns_of(messages: Sequence[Message], limits: Limits) -> tuple[Turn, ...]:
    """The parts of a message are joined as they are.  Refused if all are too long together."""
    found = tuple(Turn(ROLES[message.role], text_of(message)) for message in messages)
    if sum(len(turn.content) for turn in found) > limits.total_chars:
        raise Refused(f"the messages have more than {limits.total_chars:,} characters together", param="messages")
    return found


def text_of(message: Message) -> str:
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content)


def chat_job(body: ChatRequest, limits: Limits) -> Job:
    if body.top_logprobs is not None and not body.logprobs:
        raise Refused("top_logprobs needs logprobs: true", param="top_logprobs")
    given = [limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None]
    return _job(
        body,
        turns=turns_of(body.messages, limits),
        max_tokens=min(given, default=None),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def completion_jobs(body: CompletionRequest, limits: Limits) -> list[Job]:
    """One for each prompt."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if sum(map(len, prompts)) > limits.total_chars:
        raise Refused(f"the prompts have more than {limits.total_chars:,} characters together", param="prompt")
    return [_job(body, text=text, max_tokens=body.max_tokens, logprobs=body.logprobs) for text in prompts]


def generate_job(body: GenerateRequest, limits: Limits) -> Job:
    *done, asked = body.history
    if asked.response:
        place = f"history.{len(done)}.response"
        raise Refused("the last response must be empty: it is the one that is asked for", param=place)
    said = [turn for pair in done for turn in (Turn("user", pair.instruction), Turn("assistant", pair.response))]
    turns = (*said, Turn("user", asked.instruction))
    if sum(len(turn.content) for turn in turns) > limits.total_chars:
        raise Refused(f"the history has more than {limits.total_chars:,} characters", param="history")
    return Job(
        turns=turns,
        max_tokens=body.max_new_tokens,
        temperature=_or(body.temperature, 1.0),
        top_k=body.top_k or 0,
        top_p=_or(body.top_p, 1.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        drop_oldest=True,
    )


def _job(
    body: Asked,
    *,
    turns: tuple[Turn, ...] = (),
    text: str | None = None,
    max_tokens: int | None,
    logprobs: int | None,
) -> Job:
    return Job(
        turns=turns,
        text=text,
        n=body.n or 1,
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_k=body.top_k or 0,
        top_p=_or(body.top_p, 1.0),
        min_p=body.min_p or 0.0,
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        stops=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        seed=body.seed,
        logprobs=logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
