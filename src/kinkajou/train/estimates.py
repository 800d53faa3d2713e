"""From scores, KL and values to advantages and returns, by the conventions of the settings: numbers in, numbers out."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from kinkajou.algos import advantages, tensors
from kinkajou.algos.groups import group_advantages
from kinkajou.algos.kl import bounded
from kinkajou.config import GRPOConfig, PPOConfig, RLConfig
from kinkajou.parallel.strategy import Strategy


@dataclass(frozen=True)
class Estimates:
    """All (b, t); `value_mask` marks the targets before which the critic is asked."""

    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    value_mask: Tensor


def value_targets(cfg: PPOConfig, mask: Tensor) -> Tensor:
    """Where the critic is asked: before each sampled token and, where the dialect says so, after the last.

    (b, t) bool, whose last column must be free.
    """
    if cfg.numerics.score_at == "after_last":
        return advantages.extended(mask, cfg.rollout.max_new_tokens)
    return mask


def ppo_estimates(
    cfg: PPOConfig, scores: Tensor, kl: Tensor, values: Tensor, mask: Tensor, *, kl_coef: float, s: Strategy
) -> Estimates:
    """Rewards, advantages and returns of PPO.  (b,), (b, t) x 3.  `kl_coef` is 0 where the KL is in the loss."""
    if cfg.algo.advantage == "bandit":
        raw, returns = advantages.bandit(scores, kl, values, mask, kl_coef=kl_coef)
        return Estimates(returns, normalised(cfg, raw, mask, s), returns, advantages.only_first(mask))
    where = value_targets(cfg, mask)
    rewards = advantages.token_rewards(scores, kl, mask, kl_coef=kl_coef, at=advantages.last_target(where))
    if cfg.numerics.whiten_rewards:
        rewards = whitened(cfg, rewards, where, s, keep_mean=True)
    estimate = partial(advantages.gae, rewards, values, where, gamma=cfg.algo.gamma)
    raw, returns = estimate(lam=cfg.algo.lam)
    if cfg.algo.lam_critic is not None:  # decoupled GAE (Yuan 2025, VC-PPO)
        _, returns = estimate(lam=cfg.algo.lam_critic)
    return Estimates(rewards, normalised(cfg, raw, mask, s), returns, where)


def grpo_advantages(
    cfg: GRPOConfig, scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float, s: Strategy
) -> Tensor:
    """Advantages of the critic-free methods.  (b,), (b, t), (b, t) -> (b, t)."""
    compared = partial(
        group_advantages,
        size=cfg.algo.group_size,
        baseline=cfg.algo.baseline,
        scale=cfg.algo.scale,
        variance=cfg.numerics.group_variance,
        eps=cfg.numerics.group_eps,
        all_sum=s.all_sum,
    )
    if cfg.algo.returns == "token":
        gained = bounded(compared(scores), cfg.numerics.score_clip)
        rewards = advantages.token_rewards(gained, kl, mask, kl_coef=kl_coef)
        return normalised(cfg, advantages.rewards_to_go(rewards, mask, gamma=1.0), mask, s)
    return normalised(cfg, compared(scores - kl_coef * (kl * mask).sum(1))[:, None] * mask, mask, s)


def normalised(cfg: RLConfig, raw: Tensor, mask: Tensor, s: Strategy) -> Tensor:
    """Whitened over the step's tokens where the settings say so; 0 off the mask."""
    return whitened(cfg, raw, mask, s) if cfg.numerics.whiten_advantages else raw * mask


def whitened(cfg: RLConfig, x: Tensor, mask: Tensor, s: Strategy, *, keep_mean: bool = False) -> Tensor:
    """By the dialect's convention."""
    how = cfg.numerics
    everyone = s.all_sum if how.whiten_over == "all" else tensors.alone
    return tensors.whiten(
        x, mask, variance=how.whiten_variance, eps=how.whiten_eps, keep_mean=keep_mean, all_sum=everyone
    )
