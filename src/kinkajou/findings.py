"""What a check has seen, in one form for data, runs and reward models."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """`level`: ok, note (good to know), warning (training works, the result may not), error (do not start)."""

    name: str
    cause: str  # what is wrong, and what it comes from
    evidence: str  # what was seen, in numbers
    action: str  # what to do next
    level: Level = "warning"

    @property
    def heading(self) -> str:
        return f"{self.level}: {self.name}: {self.cause}"

    @property
    def details(self) -> str:
        parts = (("seen: ", self.evidence), ("do:   ", self.action))
        return "\n".join(f"{word}{said}" for word, said in parts if said)

    def __str__(self) -> str:
        return "\n  ".join((self.heading, *self.details.splitlines()))


def passed(name: str, evidence: str) -> Finding:
    """A check that found nothing wrong."""
    return Finding(name, "", evidence, "", "ok")
