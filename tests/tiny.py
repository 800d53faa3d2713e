"""Tiny models of every family, in pairs: transformers' own and ours with the same weights; and naive references."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from kinkajou.models import attention, bloom

attention.register()
Tokenizer = PreTrainedTokenizerFast
VOCAB, PAD = 97, 96

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GPT2_QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_BLOOM = {"n_layer": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0}

CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, {**_LLAMA, "max_position_embeddings": 64}),
    "gpt2": (GPT2Config, {**_GPT2, **_GPT2_QUIET}),
    "gpt2-inverse-layer": (GPT2Config, {**_GPT2, **_GPT2_QUIET, "scale_attn_by_inverse_layer_idx": True}),
    "opt": (OPTConfig, {**_OPT, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "opt-350m": (
        OPTConfig,
        {**_OPT, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "bloom": (BloomConfig, {**_BLOOM, "hidden_size": 32, "n_head": 4}),
    "bloom-6-heads": (BloomConfig, {**_BLOOM, "hidden_size": 48, "n_head": 6}),
    "mistral": (MistralConfig, {**_LLAMA, "sliding_window": 4}),
    "qwen3": (Qwen3Config, {**_LLAMA, "head_dim": 8}),
    "gemma3": (
        Gemma3TextConfig,
        {**_LLAMA, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
FAMILIES = list(CONFIGS)
FOUR = ["llama", "gpt2", "opt", "bloom"]


def tiny_config(name: str, **changes: object) -> PreTrainedConfig:
    kind, shape = CONFIGS[name]
    return kind(
        **{
            **shape,
            "vocab_size": VOCAB,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "num_labels": 1,
            **changes,
        }
    )


def shake(module: nn.Module, *, seed: int = 0) -> None:
    """Weights far from their initial values, so that no bias is 0, no norm 1 and no distribution flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim < 2:
                param.add_(0.2 * noise)
            else:
                param.copy_(0.25 * noise)


def peer(auto: type, config: PreTrainedConfig, *, seed: int = 0) -> nn.Module:
    """transformers' own model with its own padded attention."""
    module = auto.from_config(config).eval()
    shake(module, seed=seed)
    return module


def ours(auto: type, config: PreTrainedConfig, like: nn.Module) -> nn.Module:
    """The same weights behind our attention."""
    is_bloom = config.model_type == "bloom"
    module = auto.from_config(config, attn_implementation="eager" if is_bloom else attention.NAME).eval()
    module.load_state_dict(like.state_dict())
    if is_bloom:
        bloom.install(module)
    return module


def ragged(lengths: Sequence[int], *, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Right-padded random tokens (b, width) and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, PAD, (len(lengths), width), generator=generator)
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    return tokens.masked_fill(~real, PAD), real


def naive_distribution(logits: Sequence[float], *, temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities by sorting in Python: temper, keep the k largest, then the smallest set that reaches p."""
    heat = temperature or 1.0
    scaled = [x / heat for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = order[:top_k] if 0 < top_k < len(order) else order
    top = scaled[order[0]]
    total = math.fsum(math.exp(scaled[i] - top) for i in kept)
    if top_p < 1:
        nucleus, reached = [], 0.0
        for i in kept:
            if reached >= top_p:
                break
            nucleus.append(i)
            reached += math.exp(scaled[i] - top) / total
        kept = nucleus
        total = math.fsum(math.exp(scaled[i] - top) for i in kept)
    chances = [0.0] * len(scaled)
    for i in kept:
        chances[i] = math.exp(scaled[i] - top) / total
    return chances


def tiny_tokenizer(*, words: int = VOCAB - 2, pad: str | None = "<pad>", end: str | None = "<end>") -> Tokenizer:
    """Whole words w3, w4, ... (w0 stands for the unknown); ids 1 and 2 are <pad> and <end> if they are asked for."""
    vocabulary = {"w0": 0}
    for word in (pad, end, *(f"w{i}" for i in range(3, words + 2))):
        if word:
            vocabulary[word] = len(vocabulary)
    raw = RawTokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0", pad_token=pad, eos_token=end)


def save_source(
    folder: Path, auto: type, name: str, tokenizer: Tokenizer, *, seed: int = 0, **changes: object
) -> nn.Module:
    """A Hugging Face folder as a user would bring it; returns the model in it."""
    config = tiny_config(
        name, **{"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, **changes}
    )
    module = peer(auto, config, seed=seed)
    module.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return module
