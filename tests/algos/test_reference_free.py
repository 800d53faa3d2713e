"""ORPO's odds and AlphaPO's reward at their edges."""

import math

import pytest
import torch

from kinkajou.algos import kto, reference_free


@pytest.mark.parametrize("x", [-1e-6, -1e-3, -0.5, -math.log(2), -0.8, -5.0, -40.0])
def test_log1mexp(x: float) -> None:
    point = torch.tensor(x, requires_grad=True)
    value = reference_free.log1mexp(point)
    (grad,) = torch.autograd.grad(value, point)
    exact = math.log1p(-math.exp(x)) if x < -1 else math.log(-math.expm1(point.item()))
    assert value.item() == pytest.approx(exact, rel=1e-5, abs=1e-30)
    assert grad.item() == pytest.approx(-math.exp(x) / -math.expm1(point.item()), rel=1e-5)


def test_odds_of_equal_answers_cost_log_2() -> None:
    x = torch.tensor([-0.3, -4.0])
    assert reference_free.odds_ratio(x, x, beta=0.5).tolist() == pytest.approx([0.5 * math.log(2)] * 2)


def test_alpha_score_tends_to_the_log_probability() -> None:
    x = torch.tensor([-3.0, -0.2], dtype=torch.float64)
    assert torch.allclose(reference_free.alpha_score(x, 1e-7), x, rtol=1e-5)
    assert torch.equal(reference_free.alpha_score(x, 0.0), x)
    assert reference_free.alpha_score(x, 0.5).tolist() == pytest.approx([(1 - math.exp(v) ** -0.5) / 0.5 for v in x])


def test_kto_costs_half_at_the_reference_and_falls_where_it_should() -> None:
    good = torch.tensor([True, False])
    at = kto.kto(torch.zeros(2), good, torch.zeros(2), beta=0.1)
    assert at.tolist() == [0.5, 0.5]
    assert (kto.kto(torch.tensor([5.0, -5.0]), good, torch.zeros(2), beta=0.1) < 0.5).all()
    assert (kto.kto(torch.zeros(2), good, torch.ones(2), beta=0.1) - 0.5).sign().tolist() == [1, -1]


def test_the_reference_point_is_never_below_0() -> None:
    assert kto.reference_point(torch.tensor([-3.0, 1.0])).item() == 0
    assert kto.reference_point(torch.tensor([3.0, 1.0])).item() == 2
