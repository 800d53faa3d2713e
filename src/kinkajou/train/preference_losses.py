"""From a loss's name and the settings to a number for each pair or answer: the one place that joins both."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kinkajou.algos import dpo, kto, reference_free
from kinkajou.algos.losses import Loss
from kinkajou.config import PreferenceLossConfig


@dataclass(frozen=True)
class Sides:
    """Pairs as their losses read them, chosen first; log-probabilities of whole answers, in nats."""

    logp: Tensor  # (b, 2), weighed by length if ld_alpha says so
    ref_logp: Tensor  # (b, 2), the same
    lengths: Tensor  # (b, 2) targets of the answers
    weight: Tensor  # (b,)
    partners: Tensor  # (b, 3), see PreferenceBatch
    nll: Tensor  # (b,) of the chosen answer
    whole_nll: Tensor  # (b,) of the chosen side with its prompt, where that is scored

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        chosen, rejected = (self.logp - self.ref_logp).unbind(1)
        return chosen, rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean log-probability of a token, chosen and rejected."""
        chosen, rejected = (self.logp / self.lengths).unbind(1)
        return chosen, rejected

    def gap(self, o: PreferenceLossConfig, *, mean: bool = False) -> Tensor:
        """Difference of the implicit scores; `mean`: of the scores per token."""
        scores = dpo.implicit_score(self.logp - self.ref_logp, o.divergence, alpha=o.divergence_alpha)
        chosen, rejected = (scores / self.lengths if mean else scores).unbind(1)
        return chosen - rejected


PairLoss = Callable[[Sides, PreferenceLossConfig], Tensor]


def aot(p: Sides, o: PreferenceLossConfig) -> Tensor:
    gap = p.logp[:, 0] - p.logp[:, 1]
    return dpo.logistic(gap - p.partners[:, 0], beta=o.beta, label_smoothing=o.label_smoothing)


def aot_unpaired(p: Sides, o: PreferenceLossConfig) -> Tensor:
    below, above = p.partners[:, 1], p.partners[:, 2]
    return dpo.aot_unpaired(*p.log_ratios, below, above, beta=o.beta, label_smoothing=o.label_smoothing)


def cpo(p: Sides, o: PreferenceLossConfig) -> Tensor:
    return dpo.logistic(p.logp[:, 0] - p.logp[:, 1], beta=o.beta, label_smoothing=o.label_smoothing)


def simpo(p: Sides, o: PreferenceLossConfig) -> Tensor:
    margin = reference_free.simpo_margin(*p.means, beta=o.beta, gamma=o.simpo_gamma)
    return dpo.logistic(margin, beta=o.beta, label_smoothing=o.label_smoothing)


def alphapo(p: Sides, o: PreferenceLossConfig) -> Tensor:
    chosen, rejected = (reference_free.alpha_score(x, o.alphapo_alpha) for x in p.means)
    margin = reference_free.simpo_margin(chosen, rejected, beta=o.beta, gamma=o.simpo_gamma)
    return dpo.logistic(margin, beta=o.beta, label_smoothing=o.label_smoothing)


EXO_SMOOTHING = 1e-3
"""EXO's own, where none is given: without any its logarithm is infinite (Ji 2024)."""
PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": lambda p, o: dpo.logistic(p.gap(o), beta=o.beta),
    "sigmoid_norm": lambda p, o: dpo.logistic(p.gap(o, mean=True), beta=o.beta),
    "hinge": lambda p, o: dpo.hinge(p.gap(o), beta=o.beta),
    "ipo": lambda p, o: dpo.squared(p.gap(o), beta=o.beta),
    "ipo_mean": lambda p, o: dpo.squared(p.gap(o, mean=True), beta=o.beta),
    "cdpo": lambda p, o: dpo.logistic(p.gap(o), beta=o.beta, label_smoothing=o.label_smoothing),
    "robust": lambda p, o: dpo.robust(p.gap(o), beta=o.beta, label_smoothing=o.label_smoothing),
    "exo_pair": lambda p, o: dpo.exo(p.gap(o), beta=o.beta, label_smoothing=o.label_smoothing or EXO_SMOOTHING),
    "discopop": lambda p, o: dpo.discopop(p.gap(o), beta=o.beta, tau=o.discopop_tau),
    "nca_pair": lambda p, o: dpo.nca(*p.log_ratios, beta=o.beta),
    "bco_pair": lambda p, o: dpo.bco(*p.log_ratios, beta=o.beta),
    "sppo_hard": lambda p, o: dpo.sppo(*p.log_ratios, beta=o.beta),
    "apo_zero": lambda p, o: dpo.apo_zero(*p.log_ratios, beta=o.beta),
    "apo_down": lambda p, o: dpo.apo_down(*p.log_ratios, beta=o.beta),
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "orpo": lambda p, o: reference_free.odds_ratio(*p.means, beta=o.beta),
    "cpo": cpo,
    "cpo_hinge": lambda p, o: dpo.hinge(p.logp[:, 0] - p.logp[:, 1], beta=o.beta),
    "cpo_ipo": lambda p, o: dpo.squared(p.means[0] - p.means[1], beta=o.beta),
    "simpo": simpo,
    "alphapo": alphapo,
}
"""One number for each pair.  `sft` is none of them: it is a mean over tokens alone."""
ROUNDING = 1e-6
"""Relative error of a sum of float32 log-probabilities."""
MEAN_SCORED = {"orpo", "simpo", "cpo_ipo", "sft"}
"""Losses whose score of an answer is the mean log-probability of its tokens."""


