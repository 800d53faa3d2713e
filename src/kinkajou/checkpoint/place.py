"""Where a run stands, as the name of a checkpoint."""

import re
from dataclasses import dataclass

NAME = re.compile(r"step-([0-9]{6,15})(?:\+([0-9]{3,9}))?")


@dataclass(frozen=True, order=True)
class Place:
    """Whole steps behind the weights, and optimiser updates of the step after."""

    step: int
    updates: int = 0

    @property
    def name(self) -> str:
        return f"step-{self.step:06d}" + (f"+{self.updates:03d}" if self.updates else "")

    @classmethod
    def of(cls, name: str) -> "Place | None":
        """None for whatever `name` would not have written."""
        found = NAME.fullmatch(name)
        place = found and cls(int(found[1]), int(found[2] or 0))
        return place if place and place.name == name else None
