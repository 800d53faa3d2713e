"""KL estimators: definition, sign, direction, clamps, and value and gradient in expectation by enumeration."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kinkajou.algos.kl import adapted_coefficient, bounded, distance, estimate, k1, k2, k3, with_gradient

POLICY = [0.7, 0.2, 0.06, 0.03, 0.01]
REFERENCE = [0.05, 0.15, 0.2, 0.2, 0.4]
OLD = [0.3, 0.25, 0.2, 0.15, 0.1]
LOGITS = [0.3, -1.0, 0.8, 0.1, -0.4]
FORMULAS: dict[str, Callable[[float], float]] = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
    "abs": abs,
}


def exact(p: list[float], q: list[float]) -> float:
    """Sum of p log(p / q), in nats."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def log_of(chances: list[float]) -> Tensor:
    return torch.tensor(chances, dtype=torch.float64).log()


def gradient_of_exact_kl(logits: list[float], q: list[float]) -> list[float]:
    """d KL(softmax(logits) || q) / d logit_j = p_j (log(p_j / q_j) - KL), worked out by hand."""
    total = math.fsum(math.exp(x) for x in logits)
    p = [math.exp(x) / total for x in logits]
    kl = exact(p, q)
    return [a * (math.log(a / b) - kl) for a, b in zip(p, q, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_against_the_definition(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    logp, ref = (-3 * torch.rand(4, 6, generator=generator, dtype=dtype) for _ in range(2))
    for estimator, name in ((k1, "k1"), (k2, "k2"), (k3, "k3"), (distance, "abs")):
        got, named = estimator(logp, ref), estimate(logp, ref, name)
        assert torch.equal(got, named)
        assert got.dtype == dtype
        for i in range(4):
            for j in range(6):
                want = FORMULAS[name](float(logp[i, j]) - float(ref[i, j]))
                assert float(got[i, j]) == pytest.approx(want, rel=1e-5, abs=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logp, ref = (-12 * torch.rand(20_000, generator=generator, dtype=dtype) for _ in range(2))
    assert float(k3(logp, ref).min()) >= (-1e-6 if dtype == torch.float32 else -1e-15)
    assert float(k1(logp, ref).min()) < 0
    assert not k3(logp, logp).any()


def test_k1_and_k3_have_the_exact_kl_as_their_mean() -> None:
    """Every token of a small vocabulary, weighted by the policy that draws it."""
    logp, ref = log_of(POLICY), log_of(REFERENCE)
    chances = logp.exp()
    want = exact(POLICY, REFERENCE)
    assert float((chances * k1(logp, ref)).sum()) == pytest.approx(want, rel=1e-12)
    assert float((chances * k3(logp, ref)).sum()) == pytest.approx(want, rel=1e-12)
    assert float((chances * k2(logp, ref)).sum()) != pytest.approx(want, rel=0.05)  # biased, and said so
    assert float((chances * distance(logp, ref)).sum()) > want * 1.01


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


FAR = [-200.0, -50.0, -21.0, -19.0, -5.0, -2.0, -0.1, 0.0, 0.1, 2.0, 5.0, 19.0, 21.0, 50.0, 200.0]


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("clamp", "inside", "outside"), [(10, 0, 0), (0, 20, 10), (0, 3, 0), (0, 0, 5), (2, 20, 10)])
def test_clamps(name: str, clamp: float, inside: float, outside: float) -> None:
    """OpenRLHF bounds every estimate; verl bounds the log-ratio inside k3 and then k3, and nothing else."""
    logp = torch.tensor(FAR, dtype=torch.float64) - 300
    got = estimate(logp, torch.full_like(logp, -300), name, clamp=clamp, k3_input_clamp=inside, k3_output_clamp=outside)
    for d, value in zip(FAR, got.tolist(), strict=True):
        if name == "k3" and inside:
            d = min(max(d, -inside), inside)
        want = FORMULAS[name](d)
        if name == "k3" and outside:
            want = min(max(want, -outside), outside)
        if clamp:
            want = min(max(want, -clamp), clamp)
        assert value == pytest.approx(want, rel=1e-12)


def test_the_clamps_of_verl_keep_k3_finite_where_it_would_overflow() -> None:
    logp, ref = torch.tensor([-100.0, 0.0], requires_grad=True), torch.tensor([0.0, -100.0])
    assert k3(logp, ref)[0] == math.inf
    bound = estimate(logp, ref, "k3", k3_input_clamp=20, k3_output_clamp=10)
    bound.sum().backward()
    assert bound.tolist() == [10.0, 10.0]
    assert logp.grad is not None
    assert logp.grad.tolist() == [0.0, 0.0]


def test_a_bound_of_zero_is_none() -> None:
    x = torch.tensor([-3.0, 0.5, 7.0])
    assert bounded(x, 0.0).tolist() == [-3.0, 0.5, 7.0]
    assert bounded(x, 1.0).tolist() == [-1.0, 0.5, 1.0]


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("how", ["plain", "k2", "ratio"])
def test_every_gradient_form_against_its_derivative(name: str, how: str) -> None:
    """Token by token: f'(d); d under whatever value; (r f)' = r (f + f'), for log-ratios of both signs."""
    new = torch.tensor([-2.0, -0.5, -1.7, -0.2], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.0, -1.5, -1.2, -3.0], dtype=torch.float64)
    old = torch.tensor([-2.2, -0.4, -1.7, -0.9], dtype=torch.float64)
    value = estimate(new, ref, name)
    term = with_gradient(value, new, ref, (new - old).exp(), how)
    (got,) = torch.autograd.grad(term.sum(), new)
    slopes: dict[str, Callable[[float], float]] = {
        "k1": lambda d: 1.0,
        "k2": lambda d: d,
        "k3": lambda d: 1 - math.exp(-d),
        "abs": lambda d: math.copysign(1.0, d),
    }
    for i in range(4):
        d, r = new[i].item() - ref[i].item(), math.exp(new[i].item() - old[i].item())
        f, slope = FORMULAS[name](d), slopes[name](d)
        values = {"plain": f, "k2": f, "ratio": r * f}
        gradients = {"plain": slope, "k2": d, "ratio": r * (f + slope)}
        assert term[i].item() == pytest.approx(values[how], rel=1e-12)
        assert float(got[i]) == pytest.approx(gradients[how], rel=1e-12)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_on_policy_the_k2_gradient_is_that_of_the_exact_kl(name: str) -> None:
    """E[d x grad logp] is the gradient of KL(policy || reference), whatever value stands above it; by enumeration."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    logp, ref = logits.log_softmax(-1), log_of(REFERENCE)
    chances, ratio = logp.exp().detach(), (logp - logp.detach()).exp()
    term = with_gradient(estimate(logp, ref, name), logp, ref, ratio, "k2")
    assert torch.equal(term.detach(), estimate(logp, ref, name).detach())
    (got,) = torch.autograd.grad((chances * term).sum(), logits)
    assert got.tolist() == pytest.approx(gradient_of_exact_kl(LOGITS, REFERENCE), rel=1e-10)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_off_policy_the_ratio_gradient_is_that_of_the_exact_kl(name: str) -> None:
    """Tokens drawn by an older policy: weighed by the ratio, value and gradient have the exact KL as their mean."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    logp, ref, old = logits.log_softmax(-1), log_of(REFERENCE), log_of(OLD)
    term = with_gradient(estimate(logp, ref, name), logp, ref, (logp - old).exp(), "ratio")
    mean = (old.exp() * term).sum()
    assert float(mean.detach()) == pytest.approx(exact(logp.exp().tolist(), REFERENCE), rel=1e-12)
    (got,) = torch.autograd.grad(mean, logits)
    assert got.tolist() == pytest.approx(gradient_of_exact_kl(LOGITS, REFERENCE), rel=1e-10)


def test_what_the_plain_gradients_are_instead() -> None:
    """On-policy, k1's is 0 and k3's is that of the KL the other way round: sum of q log(q / p)."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    logp, ref = logits.log_softmax(-1), log_of(REFERENCE)
    chances = logp.exp().detach()
    means = [(chances * with_gradient(e(logp, ref), logp, ref, logp.exp(), "plain")).sum() for e in (k1, k3)]
    (zero,) = torch.autograd.grad(means[0], logits, retain_graph=True)
    assert zero.tolist() == pytest.approx([0.0] * 5, abs=1e-15)
    (turned,) = torch.autograd.grad(means[1], logits)
    assert turned.tolist() == pytest.approx([p - q for p, q in zip(chances.tolist(), REFERENCE, strict=True)])


@pytest.mark.parametrize("coefficient", [0.05, 1.0])
@pytest.mark.parametrize("kl", [-3.0, 0.0, 4.0, 5.0, 5.5, 6.0, 7.2, 1000.0])
@pytest.mark.parametrize("samples", [1, 64])
def test_adaptive_coefficient(coefficient: float, kl: float, samples: int) -> None:
    error = max(-0.2, min(0.2, kl / 6.0 - 1))
    got = adapted_coefficient(coefficient, kl, target=6.0, horizon=10_000.0, samples=samples)
    assert got == pytest.approx(coefficient * (1 + error * samples / 10_000), rel=1e-12)
    assert (got > coefficient) == (kl > 6)
    assert (got < coefficient) == (kl < 6)
