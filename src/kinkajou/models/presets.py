"""Small architectures to start from scratch by name, one for each family that is proven by tests."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-pico": (
        "llama",
        {
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            # Wider than usual: a narrow model from scratch then learns products of its inputs sooner (docs/log.md).
            "initializer_range": 0.1,
        },
    ),
    "llama-nano": (
        "llama",
        {
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
    ),
    "llama-micro": (
        "llama",
        {
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
    ),
    "llama-tiny": (
        "llama",
        {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
    ),
    "gpt2-tiny": ("gpt2", {"n_embd": 256, "n_layer": 4, "n_head": 4}),
    "opt-tiny": (
        "opt",
        {
            "hidden_size": 256,
            "word_embed_proj_dim": 256,
            "ffn_dim": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
    ),
    "bloom-tiny": ("bloom", {"hidden_size": 256, "n_layer": 4, "n_head": 4}),
}


def preset_config(name: str, *, vocab_size: int, context: int, **tokens: int | None) -> PreTrainedConfig:
    """The architecture of a preset; `context` tokens at most, embeddings tied, `tokens` the special ids."""
    family, shape = PRESETS[name]
    length = {} if family == "bloom" else {"n_positions" if family == "gpt2" else "max_position_embeddings": context}
    return AutoConfig.for_model(family, vocab_size=vocab_size, tie_word_embeddings=True, **shape, **length, **tokens)
