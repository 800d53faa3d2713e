"""Linear layers for decoding on a CPU: weights laid out once as oneDNN reads them, not again in every product.

With few rows a product spends its time on reading weights; torch's own repacks them each time (docs/log.md).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kinkajou.models.quantised import QuantisedLinear

BUDGET = 2**31
"""Bytes that the second layout of the weights may take; a larger model decodes from its weights as they lie."""


SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one block that read the same input: one product serves them all."""
Forward = Callable[[Tensor], Tensor]


class Repacked:
    """A second layout of a module's linear weights as they are now, for steps of about `rows` tokens."""

    def __init__(self, module: nn.Module, *, rows: int) -> None:
        layers = [layer for layer in module.modules() if is_product(layer)]
        self.dtype = compute_dtype(module)
        fits = sum(map(numbers, layers)) * self.dtype.itemsize <= BUDGET
        weights = [cast(Tensor, layer.weight) for layer in layers]
        plain = {weight.dtype for weight in weights if weight.is_floating_point()} | {self.dtype}
        can = fits and all(weight.device.type == "cpu" for weight in weights) and available(plain)
        self.layers: list[tuple[nn.Module, Forward]] = []
        if not can:
            return
        for group in siblings(module):
            self.layers += zip(group, together(group, rows, self.dtype), strict=True)
        done = {id(layer) for layer, _ in self.layers}
        self.layers += [(layer, together([layer], rows, self.dtype)[0]) for layer in layers if id(layer) not in done]

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


def is_product(layer: nn.Module) -> bool:
    """Whether it is a linear layer whose forward pass is its product alone."""
    return type(layer) in (nn.Linear, Conv1D) or isinstance(layer, QuantisedLinear)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """That of norms and biases, which are never quantised."""
    vectors = (param.dtype for param in module.parameters() if param.ndim == 1 and param.is_floating_point())
    return next(vectors, torch.float32)


def is_row_major(layer: nn.Module | None) -> bool:
    return type(layer) is nn.Linear or isinstance(layer, QuantisedLinear)


def matrix(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """(out, in).  Quantised weights as the numbers they stand for, in the compute type."""
    if isinstance(layer, QuantisedLinear):
        return layer.dequantised(dtype)
    weight = cast(Tensor, layer.weight).detach()
    return weight.t() if type(layer) is Conv1D else weight


def numbers(layer: nn.Module) -> int:
    """Weights of its matrix."""
    if isinstance(layer, QuantisedLinear):
        return layer.out_features * layer.in_features
    return cast(Tensor, layer.weight).numel()


def siblings(module: nn.Module) -> list[list[nn.Module]]:
    """Linear layers of a block that are alike but for their number of outputs."""
    found = []
    for parent in module.modules():
        children = dict(parent.named_children())
        for names in SIBLINGS:
            group = [children[name] for name in names if is_row_major(children.get(name))]
            if len(group) == len(names) and len({layer.bias is None for layer in group}) == 1:
                found.append(group)
    return found


def together(layers: list[nn.Module], rows: int, dtype: torch.dtype) -> list[Forward]:
    """The layers' forward passes from a copy of their weights: the first computes for all that get the same input."""
    weights = [matrix(layer, dtype) for layer in layers]
    weight = torch.cat(weights)
    biases = [cast(Tensor | None, layer.bias) for layer in layers]
    bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None]).detach()
    laid = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    product = torch.ops.mkldnn._linear_pointwise.default
    if len(layers) == 1:
        return [lambda x: cast(Tensor, product(x, laid, bias, "none", [], ""))]
    sizes = [w.shape[0] for w in weights]
    kept: list[tuple[Tensor, tuple[Tensor, ...]]] = []

    def forward_of(i: int) -> Forward:
        def forward(x: Tensor) -> Tensor:
            if not kept or kept[0][0] is not x:
                kept[:] = [(x, product(x, laid, bias, "none", [], "").split(sizes, -1))]
            out = kept[0][1][i]
            if i + 1 == len(layers):
                kept.clear()
            return out

        return forward

    return [forward_of(i) for i in range(len(layers))]
