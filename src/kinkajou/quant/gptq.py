"""GPTQ (Frantar 2023): what rounding one column does to a layer's outputs is made good by the columns after it.

The numbers that come of it are stored like any others: int8 by rows, nf4 by blocks of 64.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kinkajou.errors import UserError
from kinkajou.models.forward import PackedModel, pack
from kinkajou.models.quantised import (
    BLOCK,
    FourBitLinear,
    Int8Linear,
    QuantisedLinear,
    fits,
    library,
    linear_layers,
    matrix_of,
)

FIRST = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Layers that read what another one reads; OPT names them k, v, q."""
SHARES = [1 - 0.03 * i for i in range(10)]
DAMP = 0.01
"""Of the mean of the diagonal, added to it."""


def layers(
    module: nn.Module, rows: Sequence[Sequence[int]], bits: int, *, device: torch.device
) -> dict[str, QuantisedLinear]:
    """Every linear layer that can be quantised, by name, fitted to its inputs on these rows.

    Block after block: what a layer is fitted to has gone through the quantised ones before it.
    """
    model = PackedModel(module.to(device))
    wanted = {name: layer for name, layer in linear_layers(module).items() if fits(layer, bits)}
    found: dict[str, QuantisedLinear] = {}
    for group in groups(wanted):
        with moments({name: wanted[name] for name in group}) as seen:
            run(model, rows)
        for name in group:
            found[name] = fitted(wanted[name], seen.pop(name), bits, name=name)
            module.set_submodule(name, found[name])
    for name, layer in wanted.items():
        module.set_submodule(name, layer)
    return found


def groups(wanted: dict[str, nn.Module]) -> list[list[str]]:
    """Layers in the order in which a model runs them; those that read the same input together."""
    found: dict[str, list[str]] = {}
    for name in wanted:
        parent, _, own = name.rpartition(".")
        found.setdefault(f"{parent}.{FIRST.get(own, own)}", []).append(name)
    return list(found.values())


@contextmanager
def moments(wanted: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside, each layer's inputs are summed up: X^T X, (in, in) float32."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            seen[name] = seen.get(name, 0) + x.t() @ x

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in wanted.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(model: PackedModel, rows: Sequence[Sequence[int]]) -> None:
    head = model.inner.get_output_embeddings() if hasattr(model.inner, "get_output_embeddings") else None
    for row in rows:
        tokens = torch.tensor([list(row)], device=model.device)
        packed = pack(tokens, torch.tensor([len(row)], device=model.device))
        hidden = model.hidden(packed.ids, packed.positions, packed.layout)
        if head is not None:
            head(hidden)


@torch.no_grad()
def fitted(layer: nn.Module, moment: Tensor, bits: int, *, name: str) -> QuantisedLinear:
    """The layer, quantised; `moment` is X^T X of its inputs.  UserError where that is not finite."""
    if not moment.isfinite().all():
        raise UserError(
            "the calibration text gives activations that are NaN or infinite",
            evidence=f"in what the layer {name} reads",
            fix="another text, or no --calibrate; a model that gives them for any text is broken",
        )
    weight, bias = matrix_of(layer).float(), cast(Tensor | None, layer.bias)
    turned = isinstance(layer, Conv1D)
    if bits == 8:
        scb = weight.abs().amax(1)
        codes, _ = rounded(weight, moment, lambda block, cost: scb / 127, nearest_int8)
        return Int8Linear(codes.to(torch.int8), scb, bias, transposed=turned)
    levels = library().functional.get_4bit_type("nf4", device=weight.device)
    bounds = (levels[1:] + levels[:-1]) / 2

    def nearest(x: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.bucketize(x, bounds)
        return code, levels[code]

    codes, scales = rounded(weight, moment, lambda block, cost: shrunk(block, cost, nearest), nearest)
    scales = refined(weight, moment, levels[codes], scales)
    flat = codes.to(torch.uint8).flatten()
    packed = (flat[::2] << 4 | flat[1::2])[:, None]
    shape = (weight.shape[0], weight.shape[1])
    return FourBitLinear(packed, scales.flatten(), bias, shape, transposed=turned)


def shrunk(block: Tensor, cost: Tensor, nearest: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """For each row of a block the scale, its largest magnitude or less, of the least error.  (out, n), (n,) -> (out,).

    `cost` of a column is what its squared error counts.
    """
    largest = block.abs().amax(1).clamp(min=1e-38)
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in SHARES:
        scale = largest * share
        error = (nearest(block / scale[:, None])[1] * scale[:, None] - block).square() @ cost
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def refined(weight: Tensor, moment: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Scales of the least error of the outputs once the levels are chosen: block by block, three times over.

    (out, in), (in, in), (out, in), (out, blocks) -> (out, blocks), none below 0.
    """
    scales = scales.clone()
    rest = weight - values * scales.repeat_interleave(BLOCK, 1)
    for number in [*range(scales.shape[1])] * 3:
        part = slice(number * BLOCK, (number + 1) * BLOCK)
        v = values[:, part]
        wanted = ((rest @ moment[:, part]) * v).sum(1)
        step = wanted / ((v @ moment[part, part]) * v).sum(1).clamp(min=1e-20)
        step = torch.maximum(step, -scales[:, number])
        scales[:, number] += step
        rest[:, part] -= step[:, None] * v
    return scales


def nearest_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    code = x.round().clamp(-127, 127)
    return code, code


def rounded(
    weight: Tensor,
    moment: Tensor,
    scale_of: Callable[[Tensor, Tensor], Tensor],
    nearest: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and the scales of each block of 64 columns, (out, blocks).  Frantar 2023, algorithm 1."""
    w, columns = weight.clone(), weight.shape[1]
    upper = inverse_root(moment)
    codes = torch.empty_like(w, dtype=torch.long)
    scales = []
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block = w[:, start:end]
        scale = scale_of(block, upper.diagonal()[start:end] ** -2).clamp(min=1e-38)
        scales.append(scale)
        errors = torch.zeros_like(block)
        for i in range(end - start):
            at = start + i
            code, value = nearest(block[:, i] / scale)
            codes[:, at] = code.long()
            errors[:, i] = (block[:, i] - value * scale) / upper[at, at]
            block[:, i:] -= errors[:, i : i + 1] * upper[at, at:end]
        w[:, end:] -= errors @ upper[start:end, end:]
    return codes, torch.stack(scales, 1)


def inverse_root(moment: Tensor) -> Tensor:
    """The upper triangular U with U^T U = (H + damping)^-1, in float64 while it is made."""
    h = moment.double()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    h.diagonal().add_(DAMP * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return cast(Tensor, torch.linalg.cholesky(inverse, upper=True).float())
