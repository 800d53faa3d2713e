"""Steps that are left out because a number was not finite: counted, told, and after several in a row the end."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kinkajou.train.nonfinite import NotFinite


@dataclass
class Skips:
    """Plain numbers, which a checkpoint holds."""

    in_a_row: dict[str, int] = field(default_factory=dict)
    """By what was left out: an objective's name, or `reward`."""
    total: int = 0
    this_step: int = 0


class Guard:
    """What `update` asks about a step that is not finite.  All ranks ask alike.

    `tell(fault, number in a row)` says and writes what was left out; `keep(fault)` writes what the last one came from
    and returns where.
    """

    def __init__(self, limit: int, *, tell: Callable[[NotFinite, int], None], keep: Callable[[NotFinite], str]) -> None:
        self.limit, self.tell, self.keep, self.skips = limit, tell, keep, Skips()
        self.moved = False
        """Whether weights have moved since the run could last be stopped."""

    def taken(self, name: str, *, moved: bool = True) -> None:
        """A step with finite numbers, which has moved weights or only looked at scores."""
        self.moved |= moved
        self.skips.in_a_row.pop(name, None)

    def left_out(self, name: str, fault: NotFinite, *, hopeless: bool = False) -> None:
        """Counts it; raises it where it is one too many in a row, or `hopeless`."""
        skips = self.skips
        number = skips.in_a_row.get(name, 0) + 1
        if number > self.limit or hopeless:  # not left out: a run that goes on tries it again
            raise fault.ending(number, self.keep(fault))
        skips.in_a_row[name] = number
        skips.total += 1
        skips.this_step += 1
        self.tell(fault, number)

    def reported(self) -> dict[str, float]:
        """The step's metric, where there is something to report; the next step begins at 0."""
        number, self.skips.this_step = self.skips.this_step, 0
        return {"skipped": float(number)} if number else {}
