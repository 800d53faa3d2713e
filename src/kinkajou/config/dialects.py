"""The one table of numeric conventions: what `--dialect` and, for critic-free methods, `--algorithm` set.

A field whose default is FROM_TABLE takes its value from here unless a flag or a recipe gives one.  Later rows win:
kinkajou, the dialect, the algorithm.  Sources: docs/numerics.md, which shows the rows side by side with measured
differences.  A dialect is a framework's conventions, never its faults.
"""

import dataclasses
from typing import Any, TypeVar

from kinkajou.errors import UserError, did_you_mean

FROM_TABLE: Any = None
"""Default of a field that the table fills."""
C = TypeVar("C")
Row = dict[str, Any]

BOTH: dict[str, Row] = {
    "kinkajou": {
        "score_clip": 0.0,
        "whiten_variance": "biased",
        "whiten_eps": 1e-8,
        "whiten_over": "all",
        "kl_in": "reward",
        "kl_estimator": "k1",
        "kl_gradient": "plain",
        "kl_clamp": 0.0,
        "k3_input_clamp": 0.0,
        "k3_output_clamp": 0.0,
        "clip": 0.2,
        "dual_clip": 0.0,
        "log_ratio_clamp": 0.0,
        "aggregation": "token_mean",
        "epochs": 1,
        "temperature": 1.0,
        "top_k": 0,
        "lr": 1e-5,
        "max_norm": 1.0,
        "overlong_share": 0.0,
        "overlong_penalty": 1.0,
    },
    "trl-1.12": {"whiten_variance": "unbiased", "whiten_over": "rank", "max_norm": float("inf")},
    "openrlhf-0.11": {"score_clip": 10.0, "kl_clamp": 10.0, "log_ratio_clamp": 20.0, "lr": 1e-6},
    "verl-2026.01": {
        "whiten_variance": "unbiased",
        "k3_input_clamp": 20.0,
        "k3_output_clamp": 10.0,
        "dual_clip": 3.0,
        "log_ratio_clamp": 20.0,
        "lr": 1e-6,
    },
    "deepspeed-chat": {"score_clip": 5.0, "lr": 9.65e-6},
    "coati-2023": {
        "kl_estimator": "k3",
        "aggregation": "sequence_mean",
        "top_k": 50,
        "lr": 1e-7,
        "max_norm": float("inf"),
    },
}
PPO: dict[str, Row] = {
    "kinkajou": {
        "score_at": "last",
        "whiten_advantages": True,
        "whiten_rewards": False,
        "kl_coef": 0.05,
        "epochs": 4,
        "advantage": "gae",
        "gamma": 1.0,
        "lam": 0.95,
        "value_clip": 0.2,
        "vf_coef": 0.1,
    },
    "trl-1.12": {"score_at": "after_last", "temperature": 0.7, "lr": 3e-6},
    "openrlhf-0.11": {"kl_coef": 0.01, "lam": 1.0, "value_clip": 0.5, "epochs": 1, "vf_coef": 1.0, "critic_lr": 9e-6},
    "verl-2026.01": {"kl_coef": 0.001, "lam": 1.0, "value_clip": 0.5, "epochs": 1, "vf_coef": 1.0, "critic_lr": 1e-5},
    "deepspeed-chat": {
        "kl_coef": 0.1,
        "whiten_advantages": False,
        "epochs": 1,
        "vf_coef": 1.0,
        "critic_lr": 5e-6,
    },
    "coati-2023": {
        "kl_coef": 0.1,
        "advantage": "bandit",
        "whiten_advantages": False,
        "value_clip": 0.4,
        "epochs": 5,
        "vf_coef": 1.0,
    },
}
GRPO: dict[str, Row] = {
    "kinkajou": {
        "kl_coef": 0.0,
        "kl_in": "loss",
        "kl_estimator": "k3",
        "whiten_advantages": False,
        "group_variance": "unbiased",
        "group_eps": 1e-6,
        "baseline": "group_mean",
        "scale": "group",
        "returns": "sequence",
        "surrogate": "clip",
        "ratio": "token",
        "ratio_cap": 0.0,
        "dynamic_sampling": 0,
        "sapo_tau_positive": 1.0,
        "sapo_tau_negative": 1.05,
        "aggregation": "sequence_mean",
    },
    # TRL's GRPOTrainer and verl take the mean over all tokens by default, whatever the paper says.
    "trl-1.12": {
        "group_eps": 1e-4,
        "kl_gradient": "ratio",
        "aggregation": "token_mean",
        "lr": 1e-6,
        "max_norm": 1.0,
    },
    # OpenRLHF takes the KL per token after the baseline, and what is to come of both.
    "openrlhf-0.11": {
        "group_eps": 1e-9,
        "aggregation": "token_mean",
        "returns": "token",
        "kl_in": "reward",
        "kl_estimator": "k1",
        "kl_coef": 0.01,
    },
    "verl-2026.01": {"group_eps": 1e-6, "aggregation": "token_mean"},
}
"""Dialects without a row have no critic-free methods."""
ALGORITHMS: dict[str, Row] = {
    "grpo": {},
    "dr_grpo": {"scale": "none", "aggregation": "fixed_length", "kl_coef": 0.0},
    "dapo": {
        "kl_coef": 0.0,
        "aggregation": "token_mean",
        "clip": 0.2,
        "clip_high": 0.28,
        "dynamic_sampling": 4,
        "overlong_share": 0.2,
        "overlong_penalty": 1.0,
    },
    "gspo": {
        "ratio": "sequence_mean",
        "aggregation": "sequence_mean",
        "clip": 3e-4,
        "clip_high": 4e-4,
        "dual_clip": 0.0,
    },
    "cispo": {"surrogate": "cispo", "aggregation": "token_mean", "clip_high": 4.0},
    "sapo": {"surrogate": "sapo", "aggregation": "sequence_mean"},
    "rloo": {
        "baseline": "leave_one_out",
        "scale": "none",
        "ratio": "sequence_sum",
        "aggregation": "sequence_mean",
        "kl_in": "reward",
        "kl_estimator": "k1",
        "kl_coef": 0.05,
    },
    "reinforce++": {
        "baseline": "none",
        "scale": "none",
        "returns": "token",
        "whiten_advantages": True,
        "aggregation": "token_mean",
        "kl_in": "reward",
        "kl_estimator": "k1",
        "kl_coef": 0.01,
    },
    "reinforce++_baseline": {
        "baseline": "group_mean",
        "scale": "none",
        "whiten_advantages": True,
        "aggregation": "token_mean",
        "kl_in": "loss",
        "kl_estimator": "k2",
        "kl_coef": 0.001,
    },
    "reinforce_baseline": {
        "baseline": "batch_mean",
        "scale": "none",
        "surrogate": "reinforce",
        "aggregation": "sequence_sum",
    },
}
DIALECTS = tuple(BOTH)


