"""Trainers.  Starting one reads and checks its records first, and only then imports torch."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kinkajou import config
from kinkajou.errors import UserError
from kinkajou.train.inputs import prefer_inputs, records, reward_inputs, rl_inputs, sft_inputs, trace_file


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


@naming_lost_ranks()
def start_sft(cfg: config.SFTConfig) -> None:
    inputs = sft_inputs(cfg)
    from kinkajou.train.sft import train_sft

    train_sft(cfg, inputs)


@naming_lost_ranks()
def start_reward(cfg: config.RewardConfig) -> None:
    inputs = reward_inputs(cfg)
    from kinkajou.train.reward import train_reward

    train_reward(cfg, inputs)


@naming_lost_ranks()
def start_ppo(cfg: config.PPOConfig) -> None:
    inputs = rl_inputs(cfg)
    from kinkajou.train.ppo import train_ppo

    train_ppo(cfg, inputs)


@naming_lost_ranks()
def start_grpo(cfg: config.GRPOConfig) -> None:
    inputs = rl_inputs(cfg)
    from kinkajou.train.grpo import train_grpo

    train_grpo(cfg, inputs)


@naming_lost_ranks()
def start_prefer(cfg: config.PreferConfig) -> None:
    inputs = prefer_inputs(cfg)
    from kinkajou.train.preference import train_preference

    train_preference(cfg, inputs)


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
