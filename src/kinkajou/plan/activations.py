"""What one layer keeps from its forward to its backward pass, counted tensor by tensor from models/forward.py.

c channels, f inner channels, q channels of all query heads, g of all key heads; bytes for each token of the pack.
"""

from dataclasses import dataclass

from kinkajou.plan.architecture import GATED, Architecture


@dataclass(frozen=True)
class Pass:
    """How a model is run: the compute type, the device, and what is trained."""

    half: bool = False
    gpu: bool = False
    lora_rank: int = 0
    checkpointing: bool = False

    @property
    def bytes(self) -> int:
        """Of one number in the compute type."""
        return 2 if self.half else 4


def kept_by_layer(a: Architecture, how: Pass, *, length: int) -> float:
    """Bytes a token that one layer's graph holds, in sequences of `length` tokens."""
    b, c, f = how.bytes, a.width, a.inner
    if a.family in GATED:
        # Each norm keeps its input in float32 and, where its weight is trained, the normalised input.
        norms = 2 * (4 * c + 4 + (0 if how.lora_rank else b * c))
        inputs = b * (2 * c + a.attended)  # of queries, keys and values; of the output; of gate and up
        inner = b * 4 * f  # gate, its activation, up, their product
    else:
        norms = 2 * b * (c + 2)
        inputs = b * 3 * c
        inner = b * f * {"gpt2": 5, "opt": 1, "bloom": 2}[a.family]
    adapters = b * how.lora_rank * len(a.matrices) if how.lora_rank else 0
    return norms + inputs + inner + adapters + kept_by_attention(a, how, length=length)


def kept_by_attention(a: Architecture, how: Pass, *, length: int) -> float:
    q, g = a.attended, a.keyed
    if how.gpu:
        return how.bytes * (2 * q + 2 * g) + 4 * a.heads
    if a.family == "bloom":  # scaled queries and keys, values, and the probabilities themselves
        values = q if how.half else 3 * q
        return 4 * (2 * q + values) + 4 * a.heads * length
    return 4 * (2 * q + 2 * g) + 8 * a.heads


def carried(a: Architecture, how: Pass) -> float:
    """Bytes a token that go from layer to layer: all that checkpointing keeps of one."""
    return float(how.bytes * a.width)


def kept_outside(a: Architecture, how: Pass) -> float:
    """Bytes a token that embedding and last norm hold."""
    last = 4 * a.width + how.bytes * a.width if a.family in GATED else how.bytes * a.width
    first = how.bytes * a.width if a.family == "bloom" else 0
    return last + first + 16  # ids and positions


def in_flight(a: Architecture, how: Pass) -> float:
    """Bytes a token of the largest tensors that lie beside each other inside a layer, with no graph."""
    b = how.bytes
    gated = 3 * a.inner if a.family in GATED else 2 * a.inner
    attention = 3 * a.attended + 2 * a.keyed
    return float(max(b * (gated + a.width), b * (a.width + attention) + (4 * attention if how.half else 0)))
