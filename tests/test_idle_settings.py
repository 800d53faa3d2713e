"""Settings that would do nothing, or do not fit together, are refused; what a run wrote down may be given again."""

from typing import Any

import pytest

from kinkajou.errors import UserError
from test_dialects import EVERY, GIVEN, grpo, ppo

IDLE: list[tuple[str, dict[str, Any], str]] = [
    ("ppo", {"gold": "rule:ended"}, "gold"),
    ("ppo", {"advantage": "bandit", "lam": 0.5}, "lam"),
    ("ppo", {"dialect": "coati-2023", "gamma": 0.9}, "gamma"),
    ("ppo", {"kl_gradient": "k2"}, "kl_gradient"),
    ("ppo", {"k3_output_clamp": 5.0}, "k3_output_clamp"),
    ("ppo", {"backbone": "shared", "critic_lr": 1e-3}, "critic_lr"),
    ("ppo", {"vf_coef": 0.5}, "vf_coef"),
    ("ppo", {"kl_horizon": 500.0}, "kl_horizon"),
    ("ppo", {"ensemble_penalty": 1.0}, "ensemble_penalty"),
    ("ppo", {"rollout_correction": "none", "correction_cap": 3.0}, "correction_cap"),
    ("ppo", {"ptx_batch_size": 4}, "ptx_batch_size"),
    ("grpo", {"algorithm": "cispo", "dual_clip": 3.0}, "dual_clip"),
    ("grpo", {"algorithm": "sapo", "clip_high": 0.3}, "clip_high"),
    ("grpo", {"sapo_tau_positive": 2.0}, "sapo_tau_positive"),
    ("grpo", {"scale": "none", "group_eps": 0.1}, "group_eps"),
    ("grpo", {"whiten_eps": 0.1}, "whiten_eps"),
    ("grpo", {"overlong_penalty": 0.5}, "overlong_penalty"),
]


@pytest.mark.parametrize(("stage", "changes", "name"), IDLE)
def test_a_setting_that_would_do_nothing_is_refused(stage: str, changes: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=f"--{name} would do nothing"):
        {"ppo": ppo, "grpo": grpo}[stage](**changes)


@pytest.mark.parametrize(("stage", "dialect", "algorithm"), EVERY)
def test_resolved_settings_may_be_given_again(stage: str, dialect: str, algorithm: str) -> None:
    """A run's config.toml gives every value, also those that do nothing in it."""
    changes = {"dialect": dialect} | ({"algorithm": algorithm} if algorithm else {})
    made = {"ppo": ppo, "grpo": grpo}[stage]
    found = made(**changes)
    assert made(**{name: value for name, value in found.items() if value is not None and name not in GIVEN}) == found


def test_a_horizon_that_could_turn_the_coefficient_negative_is_refused() -> None:
    with pytest.raises(UserError, match="kl_horizon is so short"):
        ppo(kl_target=6.0, kl_horizon=100.0, prompts_per_step=512)
    assert ppo(kl_target=6.0, kl_horizon=1000.0, prompts_per_step=512)["kl_horizon"] == 1000


def test_tries_that_other_ranks_would_not_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"reward": ("http://127.0.0.1:1/",), "reward_timeout_s": 120.0}
    ppo(**slow)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="would not wait"):
        ppo(**slow)
