"""Running statistics against float64 sums over everything at once."""

import math
import random

import pytest
import torch
from torch import Tensor

from kinkajou.algos.running import Moments, merged, moments, scaled


def of(values: list[float]) -> tuple[float, float]:
    """Mean and deviation with n - 1, summed exactly."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_steps_of_different_sizes_add_up(offset: float) -> None:
    dice = random.Random(0)
    seen, everything = Moments(), list[float]()
    for size in (1, 5, 2, 64, 0, 7):
        step = [offset + dice.gauss(3.0, 2.0) for _ in range(size)]
        everything += step
        seen = merged(seen, moments(torch.tensor(step, dtype=torch.float64), torch.ones(size, dtype=torch.bool)))
        if len(everything) > 1:
            mean, std = of(everything)
            assert seen.mean == pytest.approx(mean, rel=1e-12)
            assert seen.std == pytest.approx(std, rel=1e-8)
    assert seen.number == len(everything)


def test_ranks_and_what_is_left_out() -> None:
    x = torch.tensor([1.0, 5.0, float("nan"), 2.0, -4.0])
    mask = torch.tensor([True, True, False, True, True])
    here, there = slice(0, 3), slice(3, 5)
    asked: list[int] = []

    def all_sum(own: Tensor) -> Tensor:
        """The other rank's sums beside ours: number and total first, squares about the common mean second."""
        asked.append(1)
        mean = (1.0 + 5.0 + 2.0 - 4.0) / 4
        other = torch.tensor([2.0, -2.0]) if len(asked) == 1 else torch.tensor((2 - mean) ** 2 + (-4 - mean) ** 2)
        return own + other.double()

    got = moments(x[here], mask[here], all_sum=all_sum)
    mean, std = of([1.0, 5.0, 2.0, -4.0])
    assert got.mean == pytest.approx(mean)
    assert got.std == pytest.approx(std)
    assert moments(x, mask) == pytest.approx(got)
    assert moments(x[there], mask[there]).number == 2


def test_scales() -> None:
    x = torch.tensor([1.0, 3.0, 8.0])
    mean, std = of([1.0, 3.0, 8.0])
    seen = moments(x, torch.ones(3, dtype=torch.bool))
    assert torch.equal(scaled(x, seen, "none"), x)
    torch.testing.assert_close(scaled(x, seen, "std"), x / std)
    torch.testing.assert_close(scaled(x, seen, "mean_std"), (x - mean) / std)
    assert scaled(x, seen, "std").dtype == torch.float32


@pytest.mark.parametrize("values", [[], [2.0], [2.0, 2.0, 2.0]])
def test_nothing_to_divide_by(values: list[float]) -> None:
    """One score, or equal ones, have no deviation: they stay what they are."""
    x = torch.tensor(values)
    seen = moments(x, torch.ones(len(values), dtype=torch.bool))
    assert torch.equal(scaled(x, seen, "std"), x)
