"""Shares and correlations of small samples, each with its 95 % interval.  None where a number is not defined."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kinkajou.algos.preferences import wilson_interval

Z = 1.96
"""Half the width of a 95 % interval in standard errors."""


@dataclass(frozen=True)
class Share:
    """A share in [0, 1] with its interval (Wilson 1927)."""

    value: float | None
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Correlation:
    """A correlation in [-1, 1] with its interval (Fisher 1921); `count` independent observations made it."""

    value: float | None
    low: float
    high: float
    count: int

    @property
    def is_real(self) -> bool:
        """The interval does not hold 0."""
        return self.value is not None and (self.low > 0 or self.high < 0)


def share(wins: float, count: int) -> Share:
    low, high = wilson_interval(wins, count, z=Z)
    return Share(wins / count if count else None, low, high, count)


def mean(x: Sequence[float]) -> float:
    return math.fsum(x) / len(x)


def deviation(x: Sequence[float]) -> float:
    """Standard deviation with n - 1; 0 for fewer than two numbers."""
    centre = mean(x)
    return math.sqrt(math.fsum((a - centre) ** 2 for a in x) / max(len(x) - 1, 1))


def correlation(x: Sequence[float], y: Sequence[float], *, count: int | None = None) -> Correlation:
    """Pearson 1895.  `count` is the number of independent observations where it is smaller than len(x)."""
    middle_x, middle_y = (mean(x), mean(y)) if x else (0.0, 0.0)
    value = cosine([a - middle_x for a in x], [b - middle_y for b in y])
    return with_interval(value, len(x) if count is None else count)


def paired_correlation(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Correlation of two differences within pairs, each pair counted in both directions.

    So it does not matter which side of a pair is called the first: the mean difference is 0 by construction,
    and a feature that is always on the better side still counts.
    """
    return with_interval(cosine(x, y), len(x))


def partial(xy: Correlation, xz: Correlation, yz: Correlation) -> Correlation:
    """Correlation of x and y among observations of equal z (Yule 1907); None below five."""
    if xy.value is None or xz.value is None or yz.value is None or xy.count < 5:
        return with_interval(None, 0)
    left = (1 - xz.value**2) * (1 - yz.value**2)
    value = (xy.value - xz.value * yz.value) / math.sqrt(left) if left > 1e-9 else None
    # One observation is spent on z.
    return with_interval(None if value is None else max(-1.0, min(1.0, value)), xy.count - 1)


def cosine(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Sum of products over the root of both sums of squares; None if one of them is 0 to rounding."""
    size = math.sqrt(math.fsum(a * a for a in x)) * math.sqrt(math.fsum(b * b for b in y))
    if size < 1e-12:
        return None
    return max(-1.0, min(1.0, math.fsum(a * b for a, b in zip(x, y, strict=True)) / size))


def with_interval(value: float | None, count: int) -> Correlation:
    """Below four observations the interval is everything."""
    if value is None or count < 4:
        return Correlation(value, -1.0, 1.0, max(count, 0))
    if abs(value) > 1 - 1e-12:
        return Correlation(value, value, value, count)
    centre, half = math.atanh(value), Z / math.sqrt(count - 3)
    return Correlation(value, math.tanh(centre - half), math.tanh(centre + half), count)
