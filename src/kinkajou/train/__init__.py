"""Trainers.  Starting one reads and checks its records first, and only then imports torch."""

from kinkajou import config
from kinkajou.train.inputs import ppo_inputs, reward_inputs, sft_inputs


def start_sft(cfg: config.SFTConfig) -> None:
    inputs = sft_inputs(cfg)
    from kinkajou.train.sft import train_sft

    train_sft(cfg, inputs)


def start_reward(cfg: config.RewardConfig) -> None:
    inputs = reward_inputs(cfg)
    from kinkajou.train.reward import train_reward

    train_reward(cfg, inputs)


def start_ppo(cfg: config.PPOConfig) -> None:
    inputs = ppo_inputs(cfg)
    from kinkajou.train.ppo import train_ppo

    train_ppo(cfg, inputs)


STARTERS = {"sft": start_sft, "reward": start_reward, "ppo": start_ppo}
