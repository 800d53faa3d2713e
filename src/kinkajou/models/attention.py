"""The one attention function that transformers models call here, for training, scoring and decoding.

It is registered with transformers under NAME.  What attends to what is the business of a `Layout`, an object
handed through `model(..., layout=...)`: packed sequences here, cached decoding in `engine/cache.py`.  So no
padding and no mask tensor ever enters a model.  Shapes: n packed tokens, h query heads, g key heads, d head size.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kinkajou.errors import UserError

NAME = "kinkajou"


@dataclass(frozen=True)
class Shape:
    """What a layer asks of attention besides its tensors."""

    layer: int
    scale: float
    window: int | None = None  # sliding window in tokens
    slopes: Tensor | None = None  # (h,) alibi slopes, added as slope x distance


class Layout(Protocol):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        """(1, h, n, d), (1, g, n, d), (1, g, n, d) -> (1, h, n, d)."""
        ...


@dataclass(frozen=True)
class Packed:
    """Sequences laid end to end, each causal and alone: sequence i is positions bounds[i]..bounds[i+1]."""

    bounds: tuple[int, ...]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        # A loop over sequences beats one block-diagonal mask on a CPU; `split` and not slices, because the
        # backward pass of each slice would fill a tensor of the whole pack (both measured: docs/log.md).
        lengths = [b - a for a, b in pairwise(self.bounds)]
        parts = zip(*(torch.split(x, lengths, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([causal(q, k, v, shape) for q, k, v in parts], dim=2)


def causal(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
    """Causal attention of one sequence (or a batch of equal length) over itself."""
    length = query.shape[2]
    windowed = shape.window is not None and length > shape.window
    if shape.slopes is None and not windowed:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=shape.scale, enable_gqa=key.shape[1] != query.shape[1]
        )
    at = torch.arange(length, device=query.device)
    return attend_to(query, key, value, at[:, None], at[None, :], shape)


def attend_to(query: Tensor, key: Tensor, value: Tensor, query_at: Tensor, key_at: Tensor, shape: Shape) -> Tensor:
    """Attention with explicit positions: keys after the query or outside the window are not seen.

    Positions broadcast to (.., q, k); alibi adds slope x distance (Press 2022; transformers' slope x key position
    differs by a constant in each row, which softmax ignores, and rounds far positions in bf16).
    """
    seen = key_at <= query_at
    if shape.window is not None:
        seen = seen & (key_at > query_at - shape.window)
    mask: Tensor = seen
    if shape.slopes is not None:
        bias = shape.slopes[:, None, None] * (key_at - query_at)
        mask = bias.masked_fill(~seen, -torch.inf).to(query.dtype)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=shape.scale, enable_gqa=key.shape[1] != query.shape[1]
    )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: heads before time in, time before heads out."""
    if layout is None:
        raise RuntimeError("a model loaded by kinkajou runs through models/forward.py, which hands it a layout")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UserError(
                f"this model's attention uses {name!r}, which kinkajou does not compute",
                fix="use a model without it (GPT-2, OPT, LLaMA, BLOOM, Mistral, Qwen and most others)",
            )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    shape = Shape(layer=int(module.layer_idx), scale=scale, window=sliding_window)  # type: ignore[arg-type]
    return layout.attend(query, key, value, shape).transpose(1, 2), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """transformers' mask interface: the layout knows what is seen, so no mask is built."""


def register() -> None:
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, no_mask)
