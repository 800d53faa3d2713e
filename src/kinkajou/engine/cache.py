"""Keys and values of running samples, one slot each; and the two layouts that fill and read them.

Shapes: n running samples, h query heads, g key heads, d head size.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from kinkajou.engine import native
from kinkajou.models.attention import Layout, Packed, Shape, attend_to


class Cache(Protocol):
    """Where keys and values lie.  Running samples hold slots 0 .. n - 1, so that a step reads them without a copy."""

    def prefill(self, packed: Packed, slots: list[int]) -> Layout:
        """Runs packed prompts and keeps them: sequence i fills slots[i] from its start."""
        ...

    def decode(self, positions: Tensor, longest: int | None = None) -> Layout:
        """Runs one token in each of the first n slots, at its position; `longest`, if known, is the largest + 1."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """The first tokens of a slot into another one."""
        ...

    def move(self, source: int, target: int, length: int) -> None:
        """A whole slot into one that is free."""
        ...

    def release(self, slot: int) -> None:
        """Nothing of the slot is needed any more."""
        ...


@dataclass
class Slots:
    """Left-aligned rows: per layer (rows, g, capacity, d), made at the first write since only then shapes are known.

    On a CPU without our kernel they hold float32 whatever the weights' type: torch's bfloat16 products of one query
    are four times slower than float32 ones (docs/log.md), and a bfloat16 number is a float32 number.
    """

    rows: int
    capacity: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if index not in self.keys:
            shape = (self.rows, like.shape[1], self.capacity, like.shape[3])
            plain = like.device.type == "cpu" and native.kernel(like.dtype) is None
            dtype = torch.float32 if plain else like.dtype
            # Zeros and not empty: a slot is read beyond its length, and what is masked there must be a number.
            with record_function("kinkajou/cache"):
                self.keys[index], self.values[index] = (like.new_zeros(shape, dtype=dtype) for _ in range(2))
        return self.keys[index], self.values[index]

    def prefill(self, packed: Packed, slots: list[int]) -> Layout:
        return Prefill(packed, self, slots)

    def decode(self, positions: Tensor, longest: int | None = None) -> Layout:
        kept = next(iter(self.keys.values()), None)
        ours = None if kept is None or kept.device.type != "cpu" else native.kernel(kept.dtype)
        return Decode(self, positions, longest or self.capacity, ours)

    def copy(self, source: int, target: int, length: int) -> None:
        for store in (self.keys, self.values):
            for rows in store.values():
                rows[target, :, :length] = rows[source, :, :length]

    def move(self, source: int, target: int, length: int) -> None:
        self.copy(source, target, length)

    def release(self, slot: int) -> None:
        return None


@dataclass(frozen=True)
class Prefill:
    """Packed prompts, whose keys and values are also kept: sequence i fills slot targets[i] from 0."""

    packed: Packed
    slots: Slots
    targets: list[int]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        keys, values = self.slots.layer(shape.layer, value)
        for (a, b), slot in zip(pairwise(self.packed.bounds), self.targets, strict=True):
            keys[slot, :, : b - a] = key[0, :, a:b]
            values[slot, :, : b - a] = value[0, :, a:b]
        return self.packed.attend(query, key, value, shape)


@dataclass(frozen=True)
class Decode:
    """One new token in each of the first slots, at its own position; it sees the slot's earlier tokens and itself."""

    slots: Slots
    positions: Tensor  # (n,)
    end: int
    function: native.Kernel | None = None
    """Our kernel, where there is one for this type."""
    biases: dict[tuple[int | None, bool], Tensor] = field(default_factory=dict)
    """What is added to scores, by window and alibi: the same for all layers of a step."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        keys, values = self.slots.layer(shape.layer, value)
        if self.function is not None and keys.dtype == query.dtype:
            new = (query, key.to(keys.dtype), value, keys, values)
            return self.function(*new, self.positions, scale=shape.scale, window=shape.window, slopes=shape.slopes)
        n = len(self.positions)
        rows = torch.arange(n, device=key.device)
        keys[rows, :, self.positions] = key[:, :, 0].to(keys.dtype)
        values[rows, :, self.positions] = value[:, :, 0].to(values.dtype)
        if query.device.type == "cpu":
            return self._stream(query, keys[:n], values[:n], shape)
        return attend_to(
            query,
            keys[:n, :, : self.end],
            values[:n, :, : self.end],
            self.positions[:, None, None, None],
            torch.arange(self.end, device=key.device)[None, None, None, :],
            shape,
        )

    def _stream(self, query: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        """Two batched products over the rows as they lie; `scaled_dot_product_attention` is slower for one query."""
        n, g, capacity, d = keys.shape
        heads = query.shape[1]
        scores = torch.baddbmm(
            self._bias(shape, g, heads),
            query.reshape(n * g, heads // g, d).to(keys.dtype),
            keys.view(n * g, capacity, d)[:, : self.end].transpose(1, 2),
            alpha=shape.scale,
        )
        mixed = torch.bmm(scores.softmax(-1), values.view(n * g, capacity, d)[:, : self.end])
        return mixed.view(n, heads, 1, d).to(query.dtype)

    def _bias(self, shape: Shape, g: int, heads: int) -> Tensor:
        """0 where a key is seen, else -inf; alibi adds slope x distance.  -> (n g, 1 or h / g, end) float32."""
        known = (shape.window, shape.slopes is not None)
        if known not in self.biases:
            distance = torch.arange(self.end, device=self.positions.device) - self.positions[:, None]
            hidden = distance > 0
            if shape.window is not None:
                hidden = hidden | (distance <= -shape.window)
            if shape.slopes is None:
                bias = torch.zeros(distance.shape).masked_fill(hidden, -torch.inf)
                self.biases[known] = bias.repeat_interleave(g, 0)[:, None]
            else:
                bias = shape.slopes.float()[None, :, None] * distance[:, None]
                bias = bias.masked_fill(hidden[:, None], -torch.inf)
                self.biases[known] = bias.view(-1, heads // g, self.end)
        return self.biases[known]