def known_dialect(name: str) -> str:
    """The name itself; UserError for an unknown one."""
    if name not in DIALECTS:
        raise UserError(f"unknown dialect {name!r}", fix=did_you_mean(name, DIALECTS))
    return name


def ppo_row(dialect: str) -> Row:
    """Every convention of PPO in a dialect."""
    name = known_dialect(dialect)
    return BOTH["kinkajou"] | PPO["kinkajou"] | BOTH[name] | PPO[name]


def grpo_row(dialect: str, algorithm: str) -> Row:
    """Every convention of a critic-free method in a dialect."""
    name = known_dialect(dialect)
    if name not in GRPO:
        raise UserError(
            f"dialect {name!r} has no critic-free methods",
            evidence=f"--dialect {name} with kinkajou grpo",
            fix=f"dialects that have them: {', '.join(GRPO)}",
        )
    if algorithm not in ALGORITHMS:
        raise UserError(f"unknown algorithm {algorithm!r}", fix=did_you_mean(algorithm, tuple(ALGORITHMS)))
    return BOTH["kinkajou"] | GRPO["kinkajou"] | BOTH[name] | GRPO[name] | ALGORITHMS[algorithm]


def filled(group: C, row: Row) -> C:
    """The group with the row's values where nothing was given; its own checks run again on them."""
    names = [field.name for field in dataclasses.fields(group)]  # type: ignore[arg-type]
    changes = {name: row[name] for name in names if name in row and getattr(group, name) is FROM_TABLE}
    return dataclasses.replace(group, **changes)  # type: ignore[type-var]
