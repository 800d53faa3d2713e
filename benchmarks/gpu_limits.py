"""What a GPU could do at most, and what a LLaMA-shaped model asks of it: products, bytes, memory.  Arithmetic alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

FLOAT, HALF = 4, 2
"""Bytes of a float32 and of a bfloat16 number."""
BUDGETS = (16384, 8192, 4096, 2048)
"""Tokens of a micro-batch, the first that fits."""
USABLE = 0.94
"""Of a card's memory; the rest is the context and gaps."""
SLACK = 3e9
"""Bytes of the head's tile, of kernels' workspaces and of gradients before they are float32."""


@dataclass(frozen=True)
class Peak:
    """Dense bfloat16 products in FLOP/s, memory in bytes/s: the maker's data sheet."""

    flops: float
    bandwidth: float


PEAKS = {
    "H200": Peak(989e12, 4.8e12),
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100 NVL": Peak(835e12, 3.9e12),
    "H100": Peak(989e12, 3.35e12),
    "A100": Peak(312e12, 2.0e12),
}
"""By a part of the device's name; the first that fits, so special forms stand before the plain name."""


def peak_of(device: str) -> Peak | None:
    """None for a device that the table does not know: shares of its limit are then not told."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def layer_products(self) -> int:
        """Weights of one layer's matrices."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head_products(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All of them: embedding and head (one matrix if tied), layers with two norms each, the last norm."""
        ends = self.head_products * (1 if self.tied else 2)
        return ends + self.layers * (self.layer_products + 2 * self.hidden) + self.hidden


SHAPES = {
    "1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "7b": Shape(4096, 11008, 32, 32, 32, 128, 32000, tied=False),
    "small": Shape(64, 176, 2, 4, 2, 16, 512, tied=True),
}
"""LLaMA 3.2 1B's and LLaMA 2 7B's, and a small one to try the program."""


def training_flops(shape: Shape, lengths: Iterable[int], targets: int) -> float:
    """Of forward and backward pass over sequences: 6 for each token and weight of a layer, 6 for each target and weight
    of the head, and attention's products over what a token sees (itself and what came before; no masked half)."""
    known = list(lengths)
    seen = sum(n * (n + 1) / 2 for n in known)
    attention = 3 * 4 * shape.heads * shape.head_size * shape.layers * seen
    return 6.0 * sum(known) * shape.layers * shape.layer_products + 6.0 * targets * shape.head_products + attention


def kv_bytes(shape: Shape) -> int:
    """Of one token, in bfloat16."""
    return 2 * shape.layers * shape.kv_heads * shape.head_size * HALF


def decoding_bytes(shape: Shape, rows: int, lengths: Sequence[int]) -> float:
    """Read at least by decoding steps of `rows` samples in bfloat16: every matrix once a step, and every key and value.

    lengths[i] are the tokens that each sample has in its cache at step i.
    """
    weights = HALF * (shape.layers * shape.layer_products + shape.head_products)
    return float(len(lengths) * weights + rows * kv_bytes(shape) * sum(lengths))


def activation_bytes(shape: Shape) -> int:
    """Kept of one token by a layer for the backward pass, without gradient checkpointing.

    Each of two norms keeps its input in float32, the normalised and the scaled one in bfloat16; attention its query,
    key, value and output; the MLP gate, activation, up projection and their product.
    """
    norms = 2 * (FLOAT + 2 * HALF) * shape.hidden
    attention = 2 * HALF * shape.head_size * (shape.heads + shape.kv_heads)
    return norms + attention + 4 * HALF * shape.intermediate


def training_bytes(shape: Shape, tokens: int) -> float:
    """Float32 weights, gradients and AdamW's two moments, bfloat16 weights, one micro-batch of so many tokens."""
    state = (4 * FLOAT + HALF) * shape.parameters
    return state + FLOAT * shape.head_products + tokens * shape.layers * activation_bytes(shape) + SLACK


@dataclass(frozen=True)
class Plan:
    shape: Shape
    tokens: int
    """Of a micro-batch."""


def plan(shape: Shape, memory: float) -> Plan:
    """The largest micro-batch that fits in so many bytes; where none does, as many layers as do."""
    room = USABLE * memory
    for tokens in BUDGETS:
        if training_bytes(shape, tokens) <= room:
            return Plan(shape, tokens)
    layers = shape.layers
    while layers > 1 and training_bytes(replace(shape, layers=layers), BUDGETS[-1]) > room:
        layers -= 1
    return Plan(replace(shape, layers=layers), BUDGETS[-1])
