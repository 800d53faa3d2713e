"""Keys and values of running samples, one row each, left-aligned; and the two layouts that fill and read them."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from kinkajou.models.attention import Packed, Shape, attend_to


@dataclass
class Cache:
    """Per layer (rows, g, capacity, d), made at the first write since only then the shapes are known.

    Both hold the dtype of the values: under autocast rotary embeddings leave the keys in float32, and attention
    would round them to bfloat16 anyway.
    """

    rows: int
    capacity: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if index not in self.keys:
            shape = (self.rows, like.shape[1], self.capacity, like.shape[3])
            self.keys[index], self.values[index] = like.new_zeros(shape), like.new_zeros(shape)
        return self.keys[index], self.values[index]

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        self.rows = len(rows)
        for store in (self.keys, self.values):
            for index, tensor in store.items():
                store[index] = tensor[rows]


@dataclass(frozen=True)
class Prefill:
    """Packed prompts, whose keys and values are also kept: sequence i fills row i from 0."""

    packed: Packed
    cache: Cache

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        keys, values = self.cache.layer(shape.layer, value)
        bounds = self.packed.bounds
        for row, (a, b) in enumerate(pairwise(bounds)):
            keys[row, :, : b - a] = key[0, :, a:b]
            values[row, :, : b - a] = value[0, :, a:b]
        return self.packed.attend(query, key, value, shape)


@dataclass(frozen=True)
class Decode:
    """One new token in each row, at its own position; it sees the row's earlier tokens and itself."""

    cache: Cache
    positions: Tensor  # (rows,)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        keys, values = self.cache.layer(shape.layer, value)
        rows = torch.arange(len(self.positions), device=key.device)
        keys[rows, :, self.positions] = key[:, :, 0].to(keys.dtype)
        values[rows, :, self.positions] = value[:, :, 0]
        end = int(self.positions.max()) + 1
        return attend_to(
            query,
            keys[:, :, :end],
            values[:, :, :end],
            self.positions[:, None, None, None],
            torch.arange(end, device=key.device)[None, None, None, :],
            shape,
        )
