"""Weights by the names and in the layouts that llama.cpp reads, of the families that it runs as transformers does."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinkajou.errors import UserError

Shaped = Callable[[Tensor, Any], Tensor]


def as_is(x: Tensor, config: Any) -> Tensor:
    return x


def transposed(x: Tensor, config: Any) -> Tensor:
    """GPT-2 keeps (in, out), llama.cpp reads (out, in); a bias is as it is."""
    return x.T if x.ndim == 2 else x


def rotated(x: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves, as transformers turns them, to pairs, as llama.cpp does: (h d, ...)."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def rotated_query(x: Tensor, config: Any) -> Tensor:
    return rotated(x, config.num_attention_heads)


def rotated_key(x: Tensor, config: Any) -> Tensor:
    return rotated(x, config.num_key_value_heads)


def apart(x: Tensor, config: Any) -> Tensor:
    """BLOOM lays query, key and value of each head together, llama.cpp all queries, all keys, all values."""
    return x.reshape(config.n_head, 3, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


@dataclass(frozen=True)
class Family:
    """Module names to llama.cpp's, and the layout that it wants; `blocks` stands before a layer's number."""

    ends: Mapping[str, str]
    blocks: str
    layer: Mapping[str, tuple[str, Shaped]]


GPT2 = Family(
    {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    "transformer.h.",
    {
        "ln_1": ("attn_norm", as_is),
        "attn.c_attn": ("attn_qkv", transposed),
        "attn.c_proj": ("attn_output", transposed),
        "ln_2": ("ffn_norm", as_is),
        "mlp.c_fc": ("ffn_up", transposed),
        "mlp.c_proj": ("ffn_down", transposed),
    },
)
BLOOM = Family(
    {
        "transformer.word_embeddings": "token_embd",
        "transformer.word_embeddings_layernorm": "token_embd_norm",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    "transformer.h.",
    {
        "input_layernorm": ("attn_norm", as_is),
        "self_attention.query_key_value": ("attn_qkv", apart),
        "self_attention.dense": ("attn_output", as_is),
        "post_attention_layernorm": ("ffn_norm", as_is),
        "mlp.dense_h_to_4h": ("ffn_up", as_is),
        "mlp.dense_4h_to_h": ("ffn_down", as_is),
    },
)
LLAMA = Family(
    {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    "model.layers.",
    {
        "input_layernorm": ("attn_norm", as_is),
        "self_attn.q_proj": ("attn_q", rotated_query),
        "self_attn.k_proj": ("attn_k", rotated_key),
        "self_attn.v_proj": ("attn_v", as_is),
        "self_attn.o_proj": ("attn_output", as_is),
        "post_attention_layernorm": ("ffn_norm", as_is),
        "mlp.gate_proj": ("ffn_gate", as_is),
        "mlp.up_proj": ("ffn_up", as_is),
        "mlp.down_proj": ("ffn_down", as_is),
    },
)
FAMILIES = {"llama": LLAMA, "gpt2": GPT2, "bloom": BLOOM}


def check_architecture(config: Any) -> None:
    """UserError for a model that llama.cpp does not run, or runs otherwise than transformers."""
    kind = config.model_type
    if kind == "opt":
        raise UserError(
            "an OPT model has no GGUF form: llama.cpp does not run OPT",
            fix="--to merged, and a server that reads Hugging Face folders: `kinkajou serve`, vLLM, transformers serve",
        )
    if kind not in FAMILIES:
        raise UserError(
            f"GGUF files are written of {', '.join(FAMILIES)} models, not of {kind}",
            fix="--to merged, and llama.cpp's own convert_hf_to_gguf.py on that folder",
        )
    for name, value, runs in SAME_IN_BOTH[kind]:
        found = getattr(config, name, value)
        if found not in runs:
            raise UserError(
                f"llama.cpp would compute something else than this {kind} model",
                evidence=f"{name} is {found!r} in its config.json; llama.cpp has only {runs[0]!r}",
                fix="--to merged",
            )
    if kind == "llama" and rope(config)["rope_type"] not in ("default", "linear", "llama3"):
        raise UserError(
            "GGUF files are written of models with default, linear or llama3 rotary embeddings",
            evidence=f"rope_type is {rope(config)['rope_type']!r}",
            fix="--to merged",
        )


SAME_IN_BOTH: Mapping[str, tuple[tuple[str, object, tuple[object, ...]], ...]] = {
    "llama": (("hidden_act", "silu", ("silu", "swish")),),
    "gpt2": (
        ("activation_function", "gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
        ("scale_attn_weights", True, (True,)),
        ("scale_attn_by_inverse_layer_idx", False, (False,)),
        ("add_cross_attention", False, (False,)),
    ),
    "bloom": (("apply_residual_connection_post_layernorm", False, (False,)),),
}


def rope(config: Any) -> dict[str, Any]:
    """Rotary settings: rope_type, rope_theta, and what the type adds."""
    found = getattr(config, "rope_parameters", None) or {}
    return {"rope_type": "default", "rope_theta": 10000.0, **found}


def layers(config: Any) -> int:
    return int(config.num_hidden_layers)


def head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def named(config: Any, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names and layouts of all weights; UserError for one that has no place there."""
    family = FAMILIES[config.model_type]
    block = re.compile(re.escape(family.blocks) + r"(\d+)\.(.+)\.(weight|bias)$")
    for name, x in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where there is no output
        stem, _, what = name.rpartition(".")
        if stem in family.ends:
            yield f"{family.ends[stem]}.{what}", x
        elif (found := block.match(name)) and found[2] in family.layer:
            place, shaped = family.layer[found[2]]
            yield f"blk.{found[1]}.{place}.{found[3]}", shaped(x, config)
        else:
            raise UserError(f"llama.cpp has no place for the weight {name} of a {config.model_type} model")
    if config.model_type == "llama" and rope(config)["rope_type"] == "llama3":
        yield "rope_freqs.weight", llama3_factors(config)


def llama3_factors(config: Any) -> Tensor:
    """By what each rotary frequency is divided (Llama 3.1, "llama3" scaling): (d / 2,) float32."""
    said = rope(config)
    width = head_width(config)
    factor, low, high = (float(said[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    known = float(said["original_max_position_embeddings"])
    found = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * float(said["rope_theta"]) ** (i / width)
        between = min(1.0, max(0.0, (known / wavelength - low) / (high - low)))
        found.append(1 / ((1 - between) / factor + between))
    return torch.tensor(found)


def hparams(config: Any) -> dict[str, int | float | str]:
    """Keys below the architecture's name, as llama.cpp's loader reads them."""
    kind = config.model_type
    found: dict[str, int | float | str] = {
        "block_count": layers(config),
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    if kind == "llama":
        said, width = rope(config), head_width(config)
        found |= {
            "context_length": config.max_position_embeddings,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "attention.key_length": width,
            "attention.value_length": width,
            "rope.dimension_count": width,
            "rope.freq_base": float(said["rope_theta"]),
        }
        if said["rope_type"] == "linear":
            found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(said["factor"])}
        return found
    inner = getattr(config, "n_inner", None) or 4 * config.hidden_size
    # BLOOM has no table of positions; the length that it was trained with is a hint to llama.cpp.
    length = config.n_positions if kind == "gpt2" else int(getattr(config, "seq_length", None) or 2048)
    return found | {
        "context_length": length,
        "feed_forward_length": inner,
        "attention.head_count_kv": config.num_attention_heads,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }
