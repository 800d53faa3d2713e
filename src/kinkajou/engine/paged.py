"""Keys and values in pages, for GPUs: a slot is a list of pages, and samples of one prompt share those it fills.

torch's variable-length flash attention reads them through a block table (Kwon 2023, section 4).
Shapes: n running samples, h query heads, g key heads, d head size.
"""

import inspect
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.profiler import record_function

from kinkajou.models.attention import Layout, Packed, Shape, varlen

PAGE = 256
"""Tokens of a page: flash attention asks for a multiple of it."""


def can_page(device: torch.device, dtype: torch.dtype, *, alibi: bool) -> bool:
    """Whether torch's kernel is there: CUDA, half precision, block tables (torch 2.12 on), no alibi."""
    attention = varlen()
    tables = attention is not None and "block_table" in inspect.signature(attention).parameters
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and tables and not alibi


@dataclass
class Pages:
    """Per layer a pool (pages, PAGE, g, d) of keys and one of values; page 0 takes what free slots write."""

    rows: int
    capacity: int
    device: torch.device
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        width = -(-self.capacity // PAGE)
        self.table = torch.zeros((self.rows, width), dtype=torch.int32, device=self.device)
        self.held: list[list[int]] = [[] for _ in range(self.rows)]
        self.users = [0] * (1 + self.rows * width)
        self.free = list(range(self.rows * width, 0, -1))

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """`like` is (n, g, d)."""
        if index not in self.keys:
            shape = (len(self.users), PAGE, *like.shape[1:])
            with record_function("kinkajou/cache"):
                self.keys[index], self.values[index] = like.new_zeros(shape), like.new_zeros(shape)
        return self.keys[index], self.values[index]

    def take(self, slot: int) -> None:
        """All the pages that the slot may come to need, so that nothing changes while it decodes."""
        missing = self.table.shape[1] - len(self.held[slot])
        for _ in range(missing):
            page = self.free.pop()
            self.users[page] = 1
            self.held[slot].append(page)
        self._write(slot)

    def release(self, slot: int) -> None:
        for page in self.held[slot]:
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)
        self.held[slot] = []
        self._write(slot)

    def _write(self, slot: int) -> None:
        pages = self.held[slot] or [0] * self.table.shape[1]
        self.table[slot] = torch.tensor(pages, dtype=torch.int32, device=self.device)

    def copy(self, source: int, target: int, length: int) -> None:
        """Whole pages are shared, for they are not written any more; the last one, half full, is copied."""
        self.release(target)
        whole = length // PAGE
        for page in self.held[source][:whole]:
            self.users[page] += 1
            self.held[target].append(page)
        self.take(target)
        if length % PAGE:
            old, new = self.held[source][whole], self.held[target][whole]
            for pool in (*self.keys.values(), *self.values.values()):
                pool[new] = pool[old]

    def move(self, source: int, target: int, length: int) -> None:
        self.release(target)
        self.held[target], self.held[source] = self.held[source], []
        self._write(target)
        self._write(source)

    def places(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where the tokens at those positions of those slots lie in the pools laid flat."""
        pages = self.table[slots, positions // PAGE].long()
        return pages * PAGE + positions % PAGE

    def prefill(self, packed: Packed, slots: list[int]) -> Layout:
        for slot in slots:
            self.take(slot)
        lengths = torch.tensor([b - a for a, b in pairwise(packed.bounds)], device=self.device)
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths.tolist()])
        owners = torch.tensor(slots, device=self.device).repeat_interleave(lengths)
        return PagedPrefill(packed, self, self.places(owners, positions))

    def decode(self, positions: Tensor, longest: int | None = None) -> Layout:
        n = len(positions)
        places = self.places(torch.arange(n, device=self.device), positions)
        bounds = torch.arange(n + 1, dtype=torch.int32, device=self.device)
        return PagedDecode(self, places, bounds, (positions + 1).int())


def write(pools: tuple[Tensor, Tensor], places: Tensor, key: Tensor, value: Tensor) -> None:
    """(1, g, n, d) or (n, g, 1, d) as (n, g, d) rows into the pools."""
    for pool, new in zip(pools, (key, value), strict=True):
        pool.flatten(0, 1)[places] = new.to(pool.dtype)


@dataclass(frozen=True)
class PagedPrefill:
    packed: Packed
    pages: Pages
    places: Tensor  # (tokens,)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        rows = [x[0].transpose(0, 1) for x in (key, value)]
        write(self.pages.layer(shape.layer, rows[0]), self.places, *rows)
        return self.packed.attend(query, key, value, shape)


@dataclass(frozen=True)
class PagedDecode:
    pages: Pages
    places: Tensor  # (n,)
    bounds: Tensor  # (n + 1,) int32: one query each
    lengths: Tensor  # (n,) int32, the new token with it

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        attention = varlen()
        assert attention is not None  # `can_page` has asked
        pools = self.pages.layer(shape.layer, key[:, :, 0])
        write(pools, self.places, key[:, :, 0], value[:, :, 0])
        mixed: Tensor = attention(
            query[:, :, 0],
            *pools,
            self.bounds,
            None,
            1,
            self.pages.table.shape[1] * PAGE,
            scale=shape.scale,
            window_size=(-1 if shape.window is None else shape.window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
            seqused_k=self.lengths,
            block_table=self.pages.table[: len(self.places)],
        )
        return mixed[:, :, None]
