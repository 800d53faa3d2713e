"""Trainers.  Starting one reads and checks its records first, and only then imports torch."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kinkajou import config
from kinkajou.errors import UserError
from kinkajou.train.inputs import records, trace_file
from kinkajou.train.occupied import occupied

TRAINERS = {
    "sft": ("sft", "train_sft"),
    "reward": ("reward", "train_reward"),
    "prefer": ("preference", "train_preference"),
    "ppo": ("ppo", "train_ppo"),
    "grpo": ("grpo", "train_grpo"),
}
"""Module and function of each stage."""


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """A rank whose peer has died says which, instead of the traceback of a collective; one that ends says why."""
    try:
        yield
    except (RuntimeError, UserError) as fault:
        if "kinkajou.parallel.rollcall" not in sys.modules:  # nobody has been met yet
            raise
        from kinkajou.parallel.lost import named, said_last

        if told := named(fault):
            raise told from fault
        said_last(fault)
        raise


def start(stage: str, cfg: config.StageConfig) -> None:
    """A run of its own, or the rest of one that was stopped in the same folder."""
    with naming_lost_ranks(), occupied(stage, cfg) as free:
        if free:
            inputs = records(cfg)
            module, name = TRAINERS[stage]
            getattr(import_module(f"kinkajou.train.{module}"), name)(cfg, inputs)


def start_sft(cfg: config.SFTConfig) -> None:
    start("sft", cfg)


def start_reward(cfg: config.RewardConfig) -> None:
    start("reward", cfg)


def start_ppo(cfg: config.PPOConfig) -> None:
    start("ppo", cfg)


def start_grpo(cfg: config.GRPOConfig) -> None:
    start("grpo", cfg)


def start_prefer(cfg: config.PreferConfig) -> None:
    start("prefer", cfg)


def start_check(cfg: config.StageConfig, show: config.CheckConfig) -> None:
    inputs = records(cfg)
    from kinkajou.train.check_recipe import check

    check(cfg, show, inputs)


def start_profile(cfg: config.StageConfig, show: config.ProfileConfig) -> None:
    target = trace_file(show.trace)
    # Before torch is loaded: the profiler would warn of every tensor that is older than it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    inputs = records(cfg)
    from kinkajou.train.profile import profile

    profile(cfg, show, inputs, target)


def start_plan(cfg: config.StageConfig, show: config.PlanConfig) -> None:
    from kinkajou.train.plan import plan

    plan(cfg, show)


STARTERS = {
    "sft": start_sft,
    "reward": start_reward,
    "prefer": start_prefer,
    "ppo": start_ppo,
    "grpo": start_grpo,
}
