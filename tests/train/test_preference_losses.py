"""Every preference loss by its name against its paper's formula in Python floats, value and gradient.

Each formula below is retyped from the paper (or TRL 1.16 where it departs from it), over token log-probabilities.
"""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from kinkajou.algos import dpo
from kinkajou.config import PreferenceLossConfig
from kinkajou.config.preference import PREFERENCE_LOSSES
from kinkajou.train.preference_losses import PAIR_LOSSES, Sides, judged_loss, pair_loss, pair_metrics, rewards
from kinkajou.train.preference_tasks import partners

B, EPS, TAU, GAMMA, ALPHA, CPO = 0.3, 0.15, 0.7, 0.4, 0.3, 0.6
Rows = list[list[float]]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@dataclass(frozen=True)
class Pair:
    """Token log-probabilities of one pair; `prompt` are the chosen side's prompt tokens."""

    chosen: Sequence[float]
    rejected: Sequence[float]
    ref_chosen: Sequence[float]
    ref_rejected: Sequence[float]
    prompt: Sequence[float]

    @property
    def x(self) -> tuple[float, float]:
        return sum(self.chosen) - sum(self.ref_chosen), sum(self.rejected) - sum(self.ref_rejected)


def delta(p: Pair) -> float:
    return p.x[0] - p.x[1]


def mean_delta(p: Pair) -> float:
    return p.x[0] / len(p.chosen) - p.x[1] / len(p.rejected)


def sums(p: Pair) -> float:
    return sum(p.chosen) - sum(p.rejected)


def means(p: Pair) -> tuple[float, float]:
    return fmean(p.chosen), fmean(p.rejected)


def smoothed(margin: float, eps: float) -> float:
    return -(1 - eps) * log_sigmoid(margin) - eps * log_sigmoid(-margin)


def exo(d: float, eps: float = EPS) -> float:
    win = sigmoid(B * d)
    return win * (math.log(win) - math.log(1 - eps)) + (1 - win) * (math.log(1 - win) - math.log(eps))


def discopop(d: float) -> float:
    share = sigmoid(B * d / TAU)
    return -(1 - share) * log_sigmoid(B * d) + share * math.exp(-B * d)


def orpo(p: Pair) -> float:
    odds = [math.exp(m) / (1 - math.exp(m)) for m in means(p)]
    return -B * log_sigmoid(math.log(odds[0] / odds[1]))


def alphapo(p: Pair) -> float:
    chosen, rejected = ((1 - math.exp(m) ** -ALPHA) / ALPHA for m in means(p))
    return smoothed(B * (chosen - rejected) - GAMMA, EPS)


FORMULAS: dict[str, Callable[[Pair], float]] = {
    "sigmoid": lambda p: -log_sigmoid(B * delta(p)),
    "sigmoid_norm": lambda p: -log_sigmoid(B * mean_delta(p)),
    "hinge": lambda p: max(0.0, 1 - B * delta(p)),
    "ipo": lambda p: (delta(p) - 1 / (2 * B)) ** 2,
    "ipo_mean": lambda p: (mean_delta(p) - 1 / (2 * B)) ** 2,
    "cdpo": lambda p: smoothed(B * delta(p), EPS),
    "robust": lambda p: (-(1 - EPS) * log_sigmoid(B * delta(p)) + EPS * log_sigmoid(-B * delta(p))) / (1 - 2 * EPS),
    "exo_pair": lambda p: exo(delta(p)),
    "discopop": lambda p: discopop(delta(p)),
    "nca_pair": lambda p: -log_sigmoid(B * p.x[0]) - 0.5 * log_sigmoid(-B * p.x[0]) - 0.5 * log_sigmoid(-B * p.x[1]),
    "bco_pair": lambda p: -log_sigmoid(B * p.x[0]) - log_sigmoid(-B * p.x[1]),
    "sppo_hard": lambda p: (p.x[0] - 1 / (2 * B)) ** 2 + (p.x[1] + 1 / (2 * B)) ** 2,
    "apo_zero": lambda p: 1 - sigmoid(B * p.x[0]) + sigmoid(B * p.x[1]),
    "apo_down": lambda p: sigmoid(B * p.x[0]) + 1 - sigmoid(B * delta(p)),
    "orpo": orpo,
    "cpo": lambda p: smoothed(B * sums(p), EPS),
    "cpo_hinge": lambda p: max(0.0, 1 - B * sums(p)),
    "cpo_ipo": lambda p: (means(p)[0] - means(p)[1] - 1 / (2 * B)) ** 2,
    "simpo": lambda p: smoothed(B * (means(p)[0] - means(p)[1]) - GAMMA, EPS),
    "alphapo": alphapo,
}
SETTINGS: dict[str, Any] = {
    "label_smoothing": EPS,
    "discopop_tau": TAU,
    "simpo_gamma": GAMMA,
    "alphapo_alpha": ALPHA,
    "cpo_alpha": CPO,
}


