"""Losses over tokens.  Each is a sum over masked tokens divided by the *global* count it is handed.

Shapes: (b, t) unless said; `count` is a scalar tensor, or for a policy's losses (2,): tokens and samples.  An objective
gives the loss of each token; `aggregated` makes one number of them.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kinkajou.algos.kl import bounded

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "fixed_length"]
Level = Literal["token", "sequence_mean", "sequence_sum"]


@dataclass(frozen=True)
class Loss:
    """`value` and every metric are sums divided by the global count: they add up over parts and ranks."""

    value: Tensor
    metrics: dict[str, Tensor]


def cross_entropy(logp: Tensor, mask: Tensor, count: Tensor) -> Loss:
    """Mean negative log-likelihood of the masked targets, in nats (Shannon 1948)."""
    return Loss(-(logp * mask).sum() / count, {})


def aggregated(terms: Tensor, mask: Tensor, count: Tensor, how: Aggregation, *, longest: int = 1) -> Tensor:
    """One number from a loss for each token.  count (2,): tokens and samples of the whole minibatch.

    token_mean: over all tokens (Yu 2025, DAPO, eq. 8); sequence_mean: over answers of their token means (Shao 2024, eq.
    3); sequence_sum: over answers of their sums (Williams 1992); fixed_length: over answers of sum / `longest`, a
    constant in place of their own length (Liu 2025, Dr. GRPO).
    """
    tokens, samples = count.unbind()
    if how == "sequence_mean":
        return ((terms * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / samples
    total = (terms * mask).sum()
    return total / {"token_mean": tokens, "sequence_sum": samples, "fixed_length": samples * longest}[how]


def importance_ratio(
    logp: Tensor, old_logp: Tensor, mask: Tensor, level: Level = "token", *, clamp: float = 0.0
) -> Tensor:
    """New over old probability of each token, (b, t), or one for the answer, (b, 1).

    token (Schulman 2017, eq. 6), its log within [-clamp, clamp] unless 0 (verl and OpenRLHF, 20); sequence_mean: the
    geometric mean over the answer (Zheng 2025, GSPO, eq. 7); sequence_sum: the product (Ahmadian 2024, RLOO).
    """
    log_ratio = (logp - old_logp) * mask
    if level == "token":
        return bounded(log_ratio, clamp).exp()
    total = log_ratio.sum(1, keepdim=True)
    if level == "sequence_mean":
        total = total / mask.sum(1, keepdim=True).clamp(min=1)
    return bounded(total, clamp).exp()


def clipped_objective(
    ratio: Tensor, advantages: Tensor, *, low: float, high: float, dual_clip: float = 0.0, cap: float = 0.0
) -> Tensor:
    """PPO's clipped loss of each token (Schulman 2017, eq. 7), bounds 1 - low and 1 + high (Yu 2025, DAPO, eq. 10).

    `dual_clip` c bounds the loss by -c x A where A < 0 (Ye 2020); `cap` bounds the unclipped ratio (Prime
    Intellect 2025, INTELLECT-2: two-sided clipping).  0: neither.
    """
    capped = ratio.clamp(max=cap) if cap else ratio
    loss = torch.maximum(-capped * advantages, -ratio.clamp(1 - low, 1 + high) * advantages)
    if dual_clip:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def clipped_away(
    ratio: Tensor, advantages: Tensor, *, low: float, high: float, dual_clip: float = 0.0, cap: float = 0.0
) -> Tensor:
    """Tokens whose gradient the bounds of `clipped_objective` cut off (Schulman 2017, eq. 7; Ye 2020).  -> bool."""
    good = min(1 + high, cap or math.inf)
    bad = min(max(1 + high, cap) if cap else math.inf, dual_clip or math.inf)
    return torch.where(advantages > 0, ratio > good, ((ratio < 1 - low) | (ratio > bad)) & (advantages < 0))


def cispo_objective(ratio: Tensor, logp: Tensor, advantages: Tensor, *, high: float) -> Tensor:
    """REINFORCE weighted by the ratio, cut at 1 + high and without gradient (MiniMax 2025, M1, eq. 4 and 5)."""
    return -ratio.detach().clamp(max=1 + high) * advantages * logp


def sapo_objective(ratio: Tensor, advantages: Tensor, *, tau_positive: float, tau_negative: float) -> Tensor:
    """A soft gate in place of the clip: 4 / tau x sigmoid(tau (ratio - 1)) x A (Gao 2025, SAPO)."""
    tau = torch.where(advantages > 0, tau_positive, tau_negative)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages


def reinforce_objective(logp: Tensor, advantages: Tensor) -> Tensor:
    """-A x log-probability (Williams 1992): the policy gradient, on-policy."""
    return -advantages * logp


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, count: Tensor, *, clip: float
) -> Loss:
    """Half squared error, the worse of plain and clipped move (Schulman 2017; Baselines' PPO2 form); clip 0: plain."""
    near = values.clamp(old_values - clip, old_values + clip) if clip else values  # exactly `values` inside the bounds
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    value = 0.5 * (torch.maximum(plain, clipped) * mask).sum() / count
    with torch.no_grad():
        clip_frac = ((clipped > plain) * mask).sum() / count
    return Loss(value, {"value_clip_frac": clip_frac})


def importance_correction(
    logp: Tensor, sampler_logp: Tensor, mask: Tensor, how: Literal["truncate", "mask", "sequence_mask"], *, cap: float
) -> Tensor:
    """Weights for tokens that were drawn with other probabilities than the trainer's.  (b, t), 1 off the mask.

    truncate: min(ratio, cap) (Ionides 2008; Yao 2025, "Your efficient RL framework secretly brings you off-policy
    RL training"); mask: ratio within [1 / cap, cap], else 0 (Ling Team 2025, IcePop); sequence_mask: the answer's
    whole ratio where it is at most `cap`, else 0 (Liu 2025, "When speed kills stability").
    """
    log_ratio = (logp - sampler_logp) * mask
    if how == "truncate":
        return log_ratio.exp().clamp(max=cap)
    if how == "mask":
        ratio = log_ratio.exp()
        return torch.where((ratio <= cap) & (ratio >= 1 / cap), ratio, 0.0)
    whole = log_ratio.sum(1, keepdim=True).exp()
    return torch.where(mask, torch.where(whole <= cap, whole, 0.0), 1.0)
