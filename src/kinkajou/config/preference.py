"""Settings of learning from preferences without rollouts: DPO's family, KTO, ORPO, CPO, SimPO, AlphaPO."""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from kinkajou.config.groups import DataConfig, ModelConfig, OptimConfig, RunConfig, at_least, require, within
from kinkajou.config.keep import KeepConfig
from kinkajou.config.parallel import ParallelConfig
from kinkajou.errors import UserError, did_you_mean

Reads = Literal["pairs", "judged", "both"]


@dataclass(frozen=True)
class PreferenceLoss:
    """What a loss by name needs: records, a reference, the whole batch at once, and the settings that it reads."""

    options: frozenset[str]
    reads: Reads = "pairs"
    reference: bool = True
    whole_batch: bool = False


def _loss(*options: str, reads: Reads = "pairs", reference: bool = True, whole_batch: bool = False) -> PreferenceLoss:
    own = {"beta", *options} | ({"reference"} if reference else set())
    return PreferenceLoss(frozenset(own), reads, reference, whole_batch)


_DELTA = ("divergence", "divergence_alpha", "ld_alpha", "use_weighting")
_SIDES = ("ld_alpha", "use_weighting")
_WEIGHTS = ("desirable_weight", "undesirable_weight")
PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": _loss(*_DELTA),
    "sigmoid_norm": _loss(*_DELTA),
    "hinge": _loss(*_DELTA),
    "ipo": _loss(*_DELTA),
    "ipo_mean": _loss(*_DELTA),
    "cdpo": _loss(*_DELTA, "label_smoothing"),
    "robust": _loss(*_DELTA, "label_smoothing"),
    "exo_pair": _loss(*_DELTA, "label_smoothing"),
    "discopop": _loss(*_DELTA, "discopop_tau"),
    "nca_pair": _loss(*_SIDES),
    "bco_pair": _loss(*_SIDES),
    "sppo_hard": _loss(*_SIDES),
    "apo_zero": _loss(*_SIDES),
    "apo_down": _loss(*_SIDES),
    "aot": _loss("ld_alpha", "label_smoothing", whole_batch=True),
    "aot_unpaired": _loss("ld_alpha", "label_smoothing", whole_batch=True),
    "sft": PreferenceLoss(frozenset(), reads="both", reference=False),
    "orpo": _loss(reference=False),
    "cpo": _loss("label_smoothing", "cpo_alpha", reference=False),
    "cpo_hinge": _loss("cpo_alpha", reference=False),
    "cpo_ipo": _loss("cpo_alpha", reference=False),
    "simpo": _loss("label_smoothing", "simpo_gamma", reference=False),
    "alphapo": _loss("label_smoothing", "simpo_gamma", "alphapo_alpha", reference=False),
    "kto": _loss(*_WEIGHTS, reads="judged", whole_batch=True),
    "apo_zero_unpaired": _loss(*_WEIGHTS, reads="judged"),
}
_USUAL_BETA = {"simpo": 2.0, "alphapo": 2.0}
"""Of the other losses it is 0.1."""
_SMOOTHED = ("cdpo", "robust")
"""Losses that are `sigmoid` without label smoothing."""


