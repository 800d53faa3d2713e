"""Parts of DPO's family: divergences and their limits, the sorted loss of AOT, length and policy weights."""

import math

import pytest
import torch

from kinkajou.algos import dpo


def test_alpha_divergence_between_its_neighbours() -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    assert torch.equal(dpo.implicit_score(x, "alpha", alpha=1.0), x)
    assert torch.allclose(dpo.implicit_score(x, "alpha", alpha=1 + 1e-9), x, atol=1e-7)
    # Order 0 is the forward KL: (1/u - 1) / -1.
    assert torch.allclose(dpo.implicit_score(x, "alpha", alpha=0.0), dpo.implicit_score(x, "forward_kl"))


def test_alpha_divergence_stays_finite() -> None:
    x = torch.tensor([-500.0, 500.0], requires_grad=True)
    for alpha in (0.5, 2.0):
        assert dpo.implicit_score(x, "alpha", alpha=alpha).isfinite().all()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_implicit_scores_rise_and_are_0_at_the_reference(kind: dpo.Divergence) -> None:
    scores = dpo.implicit_score(torch.linspace(-4, 4, 9, dtype=torch.float64), kind)
    assert (scores.diff() > 0).all()
    assert scores[4].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("margin", [-1e4, -50.0, 0.0, 50.0, 1e4])
def test_finite_for_any_margin(margin: float) -> None:
    delta = torch.tensor([margin], requires_grad=True)
    losses = [
        dpo.logistic(delta, beta=1.0),
        dpo.logistic(delta, beta=1.0, label_smoothing=0.1),
        dpo.robust(delta, beta=1.0, label_smoothing=0.1),
        dpo.exo(delta, beta=1.0, label_smoothing=0.1),
        dpo.nca(delta, -delta, beta=1.0),
        dpo.apo_zero(delta, -delta, beta=1.0),
    ]
    for loss in losses:
        (grad,) = torch.autograd.grad(loss.sum(), delta, retain_graph=True)
        assert loss.isfinite().all()
        assert grad.isfinite().all()


def test_robust_is_unbiased() -> None:
    """Its mean over labels of which a share is flipped is the plain loss (Ray Chowdhury 2024, lemma 3.1)."""
    delta = torch.tensor([-2.0, 0.3, 4.0], dtype=torch.float64)
    share = 0.2
    kept, flipped = (dpo.robust(x, beta=0.5, label_smoothing=share) for x in (delta, -delta))
    assert torch.allclose((1 - share) * kept + share * flipped, dpo.logistic(delta, beta=0.5))


def test_exo_is_a_divergence() -> None:
    """0 where the policy prefers exactly as the smoothed label does, positive elsewhere."""
    best = math.log(0.8 / 0.2)
    losses = dpo.exo(torch.tensor([best, best - 1, best + 1], dtype=torch.float64), beta=1.0, label_smoothing=0.2)
    assert losses[0].item() == pytest.approx(0, abs=1e-12)
    assert (losses[1:] > 0.01).all()


def test_a_partner_has_the_same_rank() -> None:
    x, other = torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([10.0, 40.0, 30.0, 20.0])
    assert dpo.sorted_partner(x, other).tolist() == [40.0, 10.0, 30.0, 20.0]


def test_the_parts_of_unpaired_aot_have_the_gradient_of_the_sorted_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    whole = dpo.logistic(chosen.sort().values - rejected.sort().values, beta=0.4, label_smoothing=0.1).sum()
    want = torch.autograd.grad(whole, [chosen, rejected])
    below, above = dpo.sorted_partner(chosen, rejected).detach(), dpo.sorted_partner(rejected, chosen).detach()
    value, grads = torch.zeros((), dtype=torch.float64), [torch.zeros_like(chosen), torch.zeros_like(rejected)]
    for rows in ([6, 2], [0], [1, 3, 4, 5]):
        part = dpo.aot_unpaired(
            chosen[rows], rejected[rows], below[rows], above[rows], beta=0.4, label_smoothing=0.1
        ).sum()
        value = value + part.detach()
        grads = [a + b for a, b in zip(grads, torch.autograd.grad(part, [chosen, rejected]), strict=True)]
    assert value.item() == pytest.approx(whole.item(), rel=1e-12)
    for got, expected in zip(grads, want, strict=True):
        assert torch.allclose(got, expected, atol=1e-12)


def test_length_weights_count_targets_and_not_positions() -> None:
    mask = torch.tensor([[[0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0]]], dtype=torch.bool)
    weights = dpo.length_weights(mask, mask.sum(-1).amin(1, keepdim=True), 0.25)
    assert weights.tolist() == [[[0, 1, 1, 0, 1, 0.25], [0, 1, 1, 1, 0, 0]]]


def test_policy_weight_is_a_product_of_geometric_means() -> None:
    alignment = torch.tensor([[[-1.0, 0.5, 9.0], [-0.5, 9.0, 9.0]]])
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]]], dtype=torch.bool)
    assert dpo.policy_weight(alignment, mask).item() == pytest.approx(math.exp(-0.25) * math.exp(-0.5))
