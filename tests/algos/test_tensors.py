"""Masked statistics and log-probabilities against float64 loops and transformers' own logits processors."""

import math

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kinkajou.algos.tensors import (
    entropy,
    explained_variance,
    masked_mean,
    sampling_logits,
    token_logps,
    whiten,
)
from tiny import naive_distribution

SHAPES = [(1, 1), (3, 7), (5, 12)]


def case(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator) + 1.5
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[0, 0] = True
    return x, mask


def picked(x: Tensor, mask: Tensor) -> list[float]:
    return [float(v) for row, keeps in zip(x, mask, strict=True) for v, keep in zip(row, keeps, strict=True) if keep]


def mean_of(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def variance_of(values: list[float]) -> float:
    mean = mean_of(values)
    return math.fsum((v - mean) ** 2 for v in values) / len(values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_masked_mean(shape: tuple[int, int], seed: int) -> None:
    x, mask = case(shape, seed)
    assert float(masked_mean(x, mask)) == pytest.approx(mean_of(picked(x, mask)), rel=1e-6)


def test_masked_mean_of_nothing_is_zero() -> None:
    assert float(masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))) == 0.0


def test_masked_mean_over_ranks_weighs_by_tokens_not_by_ranks() -> None:
    x, mask = case((4, 9), 5)
    ours, theirs = slice(0, 1), slice(1, 4)

    def all_sum(local: Tensor) -> Tensor:
        values = picked(x[theirs], mask[theirs])
        return local + torch.tensor([math.fsum(values), len(values)])

    got = masked_mean(x[ours], mask[ours], all_sum=all_sum)
    assert float(got) == pytest.approx(mean_of(picked(x, mask)), rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 7), (5, 12), (1, 40)])
@pytest.mark.parametrize("variance", ["biased", "unbiased"])
@pytest.mark.parametrize("eps", [1e-8, 0.3, 0.0])
@pytest.mark.parametrize("keep_mean", [False, True])
def test_whiten(shape: tuple[int, int], variance: str, eps: float, keep_mean: bool) -> None:
    """TRL and verl divide by n - 1, OpenRLHF by n; TRL's whitened rewards keep their mean."""
    x, mask = case(shape, shape[1])
    values = picked(x, mask)
    mean, n = mean_of(values), len(values)
    spread = variance_of(values) * n / (n - 1 if variance == "unbiased" else n)
    got = whiten(x, mask, variance=variance, eps=eps, keep_mean=keep_mean)
    for i in range(shape[0]):
        for j in range(shape[1]):
            want = (float(x[i, j]) - mean) / math.sqrt(spread + eps) + (mean if keep_mean else 0)
            assert float(got[i, j]) == pytest.approx(want if mask[i, j] else 0.0, abs=1e-5)


def test_whiten_is_the_biased_form_with_zero_mean_by_default() -> None:
    x, mask = case((5, 12), 0)
    assert torch.equal(whiten(x, mask), whiten(x, mask, variance="biased", eps=1e-8, keep_mean=False))
    both = [picked(whiten(x, mask, variance=variance), mask) for variance in ("biased", "unbiased")]
    assert variance_of(both[0]) == pytest.approx(1, rel=1e-5)
    n = len(both[0])
    assert both[1] == pytest.approx([v * math.sqrt((n - 1) / n) for v in both[0]], rel=1e-5)  # table 4.0