def loss_terms(words: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """Names and weights from words such as `sigmoid` or `0.2*sft`."""
    terms: dict[str, float] = {}
    for word in words:
        weight, _, name = word.replace(" ", "").rpartition("*")
        name = "sigmoid" if name == "dpo" else name  # what the paper of that name proposes
        if name not in PREFERENCE_LOSSES:
            raise UserError(f"unknown loss {name!r}", fix=did_you_mean(name, list(PREFERENCE_LOSSES)))
        if name in terms:
            raise UserError(f"the loss {name!r} is given twice", fix="give it once, with one weight: --loss 0.5*NAME")
        try:
            terms[name] = float(weight or 1)
        except ValueError:
            terms[name] = math.nan
        if not 0 < terms[name] < math.inf:
            raise UserError(f"the weight of the loss {name!r} is not a number above 0", evidence=f"--loss {word}")
    if not terms:
        raise UserError("no loss is given", fix="--loss sigmoid")
    return tuple(terms.items())


@dataclass(frozen=True, kw_only=True)
class PreferenceLossConfig:
    loss: tuple[str, ...] = ("sigmoid",)
    """Name of the loss, `WEIGHT*` before it if not 1; several are summed (`--loss sigmoid --loss 0.2*sft`). With a
    reference: sigmoid, sigmoid_norm, hinge, ipo, ipo_mean, cdpo, robust, exo_pair, discopop, nca_pair, bco_pair,
    sppo_hard, apo_zero, apo_down, aot, aot_unpaired. Without: sft, orpo, cpo, cpo_hinge, cpo_ipo, simpo, alphapo. Of
    single answers (a pair is two): kto, apo_zero_unpaired. docs/numerics.md has the formulas."""
    beta: float = 0.0
    """How strongly the policy is held to the reference, or the scale of its own log-probabilities. 0: the loss's usual
    value, 2 for simpo and alphapo, else 0.1; a sum of losses whose values differ must be given one."""
    reference: str | None = None
    """Folder or hub id of the reference; without it, the model that the training starts from."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Which divergence to the reference the implicit reward belongs to (losses built on its difference)."""
    divergence_alpha: float = 0.5
    """Order of the alpha divergence."""
    label_smoothing: float = 0.0
    """Share of the labels taken for wrong (cdpo, robust, exo_pair, aot, cpo, simpo). exo_pair takes 1e-3 for 0."""
    ld_alpha: float = 1.0
    """Weight of the tokens beyond the shorter answer's length (LD-DPO); 1 counts them in full."""
    use_weighting: bool = False
    """Weigh each pair by how likely the policy would write it (WPO)."""
    discopop_tau: float = 0.05
    """Temperature of DiscoPOP's mix."""
    desirable_weight: float = 1.0
    """Weight of good records (kto, apo_zero_unpaired)."""
    undesirable_weight: float = 1.0
    """Weight of bad records (kto, apo_zero_unpaired)."""
    simpo_gamma: float = 0.5
    """Margin by which the chosen score must win (simpo, alphapo)."""
    alphapo_alpha: float = 0.25
    """Shape of AlphaPO's reward; towards 0 it is SimPO's."""
    cpo_alpha: float = 1.0
    """Weight of the likelihood of the chosen answer in CPO; 0 leaves it out."""

    def __post_init__(self) -> None:
        if isinstance(self.loss, str):
            object.__setattr__(self, "loss", (self.loss,))
        at_least(self, 0, "beta", "desirable_weight", "undesirable_weight", "simpo_gamma", "cpo_alpha")
        at_least(self, 1e-6, "discopop_tau")
        within(self, 0.0, 1.0, "ld_alpha")
        within(self, 0.0, 0.49, "label_smoothing")
        self._check_records()
        self._check_options()
        object.__setattr__(self, "beta", self.beta or self._usual_beta())

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        """(name, weight) of each loss."""
        return loss_terms(self.loss)

    @property
    def reads(self) -> Literal["pairs", "judged"]:
        return "judged" if any(PREFERENCE_LOSSES[name].reads == "judged" for name, _ in self.terms) else "pairs"

    @property
    def needs_reference(self) -> bool:
        return any(PREFERENCE_LOSSES[name].reference for name, _ in self.terms)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.terms)

    def _usual_beta(self) -> float:
        """That of the losses which have one; 0 for none."""
        usual = {name: _USUAL_BETA.get(name, 0.1) for name, _ in self.terms if name != "sft"}
        if len(set(usual.values())) > 1:
            raise UserError(
                "these losses have different usual values of beta, and they share one",
                evidence=", ".join(f"{name} {beta:g}" for name, beta in usual.items()),
                fix="give --beta",
            )
        return max(usual.values(), default=0.0)

    def _check_records(self) -> None:
        kinds = {PREFERENCE_LOSSES[name].reads: name for name in self.names}
        if {"pairs", "judged"} <= set(kinds):
            raise UserError(
                f"the losses {kinds['pairs']!r} and {kinds['judged']!r} cannot be summed",
                evidence=f"{kinds['pairs']} reads pairs, {kinds['judged']} single judged answers",
                fix="choose losses of one kind; sft goes with both",
            )

    def _check_options(self) -> None:
        """A setting that no chosen loss reads is refused, and one that would go unread by some of them too."""
        changed = {item.name for item in fields(self) if getattr(self, item.name) != item.default} - {"loss"}
        for option in sorted(changed):
            deaf = [name for name, _ in self.terms if option not in PREFERENCE_LOSSES[name].options]
            # The divergence, LD and WPO shape every loss of a sum or none: half of them would not add up to a method.
            whole = option in (*_DELTA, "reference") and [name for name in deaf if PREFERENCE_LOSSES[name].reference]
            if whole or len(deaf) == len(self.terms):
                readers = [name for name, loss in PREFERENCE_LOSSES.items() if option in loss.options]
                raise UserError(
                    f"--{option} does nothing for the loss {', '.join(whole or deaf)}",
                    evidence=f"--{option} {getattr(self, option)}",
                    fix=f"leave it out; it belongs to: {', '.join(readers)}",
                )
        if "divergence_alpha" in changed and self.divergence != "alpha":
            raise UserError(
                "--divergence_alpha does nothing for this divergence",
                evidence=f"--divergence {self.divergence}",
                fix="--divergence alpha",
            )
        if not self.label_smoothing and (bare := [name for name in _SMOOTHED if name in self.names]):
            raise UserError(f"the loss {bare[0]!r} needs --label_smoothing", fix="--label_smoothing 0.1")
        if "alphapo" in self.names and not self.alphapo_alpha:
            raise UserError("--alphapo_alpha 0 is SimPO", fix="--loss simpo")


@dataclass(frozen=True, kw_only=True)
class PreferConfig:
    base: ModelConfig = field(default_factory=ModelConfig)
    source: DataConfig = field(default_factory=DataConfig)
    method: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    run: RunConfig = field(default_factory=RunConfig)
    epochs: float = 1
    """Passes over the records."""
    batch_size: int = 32
    """Records in one optimiser step, over all processes: pairs, or single answers for kto."""

    def __post_init__(self) -> None:
        require(self.base, "model")
        require(self.source, "data")
        require(self.run, "output")
        at_least(self, 1, "batch_size")
        at_least(self, 0, "epochs")
        whole = [name for name in self.method.names if PREFERENCE_LOSSES[name].whole_batch]
        if whole and self.batch_size < 2:
            raise UserError(
                f"the loss {whole[0]!r} compares the records of a batch, and there is one in it",
                evidence=f"--batch_size {self.batch_size}",
                fix="--batch_size 2 or more",
            )
