"""KL estimators: definition, sign, direction, and expectation by enumeration."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kinkajou.algos.kl import k1, k2, k3

POLICY = [0.7, 0.2, 0.06, 0.03, 0.01]
REFERENCE = [0.05, 0.15, 0.2, 0.2, 0.4]


def exact(p: list[float], q: list[float]) -> float:
    """Sum of p log(p / q), in nats."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_against_the_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logp, ref = -3 * torch.rand(4, 6, generator=generator), -3 * torch.rand(4, 6, generator=generator)
    for estimator, formula in (
        (k1, lambda d: d),
        (k2, lambda d: d * d / 2),
        (k3, lambda d: math.exp(-d) - 1 + d),
    ):
        got = estimator(logp, ref)
        for i in range(4):
            for j in range(6):
                want = formula(float(logp[i, j]) - float(ref[i, j]))
                assert float(got[i, j]) == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_k3_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    logp, ref = -12 * torch.rand(20_000, generator=generator), -12 * torch.rand(20_000, generator=generator)
    assert float(k3(logp, ref).min()) >= -1e-6
    assert float(k1(logp, ref).min()) < 0


def test_k1_and_k3_have_the_exact_kl_as_their_mean() -> None:
    """Every token of a small vocabulary, weighted by the policy that draws it."""
    logp, ref = (torch.tensor(p, dtype=torch.float64).log() for p in (POLICY, REFERENCE))
    chances = torch.tensor(POLICY, dtype=torch.float64)
    want = exact(POLICY, REFERENCE)
    assert float((chances * k1(logp, ref)).sum()) == pytest.approx(want, rel=1e-12)
    assert float((chances * k3(logp, ref)).sum()) == pytest.approx(want, rel=1e-12)
    assert float((chances * k2(logp, ref)).sum()) != pytest.approx(want, rel=0.05)  # biased, and said so


@pytest.mark.parametrize("estimator", [k1, k3])
def test_tokens_of_the_policy_read_near_the_true_kl(estimator: Callable[..., Tensor]) -> None:
    """Contract, item 3: with the ratio upside down a true KL of 1.81 read as 24.7."""
    drawn = torch.multinomial(
        torch.tensor(POLICY), 40_000, replacement=True, generator=torch.Generator().manual_seed(1)
    )
    logp, ref = torch.tensor(POLICY).log()[drawn], torch.tensor(REFERENCE).log()[drawn]
    true = exact(POLICY, REFERENCE)
    upside_down = (logp - ref).exp() - 1 - (logp - ref)
    assert float(upside_down.mean()) > 4 * true  # what this test tells apart
    assert float(estimator(logp, ref).mean()) == pytest.approx(true, abs=0.05)


def test_gradient_of_k2_is_that_of_the_exact_kl() -> None:
    """E[d x grad logp] is the gradient of KL(policy || reference); by enumeration, against autograd on the KL."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor(REFERENCE, dtype=torch.float64).log()
    logp = logits.log_softmax(-1)
    (want,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    (got,) = torch.autograd.grad((logp.exp().detach() * k2(logp, ref)).sum(), logits)
    torch.testing.assert_close(got, want)
