"""Linear layers for decoding on a CPU: weights laid out once as oneDNN reads them, not again in every product.

With few rows a product spends its time on reading weights; torch's own repacks them each time (docs/log.md).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

BUDGET = 2**31
"""Bytes that the second layout of the weights may take; a larger model decodes from its weights as they lie."""


class Repacked:
    """A second layout of a module's linear weights as they are now, for steps of about `rows` tokens."""

    def __init__(self, module: nn.Module, *, rows: int) -> None:
        layers = [layer for layer in module.modules() if type(layer) in (nn.Linear, Conv1D)]
        weights = [cast(Tensor, layer.weight) for layer in layers]
        fits = sum(weight.numel() * weight.element_size() for weight in weights) <= BUDGET
        can = fits and all(weight.device.type == "cpu" for weight in weights) and available({w.dtype for w in weights})
        self.layers = [(layer, repacked(layer, rows)) for layer in layers] if can else []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module's linear layers compute from it here; no gradient flows."""
        for layer, forward in self.layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, _ in self.layers:
                del layer.forward


def available(dtypes: set[Any]) -> bool:
    """torch has the layout for its compiled models, not as public API, so it is asked for by name."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not built or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtypes == {torch.float32} or (
        dtypes == {torch.bfloat16} and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def repacked(layer: nn.Module, rows: int) -> Callable[[Tensor], Tensor]:
    """The layer's forward pass from a copy of its weight."""
    weight, bias = layer.weight.detach(), layer.bias  # type: ignore[operator]
    laid = torch.ops.mkldnn._reorder_linear_weight((weight.t() if type(layer) is Conv1D else weight).contiguous(), rows)
    product = torch.ops.mkldnn._linear_pointwise.default

    def forward(x: Tensor) -> Tensor:
        out: Tensor = product(x, laid, bias, "none", [], "")
        return out

    return forward
