"""What is compared: tensors drawn from a seed, and by case the settings of both sides that mean the same."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PAIRS, SAMPLES, GROUP, WIDTH, VOCABULARY = 6, 8, 4, 9, 13
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A loss of TRL's by the attributes of its trainer, and ours by flags."""

    kind: str
    name: str
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> str:
        return {"reward": "scores", "grpo": "policy", "rloo": "policy"}.get(self.kind, "pairs")

    @property
    def trainer(self) -> str:
        return {"reward": "Reward"}.get(self.kind, self.kind.upper()) + "Trainer"

    @property
    def leaf(self) -> str:
        """What the loss is differentiated by."""
        return {"reward": "scores", "orpo": "logits", "cpo": "logits"}.get(self.kind, "logp")


def ragged(generator: torch.Generator, rows: int, *, first: int = 0) -> Tensor:
    """(rows, WIDTH) bool: answers of unequal length, from column `first` on."""
    lengths = torch.randint(1, WIDTH - first + 1, (rows,), generator=generator)
    at = torch.arange(WIDTH) - first
    return (at >= 0) & (at < lengths[:, None])


def pair_tensors() -> Tensors:
    """Rows of TRL's order: all chosen, then all rejected; the first two targets belong to the prompt."""
    generator = torch.Generator().manual_seed(1)
    rows, shape = 2 * PAIRS, (2 * PAIRS, WIDTH)
    mask = ragged(generator, rows, first=2)
    logp = -3 * torch.rand(shape, generator=generator)
    real = torch.arange(WIDTH + 1) < 3 + mask.sum(1, keepdim=True)

    def near(x: Tensor) -> Tensor:
        return x + 0.5 * torch.randn(shape, generator=generator)

    mixed = -3 * torch.rand(shape, generator=generator)
    return {
        "tokens": torch.randint(1, VOCABULARY, (rows, WIDTH + 1), generator=generator) * real,
        "real": real,
        "mask": mask,
        "logp": logp,
        "ref_logp": near(logp),
        "mixed_logp": mixed,
        "mixed_ref_logp": near(mixed) - 0.2,
        "log_sum_sq": -2 * torch.rand(shape, generator=generator),
        "logits": 2 * torch.randn(rows, WIDTH + 1, VOCABULARY, generator=generator),
        "good": torch.rand(rows, generator=generator) < 0.5,
    }


def policy_tensors() -> Tensors:
    """Answers whose ratios fall on both sides of every clip."""
    generator = torch.Generator().manual_seed(2)
    shape = (SAMPLES, WIDTH)
    mask = ragged(generator, SAMPLES)
    old = -3 * torch.rand(shape, generator=generator)

    def near(scale: float) -> Tensor:
        return old + scale * torch.randn(shape, generator=generator)

    return {
        "mask": mask,
        "old_logp": old,
        "logp": near(0.25),
        "ref_logp": near(0.5),
        "advantages": torch.randn(SAMPLES, generator=generator),
        "scores": torch.randn(SAMPLES, generator=generator),
        "values": torch.randn(shape, generator=generator),
        "new_values": torch.randn(shape, generator=generator),
    }


def tensors() -> dict[str, Tensors]:
    scores = torch.randn(2 * PAIRS, generator=torch.Generator().manual_seed(0))
    return {"scores": {"scores": scores}, "pairs": pair_tensors(), "policy": policy_tensors()}


def dpo(name: str, ours: str | None = None, **both: Any) -> Case:
    """A loss of DPO's family: settings that have one name on both sides."""
    shown = "".join(f", {key} {x:g}" for key, x in both.items())
    return Case("dpo", f"DPO {name}{shown}", {"loss_types": [name], **both}, {"loss": ours or name, **both})


def divergence(loss: str, theirs: str, ours: str, alpha: float | None = None) -> Case:
    name = f"DPO {loss}, {ours} divergence" + ("" if alpha is None else f" {alpha:g}")
    own_loss = "ipo_mean" if loss == "ipo" else loss
    if alpha is None:
        order: tuple[dict[str, float], dict[str, float]] = ({}, {})
    else:
        order = ({"f_alpha_divergence_coef": alpha}, {"divergence_alpha": alpha})
    return Case(
        "dpo",
        name,
        {"loss_types": [loss], "f_divergence_type": theirs, **order[0]},
        {"loss": own_loss, "divergence": ours, **order[1]},
    )


