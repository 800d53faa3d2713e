"""The two bodies of /v1/rewards."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from kinkajou.serve.schema import LIMITS, WHOLE, Message, ModelName, Strict, Text

NumId = Annotated[int, Field(ge=-LIMITS.seed, le=LIMITS.seed), WHOLE]
Messages = Annotated[list[Message], Field(min_length=1, max_length=LIMITS.num_messages)]


class ScoredChat(Strict):
    """Ends with the assistant's answer."""

    messages: Messages


class RewardRequest(Strict):
    input: Annotated[list[ScoredChat], Field(min_length=1, max_length=LIMITS.num_chats)]
    model: ModelName | None = None


class Sample(Strict):
    """An answer, as `--reward URL` sends it: docs/rewards.md."""

    id: NumId
    messages: Messages
    response: Text
    prompt: Text = Field("", description="The last thing that the user said; it stands in messages too.")
    ended: bool = Field(True, description="False: the answer was cut off, and no end token is read after it.")
    meta: dict[str, Any] = Field(default_factory=dict, description="The row's other fields; a model reads none.")


class SamplesRequest(Strict):
    samples: Annotated[list[Sample], Field(max_length=LIMITS.num_chats)]
    model: ModelName | None = None


def _form(value: object) -> str:
    if isinstance(value, SamplesRequest) or (isinstance(value, dict) and "samples" in value):
        return "of samples"
    return "of chats"


Scored = Annotated[
    Annotated[RewardRequest, Tag("of chats")] | Annotated[SamplesRequest, Tag("of samples")],
    Discriminator(_form),
]