def whole(name: str, pairs: Sequence[Pair]) -> float:
    """The loss of a batch: the mean over pairs, and means over tokens where the method has them."""
    chosen = [-x for p in pairs for x in p.chosen]
    if name == "sft":
        return fmean(chosen)
    if name == "aot":  # sorted against sorted
        policy = sorted(sums(p) for p in pairs)
        ref = sorted(sum(p.ref_chosen) - sum(p.ref_rejected) for p in pairs)
        return fmean(smoothed(B * (a - b), EPS) for a, b in zip(policy, ref, strict=True))
    if name == "aot_unpaired":
        good, bad = (sorted(p.x[i] for p in pairs) for i in (0, 1))
        return fmean(smoothed(B * (a - b), EPS) for a, b in zip(good, bad, strict=True))
    value = fmean(FORMULAS[name](p) for p in pairs)
    if name.startswith("cpo"):
        value += CPO * fmean(chosen)
    if name == "orpo":  # TRL 1.16, orpo_trainer.py: of the prompt too
        value += fmean([*chosen, *(-x for p in pairs for x in p.prompt)])
    return value


def settings(name: str, **more: Any) -> PreferenceLossConfig:
    own = {key: value for key, value in SETTINGS.items() if key in PREFERENCE_LOSSES[name].options}
    beta = {} if name == "sft" else {"beta": B}
    return PreferenceLossConfig(loss=(name,), **{**own, **beta, **more})


def tokens(seed: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)

    def row(n: int) -> list[float]:
        return (-3 * torch.rand(n, generator=generator, dtype=torch.float64) - 0.05).tolist()

    lengths = [(3, 5), (4, 1), (2, 2), (6, 3)]
    return [Pair(row(n), row(m), row(n), row(m), row(2)) for n, m in lengths]


def sides(pairs: Sequence[Pair]) -> tuple[Sides, list[Tensor]]:
    """The same pairs as tensors, and the leaves that gradients are taken of: chosen, rejected, prompt tokens."""
    leaves = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for p in pairs for row in moving(p)]
    chosen, rejected, prompt = leaves[::3], leaves[1::3], leaves[2::3]
    logp = torch.stack([torch.stack([c.sum(), r.sum()]) for c, r in zip(chosen, rejected, strict=True)])
    ref = torch.tensor([[sum(p.ref_chosen), sum(p.ref_rejected)] for p in pairs], dtype=torch.float64)
    lengths = torch.tensor([[len(p.chosen), len(p.rejected)] for p in pairs])
    nll = -torch.stack([c.sum() for c in chosen])
    whole_nll = nll - torch.stack([x.sum() for x in prompt])
    ones = torch.ones(len(pairs), dtype=torch.float64)
    near = partners(torch.cat([logp.detach(), ref], 1))
    return Sides(logp, ref, lengths, ones, near, nll, whole_nll), leaves


def moving(p: Pair) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    return p.chosen, p.rejected, p.prompt


def count(pairs: Sequence[Pair]) -> Tensor:
    answers = sum(len(p.chosen) for p in pairs)
    totals = [len(pairs), answers, answers + sum(len(p.prompt) for p in pairs)]
    return torch.tensor(totals, dtype=torch.float64)


