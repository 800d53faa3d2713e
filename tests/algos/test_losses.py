"""Aggregation, value loss and engine correction against float64 loops; what they report against autograd."""

import math

import pytest
import torch
from torch import Tensor

from kinkajou.algos.losses import aggregated, clipped_value_loss, cross_entropy, importance_correction

B, T = 5, 8


def case(seed: int, *, move: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New and old numbers `move` apart, returns or advantages of both signs, a mask with holes and an empty row."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=generator) - 0.1
    new = old + move * torch.randn(B, T, generator=generator)
    other = torch.randn(B, T, generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[3] = False
    return new.to(dtype), old.to(dtype), other.to(dtype), mask


def places(mask: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i, row in enumerate(mask.tolist()) for j, counts in enumerate(row) if counts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy(seed: int, dtype: torch.dtype) -> None:
    logp, _, _, mask = case(seed, move=0.0, dtype=dtype)
    logp.requires_grad_()
    loss = cross_entropy(logp, mask, torch.tensor(17.0))
    want = -math.fsum(logp[i, j].item() for i, j in places(mask)) / 17
    assert loss.value.item() == pytest.approx(want, rel=1e-6)
    assert loss.value.dtype == dtype
    (grad,) = torch.autograd.grad(loss.value, logp)
    torch.testing.assert_close(grad, -mask.to(dtype) / 17)


AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum", "fixed_length"]


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_aggregated(how: str, seed: int) -> None:
    """A minibatch of 40 tokens in 9 samples, of which these are a part; the longest answer allowed has 12 tokens."""
    terms, _, _, mask = case(seed, move=0.4)
    terms.requires_grad_()
    count = torch.tensor([40.0, 9.0], dtype=torch.float64)
    got = aggregated(terms, mask, count, how, longest=12)
    total, slope = 0.0, [[0.0] * T for _ in range(B)]
    for i in range(B):
        own = [j for j in range(T) if mask[i, j]]
        for j in own:
            weight = {
                "token_mean": 1 / 40,
                "sequence_mean": 1 / len(own) / 9,
                "sequence_sum": 1 / 9,
                "fixed_length": 1 / 12 / 9,
            }[how]
            total += weight * terms[i, j].item()
            slope[i][j] = weight
    assert got.item() == pytest.approx(total, rel=1e-12)
    (grad,) = torch.autograd.grad(got, terms)
    torch.testing.assert_close(grad, torch.tensor(slope, dtype=torch.float64))


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_one_term_for_an_answer_counts_as_one_for_each_of_its_tokens(how: str) -> None:
    """Sequence-level ratios: terms (b, 1)."""
    terms, _, _, mask = case(1, move=0.0)
    count = torch.tensor([40.0, 9.0])
    one = terms[:, :1]
    got, want = (aggregated(x, mask, count, how, longest=12) for x in (one, one.expand(B, T)))
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    if how == "sequence_mean":
        answers = [one[i, 0].item() for i in range(B) if mask[i].any()]
        assert got.item() == pytest.approx(math.fsum(answers) / 9, rel=1e-6)


def test_equal_lengths_make_the_aggregations_one() -> None:
    terms, mask = case(2, move=0.0)[0], torch.ones(B, T, dtype=torch.bool)
    count = torch.tensor([float(B * T), float(B)])
    whole = {how: aggregated(terms, mask, count, how, longest=T).item() for how in AGGREGATIONS}
    assert whole["sequence_mean"] == pytest.approx(whole["token_mean"])
    assert whole["fixed_length"] == pytest.approx(whole["token_mean"])
    assert whole["sequence_sum"] == pytest.approx(whole["token_mean"] * T)


def test_a_batch_without_a_target_is_zero_with_zero_gradient() -> None:
    terms = torch.ones(B, T, requires_grad=True)
    nothing = torch.zeros(B, T, dtype=torch.bool)
    for how in AGGREGATIONS:
        loss = aggregated(terms, nothing, torch.tensor([7.0, 3.0]), how, longest=4)
        (grad,) = torch.autograd.grad(loss, terms)
        assert loss.item() == 0
        assert not grad.any()


@pytest.mark.parametrize("clip", [0.05, 0.2, 1.0, 50.0])
@pytest.mark.parametrize("seed", range(2))
def test_clipped_value_loss(clip: float, seed: int) -> None:
    values, old, returns, mask = case(seed, move=0.5)
    values.requires_grad_()
    count = torch.tensor(19.0)
    total, cut = 0.0, 0
    slope = [[0.0] * T for _ in range(B)]
    for i, j in places(mask):
        v, o, r = values[i, j].item(), old[i, j].item(), returns[i, j].item()
        near = min(max(v, o - clip), o + clip)
        total += max((v - r) ** 2, (near - r) ** 2) / 2
        cut += (near - r) ** 2 > (v - r) ** 2
        slope[i][j] = 0.0 if (near - r) ** 2 > (v - r) ** 2 else (v - r) / 19
    got = clipped_value_loss(values, old, returns, mask, count, clip=clip)
    assert got.value.item() == pytest.approx(total / 19, rel=1e-12)
    assert got.metrics["value_clip_frac"].item() == pytest.approx(cut / 19, abs=1e-7)
    (grad,) = torch.autograd.grad(got.value, values)
    torch.testing.assert_close(grad, torch.tensor(slope, dtype=torch.float64))


def test_value_clip_frac_counts_the_tokens_whose_gradient_is_cut_off() -> None:
    values, old, returns, mask = case(1, move=0.5)
    values.requires_grad_()
    loss = clipped_value_loss(values, old, returns, mask, mask.sum().float(), clip=0.2)
    (grad,) = torch.autograd.grad(loss.value, values)
    cut = int((grad[mask] == 0).sum())
    assert cut > 0
    assert float(loss.metrics["value_clip_frac"]) == pytest.approx(cut / int(mask.sum()), abs=1e-7)


def test_rounding_is_not_a_clip() -> None:
    """In float32, old + (new - old) is not always new: where nothing moved by 0.2, nothing was clipped."""
    generator = torch.Generator().manual_seed(0)
    values, old = (0.03 * torch.randn(1, 5000, generator=generator) for _ in range(2))
    returns = torch.randn(1, 5000, generator=generator)
    assert float((values - old).abs().max()) < 0.2
    every = torch.ones(1, 5000, dtype=torch.bool)
    assert clipped_value_loss(values, old, returns, every, torch.tensor(5000.0), clip=0.2).metrics == {
        "value_clip_frac": 0.0
    }


def test_parts_add_up_to_the_whole() -> None:
    """Value and every metric are sums over a global count: two micro-batches give what one gives."""
    new, old, returns, mask = case(2, move=0.5)
    count = mask.sum().float()
    for loss_fn in (
        lambda s: clipped_value_loss(new[s], old[s], returns[s], mask[s], count, clip=0.2),
        lambda s: cross_entropy(new[s], mask[s], count),
    ):
        whole, first, rest = loss_fn(slice(None)), loss_fn(slice(0, 2)), loss_fn(slice(2, None))
        torch.testing.assert_close(first.value + rest.value, whole.value)
        for name, x in whole.metrics.items():
            torch.testing.assert_close(first.metrics[name] + rest.metrics[name], x)
    both = torch.tensor([float(count), float(B)])
    for how in AGGREGATIONS:
        parts = [aggregated(new[s], mask[s], both, how, longest=9) for s in (slice(0, 2), slice(2, None))]
        torch.testing.assert_close(sum(parts), aggregated(new, mask, both, how, longest=9))


def correction_by_hand(logp: Tensor, sampler: Tensor, mask: Tensor, how: str, cap: float) -> list[list[float]]:
    weights = [[1.0] * T for _ in range(B)]
    for i, j in places(mask):
        d = logp[i, j].item() - sampler[i, j].item()
        if how == "truncate":
            weights[i][j] = min(math.exp(d), cap)
        elif how == "mask":
            weights[i][j] = math.exp(d) if 1 / cap <= math.exp(d) <= cap else 0.0
        else:
            whole = math.exp(math.fsum(logp[i, k].item() - sampler[i, k].item() for k in range(T) if mask[i, k]))
            weights[i][j] = whole if whole <= cap else 0.0
    return weights


CORRECTIONS = ["truncate", "mask", "sequence_mask"]


@pytest.mark.parametrize("how", CORRECTIONS)
@pytest.mark.parametrize("cap", [1.0, 1.5, 2.0, 8.0])
@pytest.mark.parametrize("move", [0.0, 0.2, 1.0])
def test_importance_correction(how: str, cap: float, move: float) -> None:
    logp, sampler, _, mask = case(int(10 * move), move=move)
    got = importance_correction(logp, sampler, mask, how, cap=cap)
    want = torch.tensor(correction_by_hand(logp, sampler, mask, how, cap), dtype=torch.float64)
    torch.testing.assert_close(got.expand(B, T), want)
    assert float(got.max()) <= max(cap, 1.0) * (1 + 1e-6)
    assert float(got.min()) >= 0
    assert (got[~mask] == 1).all()
    if move == 0:
        assert (got == 1).all()


@pytest.mark.parametrize("how", CORRECTIONS)
@pytest.mark.parametrize("far", [90.0, 400.0, 2e4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_weights_stay_finite_when_engine_and_trainer_are_far_apart(how: str, far: float, sign: float) -> None:
    """exp overflows float32 beyond 88: a long answer's sum gets there with 0.1 nats a token."""
    logp = torch.zeros(2, 4)
    sampler = torch.full((2, 4), -sign * far / 4)
    sampler[1] = 0.0
    got = importance_correction(logp, sampler, torch.ones(2, 4, dtype=torch.bool), how, cap=2.0)
    assert torch.isfinite(got).all()
    assert float(got.max()) <= 2.0
    assert got[1].tolist() == [1.0] * 4
    dropped = {"truncate": 2.0 if sign > 0 else math.exp(-far / 4), "mask": 0.0, "sequence_mask": 0.0}[how]
    assert got[0].tolist() == pytest.approx([dropped] * 4, abs=1e-6)


def test_sampled_by_the_engine_and_weighed_tokens_are_the_trainers() -> None:
    """Enumerated: with a cap that nothing reaches, E_engine[weight x f] = E_trainer[f]; truncated, at most that."""
    engine = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    trainer = torch.tensor([0.4, 0.2, 0.2, 0.2], dtype=torch.float64)
    f = torch.tensor([1.0, 2.0, 5.0, 3.0], dtype=torch.float64)
    every = torch.ones(4, 1, dtype=torch.bool)
    for cap in (10.0, 2.0):
        weights = importance_correction(trainer.log()[:, None], engine.log()[:, None], every, "truncate", cap=cap)
        mean, want = float((engine * weights[:, 0] * f).sum()), float((trainer * f).sum())
        assert mean == pytest.approx(want) if cap == 10 else mean < want
