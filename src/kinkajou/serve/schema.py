"""What a request may hold: every field, every bound.  A field that this server does nothing with is taken at the value
that asks for nothing, and refused by name at any other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model
from pydantic.config import JsonDict

from kinkajou.serve.limits import Limits

LIMITS = Limits()
"""Bounds that no setting of the server moves; `kinds` puts in those that one does."""
M = TypeVar("M", bound=BaseModel)
F = TypeVar("F", bound=Callable[..., Any])


def whole(value: object) -> object:
    """JSON has one kind of number: 2.0 is the integer 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def boolean(value: object) -> object:
    """To Python 0 and 0.0 equal False; to JSON they are numbers."""
    if value.__class__ is not bool:
        raise ValueError("must be false")
    return value


WHOLE = BeforeValidator(whole)
No = Annotated[Literal[False], BeforeValidator(boolean)]
Text = Annotated[str, Field(max_length=LIMITS.content_chars)]
StopText = Annotated[str, Field(min_length=1, max_length=LIMITS.stop_chars)]
Label = Annotated[str, Field(max_length=LIMITS.user_chars)]
ModelName = Annotated[str, Field(max_length=LIMITS.model_chars)]
Zero = Annotated[float, Field(ge=0, le=0)]
NoList = Annotated[list[str], Field(max_length=0)]
Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=0, le=LIMITS.top_k), WHOLE]
Penalty = Annotated[float, Field(ge=1 / LIMITS.repetition_penalty, le=LIMITS.repetition_penalty)]
NumLogprobs = Annotated[int, Field(ge=0, le=LIMITS.logprobs), WHOLE]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Nothing(Strict):
    """No field."""


class TextPart(Strict):
    """A piece of a message; a picture, a file or a sound is not read, wherever it lies."""

    type: Literal["text"]
    text: Text


class TextFormat(Strict):
    type: Literal["text"]


class Message(Strict):
    """`developer` is the new name of `system`.  What else an OpenAI message holds is taken while it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: NoList | None = None
    annotations: NoList | None = None


class StreamOptions(Strict):
    include_usage: bool | None = Field(None, description="A last chunk, without choices, has the usage.")
    include_obfuscation: No | None = None


class Asked(Strict):
    """What both of OpenAI's endpoints take."""

    model: ModelName | None = Field(None, description="One of /v1/models; the first of them if omitted.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=LIMITS.n), WHOLE] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=LIMITS.max_tokens), WHOLE] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=LIMITS.num_stops)] | None = None
    seed: Annotated[int, Field(ge=-LIMITS.seed, le=LIMITS.seed), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=LIMITS.temperature)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = Field(None, description="0: all tokens. Not OpenAI's.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Not OpenAI's.")
    repetition_penalty: Penalty | None = Field(None, description="1: none. Not OpenAI's.")
    user: Label | None = Field(None, description="Taken, not used.")
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Nothing | None = None


Chatting: JsonDict = {
    "anyOf": [
        {"properties": {"top_logprobs": {"type": "null"}}},
        {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
    ]
}


class ChatRequest(Asked):
    model_config = ConfigDict(json_schema_extra=Chatting)

    messages: Annotated[list[Message], Field(min_length=1, max_length=LIMITS.num_messages)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=LIMITS.max_tokens), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = Field(None, description="Needs logprobs: true.")
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = Field(None, description="Taken, not used.")
    store: No | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Label | None = Field(None, description="Taken, not used.")
    prompt_cache_key: Label | None = Field(None, description="Taken, not used.")
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    tools: NoList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="Taken, not used: there are no tools.")
    functions: NoList | None = None
    function_call: Literal["none", "auto"] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


class CompletionRequest(Asked):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=LIMITS.num_prompts)]
    logprobs: NumLogprobs | None = None
    echo: No | None = None
    suffix: None = None
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None


class Exchange(Strict):
    """An instruction and what was answered to it."""

    instruction: Text
    response: Text = ""


class GenerateRequest(Strict):
    """The body of 2023.  The last response is empty: it is the one that is asked for."""

    max_new_tokens: Annotated[int, Field(ge=1, le=512), WHOLE]
    history: Annotated[list[Exchange], Field(min_length=1, max_length=LIMITS.num_messages // 2)]
    top_k: TopK | None = None
    top_p: TopP | None = None
    temperature: Annotated[float, Field(ge=0, le=LIMITS.temperature)] | None = None
    repetition_penalty: Penalty | None = None


@dataclass(frozen=True)
class Kinds:
    """The bodies that one server takes."""

    chat: type[ChatRequest]
    completion: type[CompletionRequest]
    generate: type[GenerateRequest]


def kinds(limits: Limits) -> Kinds:
    n = Annotated[int, Field(ge=1, le=limits.n), WHOLE] | None
    longest = Annotated[int, Field(ge=1, le=limits.max_tokens), WHOLE] | None
    longest_2023 = Annotated[int, Field(ge=1, le=min(512, limits.max_tokens)), WHOLE]
    return Kinds(
        _changed(ChatRequest, n=(n, None), max_tokens=(longest, None), max_completion_tokens=(longest, None)),
        _changed(CompletionRequest, n=(n, None), max_tokens=(longest, None)),
        _changed(GenerateRequest, max_new_tokens=(longest_2023, ...)),
    )


def _changed(kind: type[M], **fields: Any) -> type[M]:
    return create_model(kind.__name__, __base__=kind, __doc__=kind.__doc__, **fields)


def takes(kind: type[BaseModel]) -> Callable[[F], F]:
    """Says which body FastAPI reads for a route whose `body` is annotated with the kind's base."""

    def said(handler: F) -> F:
        handler.__annotations__["body"] = kind
        return handler

    return said