def nudged(pairs: Sequence[Pair], at: int, side: str, token: int, by: float) -> list[Pair]:
    row = list(getattr(pairs[at], side))
    row[token] += by
    return [replace(p, **{side: row}) if i == at else p for i, p in enumerate(pairs)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [name for name, loss in PREFERENCE_LOSSES.items() if loss.reads != "judged"])
def test_value_and_gradient(name: str, seed: int) -> None:
    pairs = tokens(seed)
    made, leaves = sides(pairs)
    value = pair_loss(name, made, settings(name), count(pairs))
    assert value.item() == pytest.approx(whole(name, pairs), rel=1e-12)
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    step, at = 1e-5, 0
    for i, p in enumerate(pairs):
        for side, row in zip(("chosen", "rejected", "prompt"), moving(p), strict=True):
            for token in range(len(row)):
                up, down = (whole(name, nudged(pairs, i, side, token, by)) for by in (step, -step))
                assert grads[at][token].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-9), side
            at += 1


def test_exo_smooths_by_itself_and_nothing_else() -> None:
    """Without a share of its own EXO takes 1e-3 (Ji 2024), and a loss beside it takes none."""
    pairs = tokens(1)
    made, _ = sides(pairs)
    o = PreferenceLossConfig(loss=("exo_pair", "simpo"), beta=B, simpo_gamma=GAMMA)
    assert o.label_smoothing == 0
    want = fmean(exo(delta(p), 1e-3) for p in pairs)
    assert pair_loss("exo_pair", made, o, count(pairs)).item() == pytest.approx(want, rel=1e-12)
    want = fmean(-log_sigmoid(B * (means(p)[0] - means(p)[1]) - GAMMA) for p in pairs)
    assert pair_loss("simpo", made, o, count(pairs)).item() == pytest.approx(want, rel=1e-12)


def test_every_name_has_a_formula_and_stands_in_the_help() -> None:
    source = Path(inspect.getfile(PreferenceLossConfig)).read_text()
    help_text = source.partition("loss: tuple")[2].split('"""')[1]
    assert set(PREFERENCE_LOSSES) <= set(re.findall(r"\w+", help_text))
    pairwise = {name for name, loss in PREFERENCE_LOSSES.items() if loss.reads == "pairs"}
    assert pairwise == PAIR_LOSSES.keys() == FORMULAS.keys() | {"aot", "aot_unpaired"}


