"""Losses over tokens against float64 loops; what they report against autograd."""

import math

import pytest
import torch
from torch import Tensor

from kinkajou.algos.losses import clipped_surrogate, clipped_value_loss, cross_entropy

B, T = 5, 8


def case(seed: int, *, move: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New and old log-probabilities `move` apart, advantages of both signs, a mask with holes."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=generator) - 0.1
    new = old + move * torch.randn(B, T, generator=generator)
    advantages = torch.randn(B, T, generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.7
    return new, old, advantages, mask


@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy(seed: int) -> None:
    logp, _, _, mask = case(seed, move=0.0)
    count = torch.tensor(17.0)
    want = -math.fsum(float(logp[i, j]) for i in range(B) for j in range(T) if mask[i, j]) / 17
    assert float(cross_entropy(logp, mask, count).value) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("move", [0.0, 0.1, 0.5, 3.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 0.5)])
def test_clipped_surrogate(move: float, low: float, high: float) -> None:
    new, old, advantages, mask = case(int(10 * move), move=move)
    count = torch.tensor(23.0)
    total = ratios = kl = 0.0
    for i in range(B):
        for j in range(T):
            if not mask[i, j]:
                continue
            d = float(new[i, j]) - float(old[i, j])
            ratio, a = math.exp(d), float(advantages[i, j])
            total += min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            ratios += ratio
            kl += math.exp(d) - 1 - d  # of KL(old || new), from tokens of the old policy
    got = clipped_surrogate(new, old, advantages, mask, count, low=low, high=high)
    assert float(got.value) == pytest.approx(-total / 23, rel=1e-5, abs=1e-6)
    assert float(got.metrics["ratio"]) == pytest.approx(ratios / 23, rel=1e-5)
    assert float(got.metrics["kl_old"]) == pytest.approx(kl / 23, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("move", [0.0, 0.1, 0.5, 3.0])
def test_clip_frac_counts_the_tokens_whose_gradient_is_cut_off(move: float) -> None:
    new, old, advantages, mask = case(3, move=move)
    new.requires_grad_()
    loss = clipped_surrogate(new, old, advantages, mask, mask.sum().float(), low=0.2, high=0.2)
    (grad,) = torch.autograd.grad(loss.value, new)
    assert not grad[~mask].any()
    cut = int((grad[mask] == 0).sum())
    assert float(loss.metrics["clip_frac"]) == pytest.approx(cut / int(mask.sum()), abs=1e-7)
    if move >= 0.5:
        assert cut > 0


def test_the_clip_cuts_only_moves_that_went_far_enough_the_right_way() -> None:
    """Raised and good, or lowered and bad: no gradient.  The other two corners keep theirs."""
    old = torch.zeros(1, 4)
    new = torch.tensor([[1.0, 1.0, -1.0, -1.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss = clipped_surrogate(new, old, advantages, mask, torch.tensor(4.0), low=0.2, high=0.2)
    (grad,) = torch.autograd.grad(loss.value, new)
    assert (grad == 0).tolist() == [[True, False, False, True]]
    assert float(loss.metrics["clip_frac"]) == 0.5


def test_before_the_first_step_the_gradient_is_the_policy_gradient() -> None:
    _, old, advantages, mask = case(4, move=0.0)
    new = old.clone().requires_grad_()
    loss = clipped_surrogate(new, old, advantages, mask, mask.sum().float(), low=0.2, high=0.2)
    (grad,) = torch.autograd.grad(loss.value, new)
    torch.testing.assert_close(grad, -advantages * mask / mask.sum())
    assert float(loss.metrics["ratio"]) == 1.0
    assert float(loss.metrics["kl_old"]) == 0.0
    assert float(loss.metrics["clip_frac"]) == 0.0


def test_what_stands_off_the_mask_never_overflows() -> None:
    new, old, advantages, mask = case(6, move=0.3)
    far = torch.where(mask, new, 1e4).requires_grad_()
    want = clipped_surrogate(new, old, advantages, mask, torch.tensor(9.0), low=0.2, high=0.2)
    got = clipped_surrogate(far, old, advantages, mask, torch.tensor(9.0), low=0.2, high=0.2)
    (grad,) = torch.autograd.grad(got.value, far)
    assert torch.isfinite(grad).all()
    assert torch.equal(got.value, want.value)


@pytest.mark.parametrize("clip", [0.05, 0.2, 1.0, 50.0])
@pytest.mark.parametrize("seed", range(2))
def test_clipped_value_loss(clip: float, seed: int) -> None:
    values, old, returns, mask = case(seed, move=0.5)
    count = torch.tensor(19.0)
    total, cut = 0.0, 0
    for i in range(B):
        for j in range(T):
            if not mask[i, j]:
                continue
            v, o, r = float(values[i, j]), float(old[i, j]), float(returns[i, j])
            near = min(max(v, o - clip), o + clip)
            total += max((v - r) ** 2, (near - r) ** 2) / 2
            cut += (near - r) ** 2 > (v - r) ** 2
    got = clipped_value_loss(values, old, returns, mask, count, clip=clip)
    assert float(got.value) == pytest.approx(total / 19, rel=1e-5)
    assert float(got.metrics["value_clip_frac"]) == pytest.approx(cut / 19, abs=0.5 / 19)


def test_value_clip_frac_counts_the_tokens_whose_gradient_is_cut_off() -> None:
    values, old, returns, mask = case(1, move=0.5)
    values.requires_grad_()
    loss = clipped_value_loss(values, old, returns, mask, mask.sum().float(), clip=0.2)
    (grad,) = torch.autograd.grad(loss.value, values)
    cut = int((grad[mask] == 0).sum())
    assert cut > 0
    assert float(loss.metrics["value_clip_frac"]) == pytest.approx(cut / int(mask.sum()), abs=1e-7)


def test_parts_add_up_to_the_whole() -> None:
    """Value and every metric are sums over a global count: two micro-batches give what one gives."""
    new, old, advantages, mask = case(2, move=0.5)
    count = mask.sum().float()
    for loss_fn in (
        lambda s: clipped_surrogate(new[s], old[s], advantages[s], mask[s], count, low=0.2, high=0.2),
        lambda s: clipped_value_loss(new[s], old[s], advantages[s], mask[s], count, clip=0.2),
        lambda s: cross_entropy(new[s], mask[s], count),
    ):
        whole, first, rest = loss_fn(slice(None)), loss_fn(slice(0, 2)), loss_fn(slice(2, None))
        torch.testing.assert_close(first.value + rest.value, whole.value)
        for name, x in whole.metrics.items():
            torch.testing.assert_close(first.metrics[name] + rest.metrics[name], x)
