"""What a run has measured so far, as far as its diagnosis needs it: bounded, whatever the run's length."""

import math
from collections import deque
from collections.abc import Mapping

RECENT, FIRST = 200, 20


class History:
    """The newest RECENT and the first FIRST finite values of each metric."""

    def __init__(self) -> None:
        self.step = 0
        self.row: dict[str, float] = {}
        self._recent: dict[str, deque[tuple[int, float]]] = {}
        self._first: dict[str, list[float]] = {}
        self._count: dict[str, int] = {}

    def add(self, step: int, row: Mapping[str, float]) -> None:
        self.step, self.row = step, dict(row)
        for name, x in row.items():
            if math.isfinite(x):
                self._recent.setdefault(name, deque(maxlen=RECENT)).append((step, x))
                self._count[name] = self.count(name) + 1
                if self._count[name] <= FIRST:
                    self._first.setdefault(name, []).append(x)

    def has(self, *names: str) -> bool:
        """Whether the newest row holds a finite value of each."""
        return all(math.isfinite(self.row.get(name, math.nan)) for name in names)

    def count(self, name: str) -> int:
        """How many finite values there were."""
        return self._count.get(name, 0)

    def points(self, name: str) -> list[tuple[int, float]]:
        """(step, value), oldest first."""
        return list(self._recent.get(name, ()))

    def last(self, name: str, n: int, *, before: int = 0) -> list[float]:
        """The newest n values, the newest `before` left out."""
        values = [x for _, x in self.points(name)]
        return values[max(0, len(values) - before - n) : len(values) - before]

    def first(self, name: str, n: int) -> list[float]:
        return self._first.get(name, [])[:n]
