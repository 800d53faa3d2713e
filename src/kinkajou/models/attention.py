"""The one attention function that transformers models call here, for training, scoring and decoding.

It is registered with transformers under NAME.  What attends to what is the business of a `Layout`, an object
handed through `model(..., layout=...)`: packed sequences here, cached decoding in `engine/cache.py`.  So no
padding and no mask tensor ever enters a model.  Shapes: n packed tokens, h query heads, g key heads, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import record_function
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kinkajou.errors import UserError

NAME = "kinkajou"
HALF = (torch.bfloat16, torch.float16)
FLASH_HEAD = 256
"""Largest head size of flash attention."""
STAND_INS: "list[Callable[[Tensor, Tensor, Tensor, Shape], Tensor]]" = []
"""What attends in place of a GPU's kernels while tensors have no data (models/imagined.py); the last of them."""


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
    """Sequences laid end to end, each causal and alone: sequence i is positions bounds[i]..bounds[i+1].

    On a CPU one sequence after the other; on a GPU flash attention over all of them in half precision, and flex
    attention for what that cannot do (float32, alibi, very large heads).
    """

    bounds: tuple[int, ...]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        if STAND_INS:
            return STAND_INS[-1](query, key, value, shape)
        if query.is_cuda:
            plain = shape.slopes is None and query.dtype in HALF and query.shape[-1] <= FLASH_HEAD
            return (self.flash if plain and varlen() else self.flex)(query, key, value, shape)
        return self.one_by_one(query, key, value, shape)

    def flash(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        attention = varlen()
        assert attention is not None
        edges = torch.tensor(self.bounds, dtype=torch.int32).to(query.device, non_blocking=True)
        longest = max(b - a for a, b in pairwise(self.bounds))
        mixed: Tensor = attention(
            *(x[0].transpose(0, 1) for x in (query, key, value)),
            edges,
            edges,
            longest,
            longest,
            scale=shape.scale,
            window_size=(-1 if shape.window is None else shape.window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return mixed.transpose(0, 1)[None]

    def flex(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        lengths = torch.tensor([b - a for a, b in pairwise(self.bounds)])
        owners = torch.arange(len(lengths)).repeat_interleave(lengths).to(query.device)
        return flexed(query, key, value, owners, shape)

    def one_by_one(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        # A loop over sequences beats one block-diagonal mask on a CPU; `split` and not slices, because the
        # backward pass of each slice would fill a tensor of the whole pack (both measured: docs/log.md).
        # In float32: bfloat16's backward pass takes twice as long for sequences of a few hundred tokens.
        wide = torch.promote_types(query.dtype, torch.float32)
        lengths = [b - a for a, b in pairwise(self.bounds)]
        parts = zip(*(torch.split(x.to(wide), lengths, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([causal(q, k, v, shape) for q, k, v in parts], dim=2).to(query.dtype)


@cache
def varlen() -> Callable[..., Any] | None:
    """torch's flash attention over packed sequences, where it has one (2.10 on)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # flex attention is used instead
        return None
    return varlen_attn


@cache
def compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


def flexed(query: Tensor, key: Tensor, value: Tensor, owners: Tensor, shape: Shape) -> Tensor:
    """Causal attention inside each sequence by flex attention (Dong 2024); owners[i] is the sequence of token i."""

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = (owners[q] == owners[k]) & (k <= q)
        return inside if shape.window is None else inside & (k > q - shape.window)

    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert shape.slopes is not None
        return score + shape.slopes[h] * (k - q)

    n = query.shape[2]
    attention = compiled_flex() if query.is_cuda else cast(Callable[..., Any], flex_attention)
    mixed: Tensor = attention(
        query,
        key,
        value,
        score_mod=None if shape.slopes is None else biased,
        block_mask=create_block_mask(seen, None, None, n, n, device=str(query.device)),
        scale=shape.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return mixed


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
    with record_function("kinkajou/attention"):
        return layout.attend(query, key, value, shape).transpose(1, 2), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """transformers' mask interface: the layout knows what is seen, so no mask is built."""


def register() -> None:
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, no_mask)
