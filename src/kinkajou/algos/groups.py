"""Advantages without a critic: scores compared with each other.  Shapes: b samples, groups of g after one another."""

from typing import Literal

import torch
from torch import Tensor

from kinkajou.algos.tensors import Sum, Variance, alone

Baseline = Literal["group_mean", "leave_one_out", "batch_mean", "none"]
Scale = Literal["group", "batch", "none"]


def group_advantages(
    scores: Tensor,
    size: int,
    *,
    baseline: Baseline,
    scale: Scale,
    variance: Variance = "unbiased",
    eps: float = 1e-6,
    all_sum: Sum = alone,
) -> Tensor:
    """(score - baseline) / (standard deviation + eps).  (b,) -> (b,).

    GRPO (Shao 2024, section 4.1.2): the group's mean and deviation; Dr. GRPO (Liu 2025): no scale; RLOO
    (Ahmadian 2024): the mean of the other answers; REINFORCE (Williams 1992): the mean of the step's scores.
    A group whose scores are all equal has advantage exactly 0.
    """
    grouped = scores.float().view(-1, size)
    centred = grouped - baselines(grouped, baseline, all_sum)
    if scale == "group":
        spread = ((grouped - grouped.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True)
        centred = centred / ((spread / max(1, size - (variance == "unbiased"))).sqrt() + eps)
    elif scale == "batch":
        count, total = all_sum(torch.stack([torch.ones_like(grouped).sum(), grouped.sum()])).unbind()
        squares = all_sum(((grouped - total / count) ** 2).sum())
        centred = centred / ((squares / (count - int(variance == "unbiased")).clamp(min=1)).sqrt() + eps)
    if scale == "group" or baseline in ("group_mean", "leave_one_out"):
        # Rounding of the mean must not make a direction out of equal scores.
        centred = centred.masked_fill(zero_spread(grouped)[:, None], 0.0)
    return centred.flatten()


def baselines(grouped: Tensor, kind: Baseline, all_sum: Sum = alone) -> Tensor:
    """What each score is compared with (Shao 2024; Ahmadian 2024; Williams 1992).  (p, g) -> broadcastable to it."""
    if kind == "group_mean":
        return grouped.mean(1, keepdim=True)
    if kind == "leave_one_out":
        return (grouped.sum(1, keepdim=True) - grouped) / (grouped.shape[1] - 1)
    if kind == "batch_mean":
        count, total = all_sum(torch.stack([torch.ones_like(grouped).sum(), grouped.sum()])).unbind()
        return total / count
    return torch.zeros_like(grouped)


def zero_spread(grouped: Tensor) -> Tensor:
    """Groups that teach nothing: all scores equal (Yu 2025, DAPO, section 3.2).  (p, g) -> (p,) bool."""
    return (grouped == grouped[:, :1]).all(1)


def overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """0 up to longest - buffer tokens, then falling linearly to -1 at `longest` (Yu 2025, DAPO, eq. 13).  (b,)."""
    beyond = lengths.float() - (longest - buffer)
    return -(beyond / buffer).clamp(0.0, 1.0)
