"""The scalar head of reward model and critic: one linear unit without bias on the trunk's last hidden state."""

import torch
from torch import nn


def init_scalar_head(head: nn.Linear, *, seed: int) -> None:
    """Weight ~ N(0, 1 / (d + 1)) with 1 / (d + 1) the standard deviation (Stiennon 2020, appendix; InstructGPT)."""
    generator = torch.Generator().manual_seed(seed)
    width = head.in_features
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, width, generator=generator) / (width + 1))


def scalar_head(width: int, *, seed: int) -> nn.Linear:
    """A fresh head for a trunk of that width."""
    head = nn.Linear(width, 1, bias=False)
    init_scalar_head(head, seed=seed)
    return head
