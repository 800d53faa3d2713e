"""Linear layers with int8 or 4-bit weights: stored as bitsandbytes stores them, multiplied as the numbers they are.

int8 is one scale for each row, the largest magnitude (SCB) standing for 127 (Dettmers 2022, section 2).  nf4 is one
scale for each block of 64 weights and 16 levels (Dettmers 2023, section 3).  Activations are never rounded: what a
layer computes is the product with the dequantised weight, so an answer does not depend on what runs beside it.
"""

import importlib
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kinkajou.errors import UserError

Bits = Literal[16, 8, 4]
BLOCK = 64
"""Weights that share a scale in nf4."""
ROWS = 32
"""bitsandbytes' product for CPUs with AVX512-BF16 takes whole blocks of a row and a multiple of so many rows."""
MAKERS = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")
"""Loggers that tell of every import and of every product."""


@cache
def library() -> Any:
    """bitsandbytes.  It would ask the hub for code through the package `kernels`: here it does not find that."""
    if sys.platform != "linux":
        raise UserError("int8 and 4-bit weights need Linux", evidence="bitsandbytes is installed there alone")
    with absent("kernels"), quiet():
        try:
            return importlib.import_module("bitsandbytes")
        except ImportError as fault:
            raise UserError(
                "int8 and 4-bit weights need bitsandbytes", evidence=str(fault)[:300], fix="pip install bitsandbytes"
            ) from None


@contextmanager
def absent(name: str) -> Iterator[None]:
    """Inside, that package is not found unless it was imported before."""
    there = name in sys.modules
    if not there:
        sys.modules[name] = cast(Any, None)  # import then says that there is none
    try:
        yield
    finally:
        if not there:
            del sys.modules[name]


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, bitsandbytes does not tell that it casts activations, nor that it found no code on the hub."""
    loggers = [logging.getLogger(name) for name in MAKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Product(torch.autograd.Function):
    """x W^T; the dequantised weight is made again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "QuantisedLinear") -> Tensor:
        ctx.layer = layer
        return x @ layer.dequantised(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dequantised(grads[0].dtype), None


class QuantisedLinear(nn.Linear, ABC):
    """A frozen linear layer; a `transposed` one stands where the model had GPT-2's Conv1D."""

    def __init__(self, weight: Tensor, bias: Tensor | None, shape: tuple[int, int], *, transposed: bool) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.transposed = transposed
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = cast(Any, None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False))

    @abstractmethod
    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in)."""

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """What bitsandbytes keeps of the weight, by the names below the layer's."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            out = cast(Tensor, Product.apply(x, self))  # type: ignore[no-untyped-call]
            return out if bias is None else out + bias
        return nn.functional.linear(x, self.dequantised(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, transposed={self.transposed}"


class Int8Linear(QuantisedLinear):
    """`weight` (out, in) int8; `scb` (out,) float32, the largest magnitude of each row."""

    def __init__(self, weight: Tensor, scb: Tensor, bias: Tensor | None, *, transposed: bool) -> None:
        super().__init__(weight, bias, (weight.shape[0], weight.shape[1]), transposed=transposed)
        self.register_buffer("scb", scb.float())
        self.scb: Tensor

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.weight * (self.scb / 127)[:, None]).to(dtype)

    def stored(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach(), "SCB": self.scb}


class FourBitLinear(QuantisedLinear):
    """`weight` (out in / 2, 1) uint8, two levels a byte; `absmax` (blocks,) float32, each block's largest magnitude."""

    def __init__(
        self,
        weight: Tensor,
        absmax: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
        *,
        transposed: bool,
        kind: str = "nf4",
        block: int = BLOCK,
    ) -> None:
        super().__init__(weight, bias, shape, transposed=transposed)
        self.register_buffer("absmax", absmax.float())
        self.absmax: Tensor
        self.kind, self.block = kind, block

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        library()
        shape = (self.out_features, self.in_features)
        ask = torch.ops.bitsandbytes.dequantize_4bit
        return cast(Tensor, ask(self.weight.detach(), self.absmax, self.block, self.kind, shape, dtype))

    def stored(self) -> dict[str, Tensor]:
        f = library().functional
        state = f.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=f.get_4bit_type(self.kind, device="cpu"),
            blocksize=self.block,
            quant_type=self.kind,
            dtype=torch.float32,
        )
        parts = {f"weight.{name}": x for name, x in state.as_dict(packed=True).items()}
        return {"weight": self.weight.detach(), **parts}


def int8_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> int8 of the same shape, and the largest magnitude of each row; a row of zeros stays zero."""
    scb = weight.abs().amax(1)
    return (weight * (127 / scb.clamp(min=1e-38))[:, None]).round().to(torch.int8), scb


def nf4_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> packed levels (out in / 2, 1), and the largest magnitude of each block."""
    packed, state = library().functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return packed, state.absmax


def matrix_of(layer: nn.Module) -> Tensor:
    """(out, in), whichever way the layer keeps it."""
    weight = cast(Tensor, layer.weight).detach()
    return weight.t().contiguous() if isinstance(layer, Conv1D) else weight


