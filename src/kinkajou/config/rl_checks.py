"""Settings of reinforcement learning that do not fit together, or would do nothing: refused before anything is read."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from kinkajou.errors import UserError

RANKS_WAIT_S = 600
"""How long a process waits for the others (parallel/strategy.py)."""


def check_judges(cfg: Any) -> None:
    judge = cfg.judge
    judge.require()
    if judge.keep_best != "none" and not (judge.eval_prompts and cfg.run.eval_every):
        raise UserError("keep_best needs held-out prompts", fix="give --eval_prompts and --eval_every")
    if judge.keep_best == "gold" and not judge.gold:
        raise UserError("keep_best is 'gold' but there is no gold judge", fix="give --gold")
    longest = judge.reward_timeout_s * (judge.reward_retries + 1) * 1.5  # the pauses between tries included
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and longest > RANKS_WAIT_S and any("://" in spec for spec in judge.reward):
        raise UserError(
            "the other processes would not wait for a reward service that long",
            evidence=f"up to {longest:.0f} s of tries, they wait {RANKS_WAIT_S} s",
            fix="lower --reward_timeout_s or --reward_retries",
        )


def check_engine(cfg: Any) -> None:
    """What cannot be sampled elsewhere, or ahead of the trainer."""
    if cfg.engine.rollout == "ray" and cfg.parallel.tp > 1:
        raise UserError(
            "Ray rollouts do not go with tensor parallel",
            evidence=f"--rollout ray, --tp {cfg.parallel.tp}",
            fix="--tp 1 with --strategy zero3, or --rollout local",
        )
    if cfg.engine.max_staleness and getattr(cfg.algo, "dynamic_sampling", 0):
        raise UserError(
            "dynamic sampling decides in each step which prompts come next, so none can be sampled ahead",
            evidence=f"--dynamic_sampling {cfg.algo.dynamic_sampling}, --max_staleness {cfg.engine.max_staleness}",
            fix="--max_staleness 0, or --dynamic_sampling 0",
        )


def check_adaptive(cfg: Any, samples: int) -> None:
    """The controller moves the coefficient by at most 0.2 x samples / horizon of itself a step (Ziegler 2019)."""
    if cfg.kl.kl_target is None:
        return
    if not cfg.kl.kl_coef > 0:
        raise UserError("an adaptive KL starts from kl_coef, which is 0", fix="give --kl_coef 0.05, say")
    if 0.2 * samples >= cfg.kl.kl_horizon:
        raise UserError(
            "kl_horizon is so short that one step could turn the KL coefficient negative",
            evidence=f"{samples} samples a step, horizon {cfg.kl.kl_horizon:g}",
            fix=f"--kl_horizon {2 * samples} at least; 10000 is usual",
        )


Works = Callable[[Any], bool]
"""Whether a setting does anything, from the resolved config."""


def _gae(cfg: Any) -> bool:
    return bool(cfg.algo.advantage == "gae")


def _k3(cfg: Any) -> bool:
    return bool(cfg.kl.kl_estimator == "k3")


def _corrects(cfg: Any) -> bool:
    return bool(cfg.rollout.rollout_correction != "none")


def _whitens(cfg: Any) -> bool:
    return bool(cfg.numerics.whiten_advantages or getattr(cfg.numerics, "whiten_rewards", False))


def _surrogate(*kinds: str) -> Works:
    return lambda cfg: getattr(cfg.surrogate, "surrogate", "clip") in kinds


IDLE: dict[str, tuple[Works, str]] = {
    "gold": (lambda cfg: bool(cfg.judge.eval_prompts), "there are no --eval_prompts for it to score"),
    "ensemble_penalty": (
        lambda cfg: any("ensemble:" in spec for spec in (*cfg.judge.reward, cfg.judge.gold or "")),
        "no --reward is an ensemble",
    ),
    "gamma": (_gae, "--advantage is bandit"),
    "lam": (_gae, "--advantage is bandit"),
    "lam_critic": (_gae, "--advantage is bandit"),
    "critic_lr": (lambda cfg: cfg.algo.backbone == "separate", "--backbone shared has one learning rate"),
    "vf_coef": (lambda cfg: cfg.algo.backbone == "shared", "it weighs the critic's loss on a shared trunk only"),
    "kl_horizon": (lambda cfg: cfg.kl.kl_target is not None, "there is no --kl_target"),
    "kl_gradient": (lambda cfg: cfg.kl.kl_in == "loss", "--kl_in is reward"),
    "k3_input_clamp": (_k3, "--kl_estimator is not k3"),
    "k3_output_clamp": (_k3, "--kl_estimator is not k3"),
    "clip": (_surrogate("clip"), "this --surrogate has no clip"),
    "clip_high": (_surrogate("clip", "cispo"), "this --surrogate has no clip"),
    "dual_clip": (_surrogate("clip"), "this --surrogate has no clip"),
    "ratio_cap": (_surrogate("clip"), "this --surrogate has no clip"),
    "sapo_tau_positive": (_surrogate("sapo"), "--surrogate is not sapo"),
    "sapo_tau_negative": (_surrogate("sapo"), "--surrogate is not sapo"),
    "correction_bound": (_corrects, "--rollout_correction is none"),
    "correction_cap": (_corrects, "--rollout_correction is none"),
    "group_variance": (lambda cfg: cfg.algo.scale != "none", "--scale is none"),
    "group_eps": (lambda cfg: cfg.algo.scale != "none", "--scale is none"),
    "whiten_variance": (_whitens, "nothing is whitened"),
    "whiten_eps": (_whitens, "nothing is whitened"),
    "whiten_over": (_whitens, "nothing is whitened"),
    "overlong_penalty": (lambda cfg: cfg.shaping.overlong_share > 0, "--overlong_share is 0"),
    "ptx_batch_size": (lambda cfg: cfg.ptx.ptx_coef > 0, "--ptx_coef is 0"),
}
"""Setting -> when it does something, and why it otherwise does not."""


def refuse_idle(cfg: Any, row: dict[str, Any]) -> None:
    """Refuses a setting that differs from its default and would do nothing in this run."""
    for item in dataclasses.fields(cfg):
        group = getattr(cfg, item.name)
        if not dataclasses.is_dataclass(group):
            continue
        for setting in dataclasses.fields(group):
            name, value = setting.name, getattr(group, setting.name)
            usual = row.get(name, setting.default)
            if name in IDLE and value != usual and not IDLE[name][0](cfg):
                raise UserError(
                    f"--{name} would do nothing: {IDLE[name][1]}",
                    evidence=f"--{name} {value}",
                    fix=f"leave --{name} out, or change the other setting",
                )
