"""From one score per sample to one advantage and return per token.  Shapes: b rows, t targets."""

import torch
from torch import Tensor


def last_target(mask: Tensor) -> Tensor:
    """Index of each row's last masked target; 0 for a row without one.  (b, t) -> (b,)."""
    ahead = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
    return ahead.argmax(1)


def first_target(mask: Tensor) -> Tensor:
    """Index of each row's first masked target; 0 for a row without one.  (b, t) -> (b,)."""
    return mask.float().argmax(1)


def only_first(mask: Tensor) -> Tensor:
    """The mask with each row's first target alone.  (b, t) bool."""
    return mask & (mask.cumsum(1) == 1)


def extended(mask: Tensor, longest: int) -> Tensor:
    """The mask with the position after each row's last target, unless the row has `longest` of them.

    TRL's place of the score (von Werra 2020, `ppo_trainer.py`): the state in which the answer is complete.  (b, t)
    whose last column is free.
    """
    after = (last_target(mask) + 1).clamp(max=mask.shape[1] - 1)
    room = (mask.sum(1) > 0) & (mask.sum(1) < longest)
    return mask.scatter(1, after[:, None], mask.gather(1, after[:, None]) | room[:, None])


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float, at: Tensor | None = None) -> Tensor:
    """-kl_coef x KL on every sampled token, plus the score at one position (Ouyang 2022, eq. 2).

    (b,), (b, t), (b, t) -> (b, t).  `at` (b,) names the position; without it the last sampled token, the end
    token when the sample has one (OpenRLHF, verl; TRL puts it one position later, docs/numerics.md).
    """
    rewards = -kl_coef * kl * mask
    where = last_target(mask) if at is None else at
    return rewards.scatter_add(1, where[:, None], scores[:, None].to(rewards))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns (Schulman 2016, eq. 16).  All (b, t); 0 off the mask.

    Time runs over masked positions only: what the policy did not sample (prompt, tool output, padding) is
    stepped over, and the last sampled token is terminal.
    """
    advantages = torch.zeros_like(values)
    carry = next_value = values.new_zeros(len(values))
    for i in reversed(range(values.shape[1])):
        here = mask[:, i]
        delta = rewards[:, i] + gamma * next_value - values[:, i]
        carry = torch.where(here, delta + gamma * lam * carry, carry)
        next_value = torch.where(here, values[:, i], next_value)
        advantages[:, i] = carry * here
    return advantages, (advantages + values) * mask


def rewards_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Discounted sum of a token's own and later rewards (Williams 1992; Hu 2025, REINFORCE++).  (b, t)."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def bandit(scores: Tensor, kl: Tensor, values: Tensor, mask: Tensor, *, kl_coef: float) -> tuple[Tensor, Tensor]:
    """The whole answer as one action (Coati 2023, its first release): advantage and, at the first target, return.

    reward = score - kl_coef x mean KL over the answer; advantage = reward - value before the first token, the
    same for all tokens.  (b,), (b, t), (b, t) -> (b, t), (b, t).
    """
    first = first_target(mask)[:, None]
    reward = scores[:, None] - kl_coef * (kl * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    advantages = (reward - values.gather(1, first)) * mask
    return advantages, torch.zeros_like(values).scatter(1, first, reward.to(values)) * mask
