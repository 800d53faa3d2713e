"""Losses over single answers that are known to be good or bad.  Shapes: (b,); `good` is bool."""

import torch
from torch import Tensor


def reference_point(log_ratio: Tensor) -> Tensor:
    """KL of the policy from the reference, estimated on mismatched prompts and answers, never below 0
    (Ethayarajh 2024, KTO, section 4.1).  (n,), the whole batch -> scalar."""
    return log_ratio.mean().clamp(min=0)


def kto(
    log_ratio: Tensor, good: Tensor, kl: Tensor, *, beta: float, desirable: float = 1.0, undesirable: float = 1.0
) -> Tensor:
    """Weight x (1 - value), value sigmoid of the gain over the reference point (Ethayarajh 2024, KTO, eq. 7)."""
    gain = torch.where(good, log_ratio - kl, kl - log_ratio)
    return torch.where(good, desirable, undesirable) * (1 - torch.sigmoid(beta * gain))


def apo_zero_unpaired(
    log_ratio: Tensor, good: Tensor, *, beta: float, desirable: float = 1.0, undesirable: float = 1.0
) -> Tensor:
    """Raises the good, lowers the bad, its reference point 0 (D'Oosterlinck 2024, APO, eq. 7, unpaired)."""
    gain = torch.where(good, log_ratio, -log_ratio)
    return torch.where(good, desirable, undesirable) * torch.sigmoid(-beta * gain)
