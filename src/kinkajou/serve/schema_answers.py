"""What the answers hold, for the description of the API; they are written without these models."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from kinkajou.serve.problems import PROBLEMS

FinishReason = Literal["stop", "length", "content_filter"]


class Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelCard(Exact):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    """Longest prompt and answer together in tokens."""


class ModelList(Exact):
    object: Literal["list"]
    data: list[ModelCard]


class Usage(Exact):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class OtherToken(Exact):
    token: str
    logprob: float
    bytes: list[int]


class SaidToken(OtherToken):
    top_logprobs: list[OtherToken]


class ChatLogprobs(Exact):
    content: list[SaidToken]
    refusal: None


class ChatMessage(Exact):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Exact):
    index: int
    message: ChatMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None


class ChatCompletion(Exact):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Exact):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Exact):
    index: int
    text: str
    finish_reason: FinishReason
    logprobs: TextLogprobs | None


class TextCompletion(Exact):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class Score(Exact):
    object: Literal["score"]
    index: int
    score: float


class ScoreList(Exact):
    object: Literal["list"]
    model: str
    data: list[Score]


class SampleScore(Exact):
    id: int
    score: float


class SampleScores(Exact):
    """What `--reward http://.../v1/rewards` reads."""

    scores: list[SampleScore]


Documented = dict[int | str, dict[str, Any]]
EVENTS = "text/event-stream"
ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}


def events_of(*names: str) -> dict[str, Any]:
    """The description of each event; without names they have none."""
    named = {"event": {"enum": list(names)}} if names else {}
    fields = {"data": {"type": "string"}, **named}
    return {EVENTS: {"schema": {"type": "object", "properties": fields, "required": list(fields)}}}


def answers(*, stream: bool = False) -> Documented:
    """For `responses=` of a route that takes a body and may answer with a stream."""
    return {**PROBLEMS, **({200: {"content": events_of()}} if stream else {})}


def stream_answers(*names: str) -> Documented:
    """The same for a route that has no other answer; what fails before it begins is JSON."""
    faults = {status: {"description": found["description"], "content": ERROR} for status, found in PROBLEMS.items()}
    return {**faults, 200: {"content": events_of(*names)}}
