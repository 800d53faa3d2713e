"""BLOOM's attention does not go through transformers' attention interface; this shim sends it to our layout."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomModel

from kinkajou.models.attention import Layout, Shape


def install(model: nn.Module) -> None:
    """Replaces the forward of a BLOOM trunk and of its attention blocks, in place; weights are not touched."""
    for module in model.modules():
        if isinstance(module, BloomModel):
            module.forward = MethodType(trunk_forward, module)
        elif isinstance(module, BloomAttention):
            module.forward = MethodType(block_attention, module)  # type: ignore[method-assign]


def trunk_forward(
    self: BloomModel, input_ids: Tensor, *, layout: Layout, **kwargs: Any
) -> BaseModelOutputWithPastAndCrossAttentions:
    """Embedding, blocks, final norm.  The blocks hand their `alibi` on to attention: it carries the layout."""
    hidden = self.word_embeddings_layernorm(self.word_embeddings(input_ids))
    for block in self.h:
        hidden = block(hidden, alibi=layout, attention_mask=None)[0]
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.ln_f(hidden))


def block_attention(
    self: BloomAttention, hidden_states: Tensor, residual: Tensor, alibi: Layout, **kwargs: Any
) -> tuple[Tensor, None]:
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    shape = Shape(
        layer=int(self.layer_idx or 0),
        scale=self.inv_norm_factor,
        slopes=alibi_slopes(self.num_heads).to(hidden_states.device),
    )
    with record_function("kinkajou/attention"):
        mixed = alibi.attend(query, key, value, shape).transpose(1, 2).flatten(2)
    return self.dense(mixed) + residual, None


def alibi_slopes(heads: int) -> Tensor:
    """2^(-8i/h) for a power of two; else the nearest below, then every other one of twice as many.

    (Press 2022, section 3 and the released code's rule for other head counts.)  -> (h,) float32.
    """
    near = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / near) for i in range(1, near + 1)]
    between = [2 ** (-4 * i / near) for i in range(1, 2 * (heads - near), 2)]
    return torch.tensor(slopes + between)