@pytest.mark.parametrize("variance", ["biased", "unbiased"])
def test_whitening_over_ranks_is_that_of_one_process(variance: str) -> None:
    x, mask = case((6, 9), 4)
    whole = whiten(x, mask, variance=variance, keep_mean=True)
    mine, theirs = slice(0, 2), slice(2, 6)
    values, mean = picked(x[theirs], mask[theirs]), mean_of(picked(x, mask))
    sums = iter((math.fsum(values), math.fsum((v - mean) ** 2 for v in values)))

    def all_sum(local: Tensor) -> Tensor:
        return local + torch.tensor([next(sums), float(len(values))])

    got = whiten(x[mine], mask[mine], variance=variance, keep_mean=True, all_sum=all_sum)
    torch.testing.assert_close(got, whole[mine], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variance", ["biased", "unbiased"])
def test_whiten_of_equal_values_is_zero(variance: str) -> None:
    mask = torch.tensor([[True, True, False]])
    assert not whiten(torch.full((1, 3), 2.5), mask, variance=variance).any()
    kept = whiten(torch.full((1, 3), 2.5), mask, variance=variance, keep_mean=True)
    assert kept.tolist() == [[2.5, 2.5, 0.0]]


@pytest.mark.parametrize("variance", ["biased", "unbiased"])
def test_whiten_of_one_value_or_none_is_zero_and_not_nan(variance: str) -> None:
    for mask in (torch.tensor([[False, True, False]]), torch.zeros(1, 3, dtype=torch.bool)):
        assert not whiten(torch.tensor([[1.0, -4.0, 2.0]]), mask, variance=variance).any()


def test_whitening_ignores_what_is_off_the_mask() -> None:
    x, mask = case((3, 7), 1)
    other = torch.where(mask, x, 1e6)
    for keep_mean in (False, True):
        assert torch.equal(whiten(other, mask, keep_mean=keep_mean), whiten(x, mask, keep_mean=keep_mean))


@pytest.mark.parametrize("seed", range(4))
def test_explained_variance(seed: int) -> None:
    returns, mask = case((4, 9), seed)
    values = returns + torch.randn(returns.shape, generator=torch.Generator().manual_seed(seed + 50)) + 2.0
    residual = [r - v for r, v in zip(picked(returns, mask), picked(values, mask), strict=True)]
    want = 1 - variance_of(residual) / variance_of(picked(returns, mask))
    assert float(explained_variance(values, returns, mask)) == pytest.approx(want, abs=1e-5)


def test_explained_variance_over_ranks_is_that_of_one_process() -> None:
    returns, mask = case((6, 9), 2)
    values = 0.5 * returns + torch.randn(returns.shape, generator=torch.Generator().manual_seed(1))
    whole = explained_variance(values, returns, mask)
    theirs = slice(2, 6)
    told = []
    for x in (returns, returns - values):
        mean = mean_of(picked(x, mask))
        other = picked(x[theirs], mask[theirs])
        told += [math.fsum(other), math.fsum((v - mean) ** 2 for v in other)]
    sums = iter(told)

    def all_sum(local: Tensor) -> Tensor:
        return local + torch.tensor([next(sums), float(mask[theirs].sum())])

    got = explained_variance(values[:2], returns[:2], mask[:2], all_sum=all_sum)
    assert float(got) == pytest.approx(float(whole), abs=1e-5)


def test_explained_variance_of_known_critics() -> None:
    returns, mask = case((4, 9), 3)
    assert float(explained_variance(returns + 7, returns, mask)) == pytest.approx(1.0, abs=1e-5)
    assert float(explained_variance(torch.zeros_like(returns), returns, mask)) == pytest.approx(0.0, abs=1e-5)
    assert float(explained_variance(-returns, returns, mask)) == pytest.approx(-3.0, abs=1e-4)
    assert math.isnan(float(explained_variance(returns, torch.ones_like(returns), mask)))


CUTS = [
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (2.0, 1, 1.0),
    (1.0, 5, 1.0),
    (1.0, 0, 0.9),
    (1.0, 0, 0.3),
    (1.0, 0, 1e-6),
    (0.7, 8, 0.8),
    (1.3, 3, 0.5),
    (1.0, 1000, 0.95),
    (0.0, 0, 1.0),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CUTS)
@pytest.mark.parametrize("seed", range(3))
def test_sampling_logits_against_sorting_loops(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    logits = 2 * torch.randn(6, 30, generator=torch.Generator().manual_seed(seed))
    got = sampling_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    for row, cut in zip(logits.tolist(), got, strict=True):
        want = naive_distribution(row, temperature=temperature, top_k=top_k, top_p=top_p)
        assert [p > 0 for p in want] == torch.isfinite(cut).tolist()
        torch.testing.assert_close(cut.softmax(-1).double(), torch.tensor(want).double(), atol=1e-6, rtol=1e-5)


def test_top_p_is_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()
    for top_p, size in ((0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.9, 4)):
        got = sampling_logits(logits, temperature=1.0, top_k=0, top_p=top_p)
        assert int(torch.isfinite(got).sum()) == size, top_p


def test_top_p_is_taken_of_what_top_k_left() -> None:
    """0.4 / 0.7 = 0.57 of the two left: p = 0.5 keeps one token; of the whole vocabulary it would keep two."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    got = sampling_logits(logits, temperature=1.0, top_k=2, top_p=0.5)
    assert torch.isfinite(got).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [cut for cut in CUTS if cut[0] > 0])
def test_sampling_logits_equal_transformers_warpers(temperature: float, top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(8, 40, generator=torch.Generator().manual_seed(9))
    want = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        want = TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)
    got = sampling_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(got, want)


def test_a_kept_token_is_never_cut_and_joins_the_sum() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.5, 0.3, 0.15, 0.05]]).log()
    got = sampling_logits(logits, temperature=1.0, top_k=2, top_p=1.0, keep=torch.tensor([3, 1]))
    logps = token_logps(got, torch.tensor([3, 1]))
    assert logps.tolist() == pytest.approx([math.log(0.05 / 0.85), math.log(0.3 / 0.8)], rel=1e-5)
    nucleus = sampling_logits(logits, temperature=1.0, top_k=0, top_p=0.5, keep=torch.tensor([2, 0]))
    assert torch.isfinite(nucleus).tolist() == [[True, False, True, False], [True, False, False, False]]


def test_sampling_logits_are_float32_and_leave_their_input_alone() -> None:
    logits = torch.randn(3, 9).bfloat16()
    before = logits.clone()
    assert sampling_logits(logits, temperature=0.5, top_k=3, top_p=0.9).dtype == torch.float32
    assert torch.equal(logits, before)


def test_token_logps_and_entropy() -> None:
    logits = 4 * torch.randn(5, 11, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([0, 10, 3, 3, 7])
    logps, nats = token_logps(logits, tokens), entropy(logits)
    for row, token, logp, nat in zip(logits.tolist(), tokens.tolist(), logps.tolist(), nats.tolist(), strict=True):
        total = math.log(math.fsum(math.exp(x) for x in row))
        assert logp == pytest.approx(row[token] - total, abs=1e-5)
        assert nat == pytest.approx(-math.fsum(math.exp(x - total) * (x - total) for x in row), abs=1e-5)


def test_entropy_counts_a_cut_token_as_nothing() -> None:
    cut = torch.tensor([[0.0, -math.inf, 0.0, -math.inf], [-math.inf, -math.inf, 5.0, -math.inf]])
    assert entropy(cut).tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)
    assert float(token_logps(cut, torch.tensor([1, 2]))[0]) == -math.inf


def test_logps_of_huge_logits_are_finite_with_finite_gradient() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    logp = token_logps(logits, torch.tensor([1]))
    logp.sum().backward()
    assert float(logp.detach()) == pytest.approx(-2e4)
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-1.0, 1.0, 0.0]]