@torch.no_grad()
def quantised_layer(layer: nn.Module, bits: int) -> QuantisedLinear:
    weight, bias = matrix_of(layer).float(), cast(Tensor | None, layer.bias)
    transposed = isinstance(layer, Conv1D)
    if bits == 8:
        return Int8Linear(*int8_of(weight), bias, transposed=transposed)
    shape = (weight.shape[0], weight.shape[1])
    return FourBitLinear(*nf4_of(weight), bias, shape, transposed=transposed)


def fits(layer: nn.Module, bits: int) -> bool:
    rows, columns = matrix_of(layer).shape
    return bits == 8 or (columns % BLOCK == 0 and rows % ROWS == 0)


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """By name: all but a scalar head, and an output embedding that is the input's."""
    inner = cast(Any, module)
    tied = inner.get_input_embeddings().weight
    found = ((name, m) for name, m in module.named_modules() if type(m) in (nn.Linear, Conv1D))
    return {name: m for name, m in found if m.weight is not tied and name != "score"}


def head_name(module: nn.Module) -> str | None:
    """An output embedding of its own."""
    ask = getattr(module, "get_output_embeddings", None)
    head = ask() if ask else None
    return next((name for name, layer in linear_layers(module).items() if layer is head), None)


def quantise(
    module: nn.Module, bits: int, *, head: bool = True, ready: Mapping[str, "QuantisedLinear"] = MappingProxyType({})
) -> list[str]:
    """Quantises the linear layers of a transformers model in place; returns those that keep their weights.

    Before that a feed-forward block of a width that 4 bits cannot take is widened by units that are always 0.
    `ready` are layers that were made already, by name.  UserError where nothing is left that can be quantised.
    """
    if is_quantised(module):
        raise UserError("the model is quantised already", fix="leave --bits out, or take the model it was made from")
    library()
    if bits == 4:
        widen(module)
    layers = linear_layers(module)
    own = head_name(module)
    kept = [name for name, layer in layers.items() if not fits(layer, bits) or (name == own and not head)]
    if len(kept) == len(layers):
        raise UserError(
            f"no layer of this model can have {bits}-bit weights",
            evidence=f"they need inputs that are a multiple of {BLOCK} and outputs that are one of {ROWS}",
            fix="--bits 8",
        )
    for name in layers.keys() - set(kept):
        module.set_submodule(name, ready[name] if name in ready else quantised_layer(layers[name], bits))
    return kept


WIDENED = {
    "llama": ("intermediate_size", ("gate_proj", "up_proj"), "down_proj"),
    "opt": ("ffn_dim", ("fc1",), "fc2"),
    "gpt2": ("n_inner", ("c_fc",), "c_proj"),
}
"""The setting of a feed-forward block's width, the layers that write its units and the one that reads them."""


@torch.no_grad()
def widen(module: nn.Module) -> None:
    """Feed-forward blocks up to a multiple of 64 units: new ones get 0 and send 0, so nothing changes.

    Activations that are 0 at 0 alone: all of these families'.
    """
    config = cast(Any, module).config
    if config.model_type not in WIDENED:
        return
    setting, writers, reader = WIDENED[config.model_type]
    for block in list(module.modules()):
        children = dict(block.named_children())
        if not {*writers, reader} <= children.keys():
            continue
        width = matrix_of(children[reader]).shape[1]
        more = -width % BLOCK
        if not more:
            return
        for name in writers:
            grow(children[name], rows=more)
        grow(children[reader], columns=more)
        setattr(config, setting, width + more)


def grow(layer: nn.Module, *, rows: int = 0, columns: int = 0) -> None:
    """Zeros at the end of outputs and inputs of an nn.Linear or Conv1D."""
    turned = isinstance(layer, Conv1D)
    own = cast(Any, layer)
    size = (0, rows, 0, columns) if turned else (0, columns, 0, rows)
    own.weight = nn.Parameter(nn.functional.pad(own.weight.detach(), size))
    if own.bias is not None and rows:
        own.bias = nn.Parameter(nn.functional.pad(own.bias.detach(), (0, rows)))
    if turned:
        own.nx, own.nf = own.weight.shape
    else:
        own.out_features, own.in_features = own.weight.shape


def is_quantised(module: nn.Module) -> bool:
    return any(isinstance(layer, QuantisedLinear) for layer in module.modules())


@torch.no_grad()
def dequantise(module: nn.Module) -> nn.Module:
    """The module with plain layers of the same numbers; it and its settings know of no quantisation any more."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, QuantisedLinear):
            module.set_submodule(name, plain_layer(layer))
    config = cast(Any, module).config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return module


conv1d: Any = Conv1D


def plain_layer(layer: QuantisedLinear) -> nn.Module:
    weight = layer.dequantised()
    plain: Any = conv1d(layer.out_features, layer.in_features) if layer.transposed else nn.Linear(1, 1)
    plain.weight = nn.Parameter(weight.t().contiguous() if layer.transposed else weight)
    plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
    if not layer.transposed:
        plain.out_features, plain.in_features = weight.shape
    return cast(nn.Module, plain)


def plain_names(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the dequantised weights in place of what the layers keep, as a plain model names them."""
    found = dict(weights)
    for name, layer in module.named_modules():
        if isinstance(layer, QuantisedLinear):
            for part in ("scb", "absmax"):
                found.pop(f"{name}.{part}", None)
            weight = layer.dequantised()
            found[f"{name}.weight"] = weight.t().contiguous() if layer.transposed else weight
    return found
