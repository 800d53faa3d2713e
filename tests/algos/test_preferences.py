"""The ranking loss under both of its names, and the interval of a share."""

import math

import pytest
import torch

from kinkajou.algos.preferences import RANKING, log_sigmoid_ranking, wilson_interval


@pytest.mark.parametrize("name", ["log_sig", "log_exp"])
@pytest.mark.parametrize("seed", range(3))
def test_both_published_forms(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = 4 * torch.randn(9, generator=generator), 4 * torch.randn(9, generator=generator)
    margins = [float(c) - float(r) for c, r in zip(chosen, rejected, strict=True)]
    instruct = math.fsum(-math.log(1 / (1 + math.exp(-d))) for d in margins) / 12
    anthropic = math.fsum(math.log(1 + math.exp(-d)) for d in margins) / 12
    got = RANKING[name](chosen, rejected, torch.tensor(12.0))
    assert float(got.value) == pytest.approx(instruct, rel=1e-5)
    assert float(got.value) == pytest.approx(anthropic, rel=1e-5)
    assert float(got.metrics["margin"]) == pytest.approx(math.fsum(margins) / 12, rel=1e-5)
    assert float(got.metrics["accuracy"]) == pytest.approx(sum(d > 0 for d in margins) / 12)


@pytest.mark.parametrize("margin", [-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4])
def test_finite_for_any_margin(margin: float) -> None:
    chosen = torch.tensor([margin], requires_grad=True)
    loss = log_sigmoid_ranking(chosen, torch.zeros(1), torch.tensor(1.0))
    (grad,) = torch.autograd.grad(loss.value, chosen)
    want_grad = -1.0 if margin < -80 else 0.0 if margin > 80 else -1 / (1 + math.exp(margin))
    want = -margin if margin < -80 else 0.0 if margin > 80 else math.log1p(math.exp(-margin))
    assert float(loss.value.detach()) == pytest.approx(want, rel=1e-5, abs=1e-8)
    assert float(grad) == pytest.approx(want_grad, rel=1e-5, abs=1e-8)


def test_a_tie_is_half_right() -> None:
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 3.0, 5.0])
    loss = log_sigmoid_ranking(chosen, rejected, torch.tensor(4.0))
    assert float(loss.metrics["accuracy"]) == 0.5


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),  # the same
        (0, 20, 0.0000, 0.1611),  # the same
        (1, 29, 0.0061, 0.1718),  # the same
    ],
)
def test_wilson_interval_of_the_textbook(wins: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(wins, count) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_solves_its_equation() -> None:
    """Its ends are the shares p at which |wins / n - p| is z standard errors of p."""
    for wins, count in ((3, 10), (50.5, 77), (199, 200)):
        for p in wilson_interval(wins, count, z=1.5):
            assert abs(wins / count - p) == pytest.approx(1.5 * math.sqrt(p * (1 - p) / count), rel=1e-9)


def test_wilson_interval_stays_inside_and_knows_nothing_of_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 5)[0] == 0.0
    assert wilson_interval(5, 5)[1] == 1.0