@pytest.mark.parametrize("name", [name for name, loss in PREFERENCE_LOSSES.items() if loss.reads == "pairs"])
def test_a_batch_in_parts_and_in_any_order_is_the_same(name: str) -> None:
    pairs = tokens(3)
    o, total = settings(name), count(pairs)
    made, _ = sides(pairs)
    want = pair_loss(name, made, o, total).item()
    parts = 0.0
    for rows in ([2], [0, 3], [1]):
        picked = Sides(*(getattr(made, field)[rows] for field in Sides.__dataclass_fields__))
        parts += pair_loss(name, picked, o, total).item()
    assert parts == pytest.approx(want, rel=1e-12)
    shuffled, _ = sides([pairs[i] for i in (2, 0, 3, 1)])
    assert pair_loss(name, shuffled, o, total).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, math.log(2)) for name in ("sigmoid", "sigmoid_norm", "cdpo", "robust", "aot", "aot_unpaired")),
        ("nca_pair", 2 * math.log(2)),
        ("bco_pair", 2 * math.log(2)),
        ("hinge", 1.0),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("ipo", 1 / (4 * B * B)),
        ("ipo_mean", 1 / (4 * B * B)),
        ("sppo_hard", 1 / (2 * B * B)),
        ("discopop", (math.log(2) + 1) / 2),
    ],
)
def test_at_the_reference(name: str, value: float) -> None:
    same = [replace(p, ref_chosen=p.chosen, ref_rejected=p.rejected) for p in tokens(4)]
    made, _ = sides(same)
    assert pair_loss(name, made, settings(name), count(same)).item() == pytest.approx(value, abs=1e-12)
    found = pair_metrics(made, settings(name), torch.tensor(4.0))
    assert found["accuracy"] == 0.5
    assert found["margin"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop"])
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_divergences_replace_the_log_ratio(name: str, divergence: dpo.Divergence) -> None:
    """Each paper's f'(u), u = policy / reference: 1 - 1 / u, log(2 u / (1 + u)), (u^(a-1) - 1) / (a - 1)."""
    ratio = {
        "forward_kl": lambda u: 1 - 1 / u,
        "js": lambda u: math.log(2 * u / (1 + u)),
        "alpha": lambda u: (u ** (0.4 - 1) - 1) / (0.4 - 1),
    }[divergence]
    pairs = tokens(5)
    scored = [Pair([ratio(math.exp(p.x[0]))], [ratio(math.exp(p.x[1]))], [0.0], [0.0], p.prompt) for p in pairs]
    more = {"divergence_alpha": 0.4} if divergence == "alpha" else {}
    o = settings(name, divergence=divergence, **more)
    made, _ = sides(pairs)
    assert pair_loss(name, made, o, count(pairs)).item() == pytest.approx(whole(name, scored), rel=1e-9)


def test_weights_of_the_policy_count_each_pair() -> None:
    pairs = tokens(6)
    made, _ = sides(pairs)
    weighed = replace(made, weight=torch.tensor([0.2, 1.0, 0.5, 0.7], dtype=torch.float64))
    want = fmean(w * FORMULAS["sigmoid"](p) for w, p in zip((0.2, 1.0, 0.5, 0.7), pairs, strict=True))
    got = pair_loss("sigmoid", weighed, settings("sigmoid", use_weighting=True), count(pairs))
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_metrics_are_of_the_implicit_reward() -> None:
    pairs = tokens(7)
    made, _ = sides(pairs)
    found = pair_metrics(made, settings("sigmoid"), torch.tensor(4.0))
    assert found["margin"].item() == pytest.approx(fmean(B * delta(p) for p in pairs))
    assert found["accuracy"].item() == sum(delta(p) > 0 for p in pairs) / 4
    assert found["reward_chosen"].item() == pytest.approx(fmean(B * p.x[0] for p in pairs))
    assert found["logp_rejected"].item() == pytest.approx(fmean(sum(p.rejected) for p in pairs))
    assert rewards(made, settings("simpo"))[2].tolist() == pytest.approx([B * m for m in means(pairs[2])])
    assert rewards(made, settings("cpo"))[2].tolist() == pytest.approx(
        [B * sum(pairs[2].chosen), B * sum(pairs[2].rejected)]
    )


GOOD = [True, False, True, False, False]


@pytest.mark.parametrize("point", [0.0, 0.8])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_single_answers(name: str, point: float) -> None:
    """KTO: weight x (1 - sigmoid(+-beta (x - z))), the mean over all records; APO: z is 0."""
    z = point if name == "kto" else 0.0
    logp = torch.tensor([-3.0, -2.0, -9.0, -1.0, -6.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-4.0, -2.5, -7.0, -1.5, -6.0], dtype=torch.float64)
    o = settings(name, desirable_weight=1.5, undesirable_weight=0.7)
    good = torch.tensor(GOOD)
    value = judged_loss(name, logp, ref, good, torch.full((5,), point), o, torch.tensor([5.0, 2.0, 9.0]))
    terms, slopes = [], []
    for x, is_good in zip((logp - ref).tolist(), GOOD, strict=True):
        weight, sign = (1.5, 1) if is_good else (0.7, -1)
        s = sigmoid(sign * B * (x - z))
        terms.append(weight * (1 - s))
        slopes.append(-weight * sign * B * s * (1 - s) / 5)
    assert value.item() == pytest.approx(fmean(terms), rel=1e-7)
    (grad,) = torch.autograd.grad(value, logp)
    assert grad.tolist() == pytest.approx(slopes, rel=1e-6)


def test_likelihood_of_good_answers_alone() -> None:
    logp, zero = torch.tensor([-3.0, -2.0, -9.0, -1.0, -6.5]), torch.zeros(5)
    o = PreferenceLossConfig(loss=("kto", "0.5*sft"))
    value = judged_loss("sft", logp, zero, torch.tensor(GOOD), zero, o, torch.tensor([5.0, 2.0, 6.0]))
    assert value.item() == pytest.approx(12 / 6)
