"""The policy's ratios and objectives against float64 loops: values, gradients by finite differences, and the clip."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kinkajou.algos import losses
from kinkajou.algos.losses import aggregated, clipped_away, clipped_objective, importance_ratio

B, T = 4, 6
LEVELS = ["token", "sequence_mean", "sequence_sum"]
Rows = list[list[float]]


def case(seed: int, *, move: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New and old log-probabilities `move` apart, advantages of both signs, a mask with holes and an empty row."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=generator, dtype=torch.float64) - 0.1
    new = old + move * torch.randn(B, T, generator=generator, dtype=torch.float64)
    advantages = torch.randn(B, T, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[2] = False
    return new, old, advantages, mask


def ratio_by_hand(new: Rows, old: Rows, mask: list[list[bool]], i: int, j: int, level: str, clamp: float) -> float:
    if level == "token":
        d = new[i][j] - old[i][j]
    else:
        gaps = [new[i][k] - old[i][k] for k in range(T) if mask[i][k]]
        d = math.fsum(gaps) / (len(gaps) if level == "sequence_mean" else 1)
    return math.exp(min(max(d, -clamp), clamp) if clamp else d)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("clamp", [0.0, 0.3, 20.0])
@pytest.mark.parametrize("move", [0.0, 0.5])
def test_importance_ratio(level: str, clamp: float, move: float) -> None:
    new, old, _, mask = case(7, move=move)
    got = importance_ratio(new, old, mask, level, clamp=clamp)
    assert got.shape == ((B, T) if level == "token" else (B, 1))
    for i in range(B):
        for j in range(T):
            if mask[i, j]:
                want = ratio_by_hand(new.tolist(), old.tolist(), mask.tolist(), i, j, level, clamp)
                assert got.expand(B, T)[i, j].item() == pytest.approx(want, rel=1e-12)
    if move == 0:  # before the first step: GSPO's and RLOO's too
        assert (got == 1).all()


def test_the_clamp_keeps_a_far_ratio_finite() -> None:
    """verl and OpenRLHF: log-ratios within 20; without it float32 overflows at 89."""
    new, old = torch.tensor([[100.0, -100.0, 0.1]]), torch.zeros(1, 3)
    every = torch.ones(1, 3, dtype=torch.bool)
    got = importance_ratio(new, old, every, clamp=20.0)
    assert got[0].tolist() == pytest.approx([math.exp(20), math.exp(-20), math.exp(0.1)], rel=1e-5)
    assert importance_ratio(new, old, every)[0, 0] == math.inf


Hand = Callable[[float, float, float, float], float]  # ratio, ratio without gradient, log-probability, advantage
Ours = Callable[[Tensor, Tensor, Tensor], Tensor]


def clip_hand(low: float, high: float, dual: float = 0.0, cap: float = 0.0) -> Hand:
    def loss(r: float, _: float, logp: float, a: float) -> float:
        gain = min((min(r, cap) if cap else r) * a, min(max(r, 1 - low), 1 + high) * a)
        return -max(gain, dual * a) if dual and a < 0 else -gain

    return loss


def clip_ours(low: float, high: float, dual: float = 0.0, cap: float = 0.0) -> Ours:
    return lambda r, logp, a: clipped_objective(r, a, low=low, high=high, dual_clip=dual, cap=cap)


def sapo_hand(r: float, _: float, logp: float, a: float) -> float:
    tau = 1.0 if a > 0 else 1.05
    return -4 / tau / (1 + math.exp(-tau * (r - 1))) * a


CLIPS = {
    "ppo": (0.2, 0.2),
    "clip-higher": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "dual clip": (0.2, 0.2, 3.0),
    "dual clip 1.5": (0.2, 0.28, 1.5),
    "delta": (0.2, 0.2, 0.0, 4.0),
    "tight delta": (0.2, 0.28, 0.0, 1.1),
    "all": (0.2, 0.28, 3.0, 2.0),
}
OBJECTIVES: dict[str, tuple[Ours, Hand]] = {
    **{name: (clip_ours(*bounds), clip_hand(*bounds)) for name, bounds in CLIPS.items()},
    "cispo": (
        lambda r, logp, a: losses.cispo_objective(r, logp, a, high=0.5),
        lambda r, frozen, logp, a: -min(frozen, 1.5) * a * logp,
    ),
    "sapo": (lambda r, logp, a: losses.sapo_objective(r, a, tau_positive=1.0, tau_negative=1.05), sapo_hand),
    "reinforce": (
        lambda r, logp, a: losses.reinforce_objective(logp, a),
        lambda r, frozen, logp, a: -a * logp,
    ),
}


def loss_by_hand(new: Rows, start: Rows, old: Rows, adv: Rows, mask: list[list[bool]], level: str, hand: Hand) -> float:
    """Mean over 31 tokens; `start` is where the ratio without gradient is taken."""
    return (
        math.fsum(
            hand(
                ratio_by_hand(new, old, mask, i, j, level, 0.0),
                ratio_by_hand(start, old, mask, i, j, level, 0.0),
                new[i][j],
                adv[i][j],
            )
            for i in range(B)
            for j in range(T)
            if mask[i][j]
        )
        / 31
    )


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("move", [0.0001, 0.1, 0.6, 2.0])
def test_value_and_gradient(name: str, level: str, move: float) -> None:
    new, old, advantages, mask = case(int(1e4 * move), move=move)
    new.requires_grad_()
    ours, hand = OBJECTIVES[name]
    terms = ours(importance_ratio(new, old, mask, level), new, advantages)
    loss = aggregated(terms, mask, torch.tensor([31.0, 4.0]), "token_mean")
    start, fixed = new.tolist(), (old.tolist(), advantages.tolist(), mask.tolist(), level, hand)
    assert loss.item() == pytest.approx(loss_by_hand(start, start, *fixed), rel=1e-6, abs=1e-12)
    (grad,) = torch.autograd.grad(loss, new)
    step = 1e-7
    for i in range(B):
        for j in range(T):
            ends = []
            for side in (step, -step):
                moved = [row[:] for row in start]
                moved[i][j] += side
                ends.append(loss_by_hand(moved, start, *fixed))
            assert grad[i, j].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("move", [0.0, 0.1, 0.5, 3.0])
def test_clipped_away_is_where_the_gradient_is_exactly_zero(name: str, move: float) -> None:
    """And only there, but for advantages of 0."""
    new, old, advantages, _ = case(3, move=move)
    new, old, advantages = (
        torch.cat([x] * 10) + torch.linspace(0, 0.3, 10 * B)[:, None] for x in (new, old, advantages)
    )
    advantages[0] = 0.0
    low, high, dual, cap = (*CLIPS[name], 0.0, 0.0)[:4]
    ratio = (new - old).exp().requires_grad_()
    loss = clipped_objective(ratio, advantages, low=low, high=high, dual_clip=dual, cap=cap)
    (grad,) = torch.autograd.grad(loss.sum(), ratio)
    cut = clipped_away(ratio.detach(), advantages, low=low, high=high, dual_clip=dual, cap=cap)
    assert torch.equal(cut, (grad == 0) & (advantages != 0))
    if move >= 0.5:
        assert cut.any()
        assert not cut.all()


def test_the_clip_cuts_only_moves_that_went_far_enough_the_right_way() -> None:
    """Raised and good, or lowered and bad: no gradient.  The other two corners keep theirs."""
    ratio = torch.tensor([2.7, 2.7, 0.37, 0.37], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    (grad,) = torch.autograd.grad(clipped_objective(ratio, advantages, low=0.2, high=0.2).sum(), ratio)
    assert (grad == 0).tolist() == [True, False, False, True]
    assert clipped_away(ratio, advantages, low=0.2, high=0.2).tolist() == [True, False, False, True]


@pytest.mark.parametrize("dual", [1.0, 1.5, 3.0])
def test_dual_clip_bounds_the_loss_of_bad_tokens_and_leaves_good_ones(dual: float) -> None:
    ratio = torch.linspace(-5, 9, 200).exp()
    bad, good = torch.full_like(ratio, -2.0), torch.full_like(ratio, 2.0)
    bounded = clipped_objective(ratio, bad, low=0.2, high=0.2, dual_clip=dual)
    plain = clipped_objective(ratio, bad, low=0.2, high=0.2)
    assert float(bounded.max()) <= 2 * dual + 1e-6
    assert torch.equal(bounded[ratio < dual], plain[ratio < dual])
    assert float(plain.max()) > 1e3  # what it protects from
    with_it, without = (clipped_objective(ratio, good, low=0.2, high=0.2, dual_clip=d) for d in (dual, 0.0))
    assert torch.equal(with_it, without)


@pytest.mark.parametrize("name", ["ppo", "dual clip", "all", "cispo", "reinforce", "sapo"])
@pytest.mark.parametrize("level", LEVELS)
def test_before_the_first_step_the_gradient_is_the_policy_gradient(name: str, level: str) -> None:
    """-A for each token; at the level of answers, the mean or the sum of the answer's advantages."""
    _, old, advantages, mask = case(4, move=0.0)
    if level != "token":  # one advantage for an answer
        advantages = advantages[:, :1].expand(B, T)
    new = old.clone().requires_grad_()
    terms = OBJECTIVES[name][0](importance_ratio(new, old, mask, level), new, advantages)
    how = "sequence_mean" if level == "sequence_sum" else "token_mean"
    loss = aggregated(terms, mask, torch.tensor([float(mask.sum()), float(B)]), how)
    (grad,) = torch.autograd.grad(loss, new)
    if name in ("cispo", "reinforce") and level == "sequence_sum":
        want = -advantages * mask / mask.sum(1, keepdim=True).clamp(min=1) / B
    else:
        want = -advantages * mask / (B if level == "sequence_sum" else mask.sum())
    torch.testing.assert_close(grad, want.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("level", LEVELS)
def test_what_stands_off_the_mask_never_overflows(level: str) -> None:
    new, old, advantages, mask = case(6, move=0.3)
    far = torch.where(mask, new, 1e4).requires_grad_()
    values = []
    for given in (new, far):
        ratio = importance_ratio(given, old, mask, level)
        terms = clipped_objective(ratio, advantages, low=0.2, high=0.2)
        values.append(aggregated(terms, mask, torch.tensor([9.0, 4.0]), "token_mean"))
    assert torch.equal(*values)
    (grad,) = torch.autograd.grad(values[1], far)
    assert torch.isfinite(grad).all()
    assert not grad[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_objectives_keep_the_type_of_their_input(dtype: torch.dtype) -> None:
    new, old, advantages, mask = (x.to(dtype) if x.is_floating_point() else x for x in case(1, move=0.3))
    for ours, _ in OBJECTIVES.values():
        assert ours(importance_ratio(new, old, mask), new, advantages).dtype == dtype


def test_sapo_is_reinforce_near_ratio_one_and_flat_far_from_it() -> None:
    """Gao 2025: the gate's slope is 1 at ratio 1 for any temperature, and falls to both sides."""
    for tau in (0.5, 1.0, 3.0):
        ratio = torch.tensor([0.01, 1.0, 12.0], dtype=torch.float64, requires_grad=True)
        for sign in (1.0, -1.0):
            loss = losses.sapo_objective(ratio, torch.full_like(ratio, sign), tau_positive=tau, tau_negative=tau)
            (grad,) = torch.autograd.grad(loss.sum(), ratio)
            assert grad[1].item() == pytest.approx(-sign)
            assert abs(grad[0].item()) < 1
            assert abs(grad[2].item()) < 1
