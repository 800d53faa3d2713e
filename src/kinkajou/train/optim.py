"""AdamW over float32 weights, and learning-rate schedules over the whole run."""

import math
from typing import Literal

import torch
from torch import nn

from kinkajou.errors import UserError


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov 2019), betas 0.9 and 0.95; decay on matrices only."""
    names = dict(model.named_parameters())
    if any(not p.is_floating_point() for p in names.values()) and not any(".lora_" in name for name in names):
        raise UserError(
            "quantised weights cannot be trained",
            evidence="the model has int8 or 4-bit weights",
            fix="--lora_rank 8 trains adapters on them; or take the model that they were made from",
        )
    params = [param for param in names.values() if param.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=True)


def lr_at(step: int, total: int, *, peak: float, warmup: float, schedule: Literal["cosine", "constant"]) -> float:
    """Learning rate of step 0..total-1: linear rise over the warm-up's share, then constant or half a cosine.

    The cosine spans the whole run and never rises again.
    """
    rise = math.ceil(warmup * total)
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
