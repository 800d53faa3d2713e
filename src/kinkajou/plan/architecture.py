"""Sizes of a model from its settings: its parameters are counted, not built."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kinkajou.errors import UserError

GATED = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*GATED, "gpt2", "opt", "bloom")


@dataclass(frozen=True)
class Architecture:
    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    positions: int = 0  # rows of a learned table of positions
    embedded: int = 0  # width of the embedding where it is another one (OPT-350M), else `width`
    tied: bool = True

    @property
    def attended(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.head_size

    @property
    def keyed(self) -> int:
        """Channels of all key heads."""
        return self.kv_heads * self.head_size

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of each linear layer of a block."""
        c, f, q, g = self.width, self.inner, self.attended, self.keyed
        if self.family in ("gpt2", "bloom"):
            return [(c, 3 * c), (c, c), (c, f), (f, c)]
        if self.family == "opt":
            return [(c, c)] * 4 + [(c, f), (f, c)]
        return [(c, q), (c, g), (c, g), (q, c), (c, f), (c, f), (f, c)]

    @property
    def block(self) -> int:
        """Parameters of one layer."""
        found = sum(a * b for a, b in self.matrices)
        if self.family in GATED:
            found += 2 * self.width  # root mean square norms have no shift
            found += self.attended + 2 * self.keyed if self.family == "qwen2" else 0
            return found + (2 * self.head_size if self.family == "qwen3" else 0)
        return found + sum(b for _, b in self.matrices) + 4 * self.width

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding."""
        return self.vocabulary * (self.embedded or self.width)

    @property
    def looked_up(self) -> int:
        """Parameters that are only ever looked up: positions, and tokens unless the head shares them."""
        return self.positions * self.width + (0 if self.tied else self.embedding)

    @property
    def head(self) -> int:
        """Parameters of a head of its own."""
        return 0 if self.tied else self.embedding

    @property
    def outer(self) -> int:
        """Parameters outside the blocks, the language head included."""
        norms = {"gpt2": 2, "opt": 0 if self.embedded else 2, "bloom": 4}.get(self.family, 1) * self.width
        between = 2 * self.embedded * self.width
        return self.embedding + self.head + self.positions * self.width + norms + between

    @property
    def parameters(self) -> int:
        return self.outer + self.layers * self.block

    @property
    def scalar(self) -> int:
        """Parameters with a scalar head in place of the language head."""
        return self.parameters - self.head + (self.embedded or self.width)

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA on every linear layer of the blocks."""
        return self.layers * sum(rank * (a + b) for a, b in self.matrices)


SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "n_embd", "n_layer", "n_head", "n_inner", "ffn_dim", "word_embed_proj_dim"),
)
"""Entries of a config.json that count something."""


def read(settings: Mapping[str, Any], *, source: str) -> Architecture:
    """From the entries of a config.json."""
    family = settings.get("model_type", "")
    if family not in FAMILIES:
        raise UserError(
            f"no plan for {family!r} models",
            evidence=f"{source} is one; their sizes are not known here",
            fix=f"plan a model of the families {', '.join(FAMILIES)}",
        )
    for name in SIZES:
        if (size := settings.get(name)) is not None and size < 1:
            raise UserError(f"the settings of the model {source!r} are broken", evidence=f"{name} {size}")
    names = {"gpt2": ("n_embd", "n_layer", "n_head"), "bloom": ("hidden_size", "n_layer", "n_head")}
    width, layers, heads = (
        int(settings[name]) for name in names.get(family, ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    )
    tied = bool(settings.get("tie_word_embeddings", family not in GATED))
    head_size = int(settings.get("head_dim") or width // heads)
    made = Architecture(
        family, layers, width, heads, heads, head_size, 4 * width, int(settings["vocab_size"]), tied=tied
    )
    if family in GATED:
        kv_heads = int(settings.get("num_key_value_heads") or heads)
        return replace(made, kv_heads=kv_heads, inner=int(settings["intermediate_size"]))
    if family == "gpt2":
        inner = int(settings.get("n_inner") or 4 * width)
        return replace(made, inner=inner, positions=int(settings.get("n_positions", 1024)))
    if family == "opt":
        apart = int(settings.get("word_embed_proj_dim") or width)
        positions = int(settings.get("max_position_embeddings", 2048)) + 2
        embedded = apart if apart != width else 0
        return replace(made, inner=int(settings["ffn_dim"]), positions=positions, embedded=embedded)
    return made


def llama(layers: int, width: int, heads: int, inner: int) -> Architecture:
    return Architecture("llama", layers, width, heads, heads, width // heads, inner, 32_000, tied=False)


def opt(layers: int, width: int, heads: int, embedded: int = 0) -> Architecture:
    size = width // heads
    return Architecture("opt", layers, width, heads, heads, size, 4 * width, 50_272, positions=2050, embedded=embedded)


def bloom(layers: int, width: int, heads: int) -> Architecture:
    return Architecture("bloom", layers, width, heads, heads, width // heads, 4 * width, 250_880)


def gpt2(layers: int, width: int, heads: int) -> Architecture:
    return Architecture("gpt2", layers, width, heads, heads, width // heads, 4 * width, 50_257, positions=1024)


NAMED: dict[str, Architecture] = {
    "gpt2": gpt2(12, 768, 12),
    "gpt2-medium": gpt2(24, 1024, 16),
    "gpt2-large": gpt2(36, 1280, 20),
    "gpt2-xl": gpt2(48, 1600, 25),
    "gpt2-4b": gpt2(64, 2304, 16),
    "gpt2-6b": gpt2(30, 4096, 16),
    "bloom-560m": bloom(24, 1024, 16),
    "bloom-1b1": bloom(24, 1536, 16),
    "bloom-3b": bloom(30, 2560, 32),
    "bloom-7b": bloom(30, 4096, 32),
    "bloom-175b": bloom(70, 14336, 112),
    "opt-125m": opt(12, 768, 12),
    "opt-350m": opt(24, 1024, 16, embedded=512),
    "opt-1.3b": opt(24, 2048, 32),
    "opt-2.7b": opt(32, 2560, 32),
    "opt-6.7b": opt(32, 4096, 32),
    "opt-13b": opt(40, 5120, 40),
    "opt-30b": opt(48, 7168, 56),
    "llama-7b": llama(32, 4096, 32, 11_008),
    "llama-13b": llama(40, 5120, 40, 13_824),
    "llama-33b": llama(60, 6656, 52, 17_920),
    "llama-65b": llama(80, 8192, 64, 22_016),
}
"""The models of the 2023 system's table by name (Touvron 2023, Zhang 2022, BigScience 2022, Radford 2019)."""