DIVERGENCES = (
    ("forward_kl", "forward_kl", None),
    ("js_divergence", "js", None),
    ("alpha_divergence", "alpha", 0.5),
    ("alpha_divergence", "alpha", 1.0),
    ("alpha_divergence", "alpha", 2.0),
)
PREFERENCE = (
    Case("reward", "RM ranking loss", {}, {"loss": "log_sig"}),
    dpo("sigmoid"),
    dpo("hinge", beta=1.0),
    dpo("ipo", "ipo_mean"),
    dpo("robust", label_smoothing=0.1),
    dpo("exo_pair", label_smoothing=0.001),
    dpo("nca_pair"),
    dpo("bco_pair"),
    dpo("sppo_hard"),
    dpo("aot"),
    dpo("aot", label_smoothing=0.1),
    dpo("aot_unpaired"),
    dpo("apo_zero"),
    dpo("apo_down"),
    dpo("sft"),
    dpo("sigmoid_norm"),
    Case("dpo", "DPO discopop", {"loss_types": ["discopop"], "args": {"discopop_tau": 0.05}}, {"loss": "discopop"}),
    *(divergence("sigmoid", theirs, ours, alpha) for theirs, ours, alpha in DIVERGENCES),
    divergence("ipo", "js_divergence", "js"),
    divergence("hinge", "forward_kl", "forward_kl"),
    Case(
        "dpo", "DPO sigmoid, LD 0.5", {"loss_types": ["sigmoid"], "ld_alpha": 0.5}, {"loss": "sigmoid", "ld_alpha": 0.5}
    ),
    Case(
        "dpo",
        "DPO sigmoid, WPO weights",
        {"loss_types": ["sigmoid"], "use_weighting": True},
        {"loss": "sigmoid", "use_weighting": True},
    ),
    Case(
        "dpo",
        "DPO 0.8 x sigmoid + 0.2 x sft (RPO)",
        {"loss_types": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
        {"loss": ("0.8*sigmoid", "0.2*sft")},
    ),
    Case("kto", "KTO", {"loss_type": "kto"}, {"loss": "kto"}),
    Case(
        "kto",
        "KTO, weights 1.3 and 0.9",
        {"loss_type": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.9},
        {"loss": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.9},
    ),
    Case("kto", "KTO apo_zero_unpaired", {"loss_type": "apo_zero_unpaired"}, {"loss": "apo_zero_unpaired"}),
    Case("orpo", "ORPO", {}, {"loss": "orpo"}),
    Case("cpo", "CPO sigmoid", {"loss_type": "sigmoid"}, {"loss": "cpo"}),
    Case(
        "cpo",
        "CPO sigmoid, label smoothing 0.1, no likelihood",
        {"loss_type": "sigmoid", "label_smoothing": 0.1, "cpo_alpha": 0.0},
        {"loss": "cpo", "label_smoothing": 0.1, "cpo_alpha": 0.0},
    ),
    Case("cpo", "CPO hinge", {"loss_type": "hinge"}, {"loss": "cpo_hinge"}),
    Case("cpo", "CPO ipo", {"loss_type": "ipo"}, {"loss": "cpo_ipo"}),
    Case("cpo", "SimPO", {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0}, {"loss": "simpo"}),
    Case(
        "cpo",
        "AlphaPO 0.25",
        {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0, "alpha": 0.25},
        {"loss": "alphapo", "alphapo_alpha": 0.25},
    ),
)
PAPER = {"aggregation": "sequence_mean"}
"""GRPO's own aggregation; TRL's default, and so the dialect's, is DAPO's."""
KL = PAPER | {"kl_coef": 0.04}
POLICY = (
    Case("grpo", "GRPO", {"loss_type": "grpo"}, PAPER),
    Case("grpo", "GRPO, KL k3 in the loss, ratio-weighted", {"loss_type": "grpo", "beta": 0.04}, KL),
    Case(
        "grpo",
        "GRPO, KL k3 in the loss, plain gradient",
        {"loss_type": "grpo", "beta": 0.04, "args": {"use_bias_correction_kl": False}},
        KL | {"kl_gradient": "plain"},
    ),
    Case(
        "grpo",
        "GRPO, two-sided clip (delta 1.3)",
        {"loss_type": "grpo", "args": {"delta": 1.3}},
        PAPER | {"ratio_cap": 1.3},
    ),
    Case("grpo", "BNPO", {"loss_type": "bnpo"}, {"aggregation": "token_mean"}),
    Case("grpo", "Dr. GRPO", {"loss_type": "dr_grpo"}, {"algorithm": "dr_grpo"}),
    Case("grpo", "DAPO", {"loss_type": "dapo", "epsilon_high": 0.28}, {"algorithm": "dapo"}),
    Case(
        "grpo",
        "GSPO",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        {"algorithm": "gspo"},
    ),
    Case(
        "grpo",
        "CISPO (epsilon_high 5 is clip_high 4)",
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"algorithm": "cispo"},
    ),
    Case(
        "grpo",
        "CISPO (epsilon_high 1.2)",
        {"loss_type": "cispo", "epsilon_high": 1.2},
        {"algorithm": "cispo", "clip_high": 0.2},
    ),
    Case("grpo", "SAPO", {"loss_type": "sapo"}, {"algorithm": "sapo"}),
    Case(
        "grpo",
        "LUSPO",
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"ratio": "sequence_mean", "aggregation": "sequence_sum"},
    ),
    Case("rloo", "RLOO", {}, {"algorithm": "rloo", "kl_coef": 0.0}),
)
LOSSES = PREFERENCE + POLICY
