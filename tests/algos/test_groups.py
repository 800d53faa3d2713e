"""Advantages without a critic against float64 loops, and what must hold for any scores."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kinkajou.algos.groups import baselines, group_advantages, overlong_penalty, zero_spread

BASELINES = ["group_mean", "leave_one_out", "batch_mean", "none"]
SCALES = ["group", "batch", "none"]


def deviation(values: Sequence[float], unbiased: bool) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / max(1, len(values) - unbiased))


def by_hand(scores: Sequence[float], size: int, baseline: str, scale: str, unbiased: bool, eps: float) -> list[float]:
    wanted = []
    for i, score in enumerate(scores):
        group = scores[i // size * size : i // size * size + size]
        others = [x for j, x in enumerate(group) if j != i % size]
        base = {
            "group_mean": math.fsum(group) / size,
            "leave_one_out": math.fsum(others) / len(others),
            "batch_mean": math.fsum(scores) / len(scores),
            "none": 0.0,
        }[baseline]
        divisor = {
            "group": deviation(group, unbiased) + eps,
            "batch": deviation(scores, unbiased) + eps,
            "none": 1.0,
        }[scale]
        wanted.append((score - base) / divisor)
    return wanted


def drawn(seed: int, count: int) -> Tensor:
    return 2 * torch.randn(count, generator=torch.Generator().manual_seed(seed)) + 0.7


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("variance", ["biased", "unbiased"])
@pytest.mark.parametrize(("size", "groups", "eps"), [(4, 3, 1e-6), (2, 5, 1e-4), (8, 1, 1e-9), (3, 2, 0.5)])
def test_against_the_definition(baseline: str, scale: str, variance: str, size: int, groups: int, eps: float) -> None:
    scores = drawn(size, size * groups)
    got = group_advantages(scores, size, baseline=baseline, scale=scale, variance=variance, eps=eps)
    want = by_hand(scores.tolist(), size, baseline, scale, variance == "unbiased", eps)
    assert got.shape == (size * groups,)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_the_numbers_of_the_reference_implementations() -> None:
    """(1, 0, 0, 1): TRL's epsilon 1e-4 and OpenRLHF's 1e-9, both unbiased (numerics, table 4.0)."""
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0])
    for eps, size in ((1e-4, 0.865875), (1e-9, 0.866025)):
        got = group_advantages(scores, 4, baseline="group_mean", scale="group", variance="unbiased", eps=eps)
        assert got.tolist() == pytest.approx([size, -size, -size, size], abs=1e-6)
    loo = group_advantages(torch.tensor([3.0, 1.0, 2.0]), 3, baseline="leave_one_out", scale="none")
    assert loo.tolist() == pytest.approx([1.5, -1.5, 0.0])


@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines(baseline: str) -> None:
    scores = drawn(5, 12).view(3, 4)
    got = baselines(scores, baseline).expand(3, 4)
    for p in range(3):
        for g in range(4):
            others = [float(scores[p, j]) for j in range(4) if j != g]
            want = {
                "group_mean": math.fsum(scores[p].tolist()) / 4,
                "leave_one_out": math.fsum(others) / 3,
                "batch_mean": math.fsum(scores.flatten().tolist()) / 12,
                "none": 0.0,
            }[baseline]
            assert float(got[p, g]) == pytest.approx(want, abs=1e-6)


def test_over_ranks_the_batch_is_everyones() -> None:
    """Two ranks, each with its own groups, and one process with all of them: the same advantages."""
    scores = drawn(1, 16)
    whole = {
        (baseline, scale): group_advantages(scores, 4, baseline=baseline, scale=scale)
        for baseline in BASELINES
        for scale in SCALES
    }
    mine, theirs = scores[:8], scores[8:]
    for (baseline, scale), want in whole.items():
        seen: list[Tensor] = []

        def all_sum(local: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(local)
            if local.numel() == 2:  # count and sum
                return local + torch.stack([torch.tensor(8.0), theirs.sum()])
            return local + ((theirs - scores.mean()) ** 2).sum()

        got = group_advantages(mine, 4, baseline=baseline, scale=scale, all_sum=all_sum)
        torch.testing.assert_close(got, want[:8], atol=1e-6, rtol=1e-5)
        # A group lies on one rank: what compares within groups must not talk to the others.
        assert bool(seen) == (baseline == "batch_mean" or scale == "batch")


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e6, 1 / 3])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_equal_scores_give_exactly_nothing(baseline: str, scale: str, value: float, size: int) -> None:
    """Not a rounding error divided by a tiny epsilon: 7 x 0.1 / 7 is not 0.1 in float32."""
    scores = torch.cat([torch.full((size,), value), drawn(0, size)])
    got = group_advantages(scores, size, baseline=baseline, scale=scale, eps=1e-9)
    assert not got[:size].any()
    assert torch.isfinite(got).all()
    assert got[size:].any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_permuting_samples_permutes_advantages(baseline: str, scale: str) -> None:
    scores = drawn(2, 24).view(4, 6)
    inside, groups = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 0, 3, 1])
    plain = group_advantages(scores.flatten(), 6, baseline=baseline, scale=scale).view(4, 6)
    moved = group_advantages(scores[groups][:, inside].flatten(), 6, baseline=baseline, scale=scale).view(4, 6)
    torch.testing.assert_close(moved, plain[groups][:, inside], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_sums_and_spreads(seed: int) -> None:
    """RLOO and GRPO sum to 0 in each group; RLOO is GRPO's difference times n / (n - 1); GRPO's have deviation 1."""
    scores = drawn(seed, 40)
    loo = group_advantages(scores, 8, baseline="leave_one_out", scale="none").view(5, 8)
    mean = group_advantages(scores, 8, baseline="group_mean", scale="none").view(5, 8)
    scaled = group_advantages(scores, 8, baseline="group_mean", scale="group", eps=1e-9).view(5, 8)
    for found in (loo, mean, scaled):
        assert found.sum(1).tolist() == pytest.approx([0.0] * 5, abs=1e-5)
    torch.testing.assert_close(loo, mean * 8 / 7, atol=1e-5, rtol=1e-5)
    assert [deviation(row, True) for row in scaled.tolist()] == pytest.approx([1.0] * 5, rel=1e-5)


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_a_constant_added_to_a_groups_scores_changes_nothing(baseline: str) -> None:
    scores = drawn(6, 12)
    moved = scores + torch.tensor([5.0, -2.0, 9.0]).repeat_interleave(4)
    for scale in ("group", "none"):
        a, b = (group_advantages(x, 4, baseline=baseline, scale=scale) for x in (scores, moved))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_whole_numbers_and_half_precision_are_computed_in_float32() -> None:
    scores = torch.tensor([1, 0, 0, 1])
    for given in (scores, scores.bfloat16(), scores.double()):
        got = group_advantages(given, 4, baseline="group_mean", scale="group")
        assert got.dtype == torch.float32
        assert got.tolist() == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024], abs=1e-5)


def test_zero_spread() -> None:
    grouped = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1e-7], [0.1, 0.1, 0.1], [2.0, 1.0, 2.0]])
    assert zero_spread(grouped).tolist() == [True, False, True, False]
    assert zero_spread(torch.tensor([[4.0], [5.0]])).tolist() == [True, True]


@pytest.mark.parametrize(("longest", "buffer"), [(20, 4), (20, 20), (10, 1), (7, 3)])
def test_overlong_penalty(longest: int, buffer: int) -> None:
    """DAPO, equation 13, its three cases."""
    lengths = list(range(longest + 3))
    for length, got in zip(lengths, overlong_penalty(torch.tensor(lengths), longest, buffer).tolist(), strict=True):
        if length <= longest - buffer:
            want = 0.0
        elif length <= longest:
            want = (longest - buffer - length) / buffer
        else:
            want = -1.0
        assert got == pytest.approx(want, abs=1e-6)
