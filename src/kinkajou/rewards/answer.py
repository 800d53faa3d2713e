"""What judges that read text see, and how they speak of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kinkajou.data.records import Prompt, shown
from kinkajou.errors import UserError


@dataclass(frozen=True)
class Answer:
    """What a rule sees."""

    prompt: Prompt
    text: str
    ended: bool  # stopped at an end token by itself

    @property
    def question(self) -> str:
        """The last thing that the user said."""
        return self.prompt.messages[-1].content


Rule = Callable[[Answer], float]


def sample_of(answer: Answer) -> str:
    """The sample in an error message: its row and how prompt and response begin."""
    return f"{answer.prompt.place}: prompt {shown(answer.question)}, response {shown(answer.text)}"


def field(answer: Answer, name: str, rule: str) -> Any:
    """The row's field; UserError where the row has none, or null."""
    meta: Mapping[str, Any] = answer.prompt.meta
    if meta.get(name) is None:
        raise UserError(
            f"{answer.prompt.place}: {rule} needs the row's field {shown(name)}",
            evidence=f"besides the prompt the row has: {', '.join(map(str, list(meta)[:12])) or 'no fields'}",
            fix="use prompts whose rows hold it, or another reward",
        )
    return meta[name]
