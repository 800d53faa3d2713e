"""From one score per sample to one advantage and return per token.  Shapes: b rows, t targets."""

import torch
from torch import Tensor


def last_target(mask: Tensor) -> Tensor:
    """Index of each row's last masked target; 0 for a row without one.  (b, t) -> (b,)."""
    ahead = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
    return ahead.argmax(1)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """-kl_coef x KL on every sampled token, plus the score on the last (Ouyang 2022, eq. 2).

    (b,), (b, t), (b, t) -> (b, t).  The score sits on the last sampled token, the end token when the
    sample has one (OpenRLHF, verl; TRL puts it one position later, docs/numerics.md).
    """
    rewards = -kl_coef * kl * mask
    return rewards.scatter_add(1, last_target(mask)[:, None], scores[:, None].to(rewards))


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
