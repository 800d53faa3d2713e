"""A moving average of the policy's weights (Polyak 1992), kept beside it and saved as a model of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class MovingAverage:
    """average = decay x average + (1 - decay) x weights, after each step; of the weights that are trained."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.weights = {name: param.detach().clone() for name, param in self._trained()}

    @torch.no_grad()
    def follow(self) -> None:
        for name, param in self._trained():
            self.weights[name].lerp_(param, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; its own come back."""
        own = {name: param.detach().clone() for name, param in self._trained()}
        self._load(self.weights)
        try:
            yield
        finally:
            self._load(own)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, param) for name, param in self.model.named_parameters() if param.requires_grad)

    @torch.no_grad()
    def _load(self, weights: dict[str, torch.Tensor]) -> None:
        for name, param in self._trained():
            param.copy_(weights[name])
