"""One round of reinforcement learning: what was sampled and scored, and how far its updates have come."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors.torch import load_file

from kinkajou.batch import TokenBatch
from kinkajou.parallel.strategy import Strategy
from kinkajou.train.kept import STATE, Copied, saved

B = TypeVar("B", bound=TokenBatch)
FILE = "round"


@dataclass
class Round(Generic[B]):
    """What a checkpoint inside a step must hold; it cannot be sampled again, for the weights have moved since."""

    batch: B  # all ranks' rows
    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # rows for samples.jsonl
    done: int = 0  # minibatches behind the weights
    over: bool = False  # no further minibatch is to be trained on
    history: list[dict[str, float]] = field(default_factory=list)  # what each update has reported

    def left(self, minibatches: Iterable[list[int]]) -> Iterator[tuple[int, list[int]]]:
        """The minibatches that are still to be trained on, with their numbers."""
        for number, rows in enumerate(minibatches):
            if number == self.done and not self.over:
                yield number, rows

    def updated(self, found: dict[str, float], *, last: bool = False) -> None:
        """One more is behind the weights (nothing was found where it was left out); after the last no other follows."""
        if found:
            self.history.append(found)
        self.done, self.over = self.done + 1, last

    def plain(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "batch"}

    def copied(self, s: Strategy) -> Copied:
        return saved(s, FILE, vars(self.batch))


def read_round(kind: type[B], folder: Path, plain: Mapping[str, Any], s: Strategy) -> Round[B]:
    columns = load_file(folder / STATE / f"{FILE}.safetensors")
    return Round(kind(**columns).to(s.device), **plain)