def pair_loss(name: str, p: Sides, o: PreferenceLossConfig, count: Tensor) -> Tensor:
    """The named loss, over the whole batch's pairs and tokens.  count (3,): see PreferenceBatch."""
    pairs, answer_targets, whole_targets = count.unbind()
    if name == "sft":
        return p.nll.sum() / answer_targets
    value = (PAIR_LOSSES[name](p, o) * (p.weight if o.use_weighting and name in WEIGHED else 1)).sum() / pairs
    if name == "orpo":
        value = value + p.whole_nll.sum() / whole_targets
    elif name.startswith("cpo") and o.cpo_alpha:
        value = value + o.cpo_alpha * p.nll.sum() / answer_targets
    return value


WEIGHED = PAIR_LOSSES.keys() - MEAN_SCORED - {"cpo", "cpo_hinge", "alphapo", "aot", "aot_unpaired"}
"""What WPO's weights apply to: DPO's family, pair by pair."""


def rewards(p: Sides, o: PreferenceLossConfig) -> Tensor:
    """The implicit reward of each answer by the first loss that has one.  (b, 2)"""
    name = next((name for name, _ in o.terms if name != "sft"), "sft")
    means = torch.stack(p.means, 1)
    if name == "sft":
        return means
    if name == "alphapo":
        return o.beta * reference_free.alpha_score(means, o.alphapo_alpha)
    if name in MEAN_SCORED:
        return o.beta * means
    if name in ("cpo", "cpo_hinge"):
        return o.beta * p.logp
    return o.beta * dpo.implicit_score(p.logp - p.ref_logp, o.divergence, alpha=o.divergence_alpha)


def summed(values: dict[str, Tensor], o: PreferenceLossConfig, metrics: dict[str, Tensor]) -> Loss:
    """The losses by weight; each by its own name too where there are several."""
    value = torch.stack([weight * values[name] for name, weight in o.terms]).sum()
    parts = {f"loss_{name}": x.detach() for name, x in values.items()} if len(values) > 1 else {}
    return Loss(value, {**metrics, **parts})


def won(margin: Tensor, size: Tensor) -> Tensor:
    """1 where the margin is above 0, half where it is the rounding of numbers of that size.  (b,)

    Before the first step the policy is the reference: which side wins there would be chance.
    """
    return 0.5 * (1 + margin.sign() * (margin.abs() > ROUNDING * size))


@torch.no_grad()
def pair_metrics(p: Sides, o: PreferenceLossConfig, pairs: Tensor) -> dict[str, Tensor]:
    """Means over the pairs; `accuracy`: the share whose margin is above 0, a tie half."""
    chosen, rejected = rewards(p, o).unbind(1)
    margin = chosen - rejected
    wins = won(margin, p.logp.abs().sum(1) * o.beta if o.needs_reference else 0 * margin)
    found = {
        "accuracy": wins,
        "margin": margin,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "logp_chosen": p.logp[:, 0],
        "logp_rejected": p.logp[:, 1],
    }
    return {name: x.sum() / pairs for name, x in found.items()}


def judged_loss(
    name: str, logp: Tensor, ref_logp: Tensor, good: Tensor, kl: Tensor, o: PreferenceLossConfig, count: Tensor
) -> Tensor:
    """The named loss of single answers.  (b,) each; count (3,): see JudgedBatch."""
    records, _, good_targets = count.unbind()
    if name == "sft":
        return -(logp * good).sum() / good_targets.clamp(min=1)
    weights = {"beta": o.beta, "desirable": o.desirable_weight, "undesirable": o.undesirable_weight}
    if name == "kto":
        return kto.kto(logp - ref_logp, good, kl, **weights).sum() / records
    return kto.apo_zero_unpaired(logp - ref_logp, good, **weights).sum() / records


@torch.no_grad()
def judged_metrics(
    logp: Tensor, ref_logp: Tensor, good: Tensor, kl: Tensor, o: PreferenceLossConfig, count: Tensor
) -> dict[str, Tensor]:
    """`accuracy`: answers on their side of the reference point; the rest means over good or over bad answers.

    A batch without the one or the other kind has no mean of it, and no margin.
    """
    rewards = o.beta * (logp - ref_logp)
    gain = torch.where(good, 1, -1) * (rewards - o.beta * kl)
    wins = won(gain, o.beta * logp.abs())
    found = {"accuracy": wins.sum() / count[0]}
    kinds = {"chosen": (good, count[1]), "rejected": (~good, count[0] - count[1])}
    kinds = {kind: (which, total) for kind, (which, total) in kinds.items() if total > 0}
    for kind, (which, total) in kinds.items():
        found[f"reward_{kind}"] = (rewards * which).sum() / total
        found[f"logp_{kind}"] = (logp * which).sum() / total
    if len(kinds) == 2:
        found["margin"] = found["reward_chosen"] - found["reward_rejected"]
    if "kto" in o.names:
        found["kl"] = kl.sum() / count[0]
    return found
