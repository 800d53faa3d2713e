"""Correlations and intervals against numpy's, definitions in loops, and published numbers."""

import math
import random

import numpy as np
import pytest

from kinkajou.evals import statistics
from kinkajou.evals.statistics import correlation, paired_correlation, partial, share

DICE = random.Random(0)
X = [DICE.gauss(3, 2) for _ in range(40)]
Z = [DICE.gauss(0, 1) + 0.5 * x for x in X]
Y = [0.7 * x + DICE.gauss(0, 2) - z for x, z in zip(X, Z, strict=True)]


def test_correlation_is_pearsons() -> None:
    found = correlation(X, Y)
    assert found.value == pytest.approx(np.corrcoef(X, Y)[0, 1], rel=1e-12)
    assert found.count == 40


def test_interval_is_fishers() -> None:
    """The textbook case r = 0.5, n = 28: z = 0.5493, half 0.392, so 0.156 to 0.736."""
    found = statistics.with_interval(0.5, 28)
    assert (found.low, found.high) == (pytest.approx(0.156, abs=5e-4), pytest.approx(0.736, abs=5e-4))
    assert found.is_real
    assert not statistics.with_interval(0.3, 28).is_real


def test_fewer_independent_observations_widen_the_interval() -> None:
    wide, narrow = correlation(X, Y, count=20), correlation(X, Y)
    assert wide.value == narrow.value
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


def test_paired_correlation_is_pearsons_of_both_directions() -> None:
    both_x, both_y = X + [-x for x in X], Y + [-y for y in Y]
    assert paired_correlation(X, Y).value == pytest.approx(np.corrcoef(both_x, both_y)[0, 1], rel=1e-12)
    turned = [(-x, -y) if i % 2 else (x, y) for i, (x, y) in enumerate(zip(X, Y, strict=True))]
    again = paired_correlation([x for x, _ in turned], [y for _, y in turned])
    assert again.value == pytest.approx(paired_correlation(X, Y).value, rel=1e-12)


def test_partial_is_the_correlation_of_residuals() -> None:
    """What is left of x and y after a regression through the origin on z, as paired differences have it."""
    x, y, z = map(np.array, (X, Y, Z))
    left_x, left_y = x - z * (x @ z) / (z @ z), y - z * (y @ z) / (z @ z)
    expected = left_x @ left_y / math.sqrt((left_x @ left_x) * (left_y @ left_y))
    found = partial(paired_correlation(X, Y), paired_correlation(X, Z), paired_correlation(Y, Z))
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.count == 39


def test_what_is_not_defined_is_none() -> None:
    assert correlation([], []).value is None
    assert correlation([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]).value is None
    assert paired_correlation([0.0, 0.0], [1.0, 2.0]).value is None
    same = paired_correlation(X, X)
    assert partial(same, same, same).value is None
    few = paired_correlation(X[:4], Y[:4])
    assert partial(few, few, few).value is None
    assert (correlation([1.0, 2.0], [1.0, 3.0]).low, correlation([1.0, 2.0], [1.0, 3.0]).high) == (-1, 1)
    assert share(0, 0).value is None


def test_share_has_wilsons_interval() -> None:
    """Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662 at z = 1.96."""
    found = share(81, 263)
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


def test_deviation() -> None:
    assert statistics.deviation(X) == pytest.approx(np.std(X, ddof=1), rel=1e-12)
    assert statistics.deviation([3.0]) == 0
