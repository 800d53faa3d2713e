"""Losses over tokens.  Each is a sum over masked tokens divided by the *global* count it is handed.

Shapes: (b, t) unless said; `count` is a scalar tensor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kinkajou.algos.kl import k3


@dataclass(frozen=True)
class Loss:
    """`value` and every metric are sums divided by the global count: they add up over parts and ranks."""

    value: Tensor
    metrics: dict[str, Tensor]


def cross_entropy(logp: Tensor, mask: Tensor, count: Tensor) -> Loss:
    """Mean negative log-likelihood of the masked targets, in nats (Shannon 1948)."""
    return Loss(-(logp * mask).sum() / count, {})


def clipped_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    count: Tensor,
    *,
    low: float,
    high: float,
) -> Loss:
    """PPO's clipped objective (Schulman 2017, eq. 7), bounds 1 - low and 1 + high (Yu 2025, DAPO, eq. 10).

    Metrics: `clip_frac`, the share of tokens whose gradient the clip cuts off; `kl_old`, the k3 estimate of
    KL(old || new) in nats; `ratio`, the mean of new over old probability (1 before the first step).
    """
    log_ratio = (logp - old_logp) * mask
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    value = -(torch.minimum(plain, clipped) * mask).sum() / count
    with torch.no_grad():
        metrics = {
            "clip_frac": ((clipped < plain) * mask).sum() / count,
            "kl_old": (k3(old_logp, logp) * mask).sum() / count,
            "ratio": (ratio * mask).sum() / count,
        }
    return Loss(value, metrics)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, count: Tensor, *, clip: float
) -> Loss:
    """Half squared error, the worse of plain and clipped move (Schulman 2017; Baselines' PPO2 form)."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    value = 0.5 * (torch.maximum(plain, clipped) * mask).sum() / count
    with torch.no_grad():
        clip_frac = ((clipped > plain) * mask).sum() / count
    return Loss(value, {"value_clip_frac": clip_frac})
