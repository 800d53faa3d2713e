"""Log-probabilities straight from hidden states: the head's product and the softmax, tile by tile of positions.

Shapes: k positions, c channels, v vocabulary, r rows of a tile.  Logits are x = (hidden weight^T + bias) / temperature,
and log softmax(x)[target] has the gradient (onehot - softmax(x)) / temperature for x.  Every tile is made in the same
buffers, and the weight's gradient is summed in one float32 buffer, so k x v need not lie in memory.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KEPT = {"cpu": 2**27, "cuda": 2**30}
"""Logits (k x v) that may be kept from the forward to the backward pass, which makes more of them a second time."""
TILE = {"cpu": 2**22, "cuda": 2**28}
"""Logits (r x v) of a tile.  On a CPU it stays in the cache (measured: docs/log.md); a GPU has the memory for longer
products and fewer passes over the weight's gradient."""
ROWS = 128
"""Least rows of a tile, however long the vocabulary: products of fewer are slow."""
BLOCK = 8192
"""Rows of the weight's gradient that are made at once where it is not made in float32."""


@dataclass(frozen=True)
class Head:
    """The output layer: `weight` (v, c) and `bias` (v,) get the gradient, the other two (in the compute type) are
    what is multiplied."""

    weight: Tensor
    bias: Tensor | None
    used_weight: Tensor
    used_bias: Tensor | None


def tile_rows(vocabulary: int, device: torch.device) -> int:
    return max(ROWS, TILE.get(device.type, TILE["cpu"]) // vocabulary)


def linear_logp(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    slope: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(x)[target] and, if asked for, the entropy of softmax(x), which has no gradient.  (k,) float32 each.

    `slope` (k,): the loss's derivative by each log-probability, up to a common factor.  With it gradients are made
    in this pass (3 products instead of 4, no logits kept), and the backward pass only scales them.
    """
    tiles = Tiles(hidden.detach(), head, targets, temperature)
    if not torch.is_grad_enabled():
        return tiles.scores(entropy=entropy)
    logp, found = LinearLogp.apply(hidden, head.weight, head.bias, tiles, entropy, slope)  # type: ignore[no-untyped-call]
    return logp, found


class LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tiles: "Tiles",
        entropy: bool,
        slope: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.tiles, ctx.slope, ctx.sums = tiles, slope, None
        if slope is not None:
            ctx.sums = Sums(tiles, *ctx.needs_input_grad[:3])
            logp, found = tiles.scores(entropy=entropy, sums=ctx.sums, slope=slope)
            ctx.tiles = None
        else:
            budget = KEPT.get(hidden.device.type, KEPT["cpu"])
            fits = any(ctx.needs_input_grad) and len(hidden) * len(weight) <= budget
            kept = tiles.empty(len(hidden), hidden.dtype) if fits else None
            logp, found = tiles.scores(entropy=entropy, kept=kept)
            ctx.save_for_backward(hidden, weight, tiles.weight, kept)  # so that torch sees what has changed meanwhile
        if found is not None:
            ctx.mark_non_differentiable(found)
        return logp, found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope = grads[0]
        if ctx.slope is None:
            sums = Sums(ctx.tiles, *ctx.needs_input_grad[:3])
            ctx.tiles.gradients(sums, slope, kept=ctx.saved_tensors[3])
        else:
            sums, ctx.sums = ctx.sums, None
            if sums is None:
                raise RuntimeError("gradients that were made in the forward pass can be used once")
            sums.scale(common_factor(slope, ctx.slope))
        return sums.hidden, sums.weight, sums.bias, None, None, None


def common_factor(got: Tensor, promised: Tensor) -> float:
    """got / promised, the same for all positions, or the promise was broken."""
    if not len(promised):
        return 1.0
    at = promised.abs().argmax()
    factor = float(got[at] / promised[at])
    if not math.isfinite(factor):  # a loss that is not finite breaks no promise; its gradients show it
        return factor
    if not torch.allclose(got, factor * promised, rtol=1e-4, atol=1e-6 * float(got[at].abs())):
        raise RuntimeError("the loss's derivative by log-probabilities is not a multiple of the slope it promised")
    return factor


class Tiles:
    """The positions tile by tile."""

    def __init__(self, hidden: Tensor, head: Head, targets: Tensor, temperature: float) -> None:
        self.hidden, self.targets = hidden, targets
        self.weight = head.used_weight.detach()
        self.bias = None if head.used_bias is None else head.used_bias.detach()
        self.temperature = temperature or 1.0  # greedy decoding leaves logits as they are
        self.rows = max(1, min(len(hidden), tile_rows(len(self.weight), hidden.device)))

    def __iter__(self) -> Iterator[slice]:
        return (slice(a, min(a + self.rows, len(self.hidden))) for a in range(0, len(self.hidden), self.rows))

    def empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        return self.hidden.new_empty((rows, len(self.weight)), dtype=dtype)

    def scores(
        self, *, entropy: bool, kept: Tensor | None = None, sums: "Sums | None" = None, slope: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What `linear_logp` returns; logits go into `kept`, gradients for `slope` into `sums`."""
        logp = self.hidden.new_empty(len(self.hidden), dtype=torch.float32)
        found = torch.empty_like(logp) if entropy else None
        buffers = Buffers(self)
        for at in self:
            x = buffers.lifted(buffers.logits(at, None if kept is None else kept[at]))
            top, chosen = x.amax(-1), x.gather(-1, self.targets[at, None]).squeeze(-1)
            p = buffers.softmax(x, apart=entropy)
            # The likeliest token's probability is never small, so its logarithm loses nothing.
            total = top - p.amax(-1).log()
            logp[at] = chosen - total
            if found is not None:  # in the place of the one that is not needed any more
                found[at] = total - (p.mul_(x) if sums is None else x.mul_(p)).sum(-1)
            if sums is not None and slope is not None:
                sums.add(at, p, slope[at], buffers)
        return logp, found

    def gradients(self, sums: "Sums", slope: Tensor, *, kept: Tensor | None) -> None:
        """Fills `sums` from each tile's softmax, made again from its logits, and these too unless kept."""
        buffers = Buffers(self)
        for at in self:
            x = buffers.lifted(buffers.logits(at) if kept is None else kept[at])
            sums.add(at, buffers.softmax(x), slope[at], buffers)


class Buffers:
    """Memory for one tile: logits as the product gives them, the same in float32, and their softmax."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles
        self.wide = tiles.empty(tiles.rows, torch.float32)
        narrow = tiles.hidden.dtype != torch.float32
        self.raw = tiles.empty(tiles.rows, tiles.hidden.dtype) if narrow else self.wide
        self.other: Tensor | None = None

    def logits(self, at: slice, into: Tensor | None = None) -> Tensor:
        """The head's product.  -> (r, v) in the compute type."""
        tiles = self.tiles
        h, w = tiles.hidden[at], tiles.weight.t()
        out = self.raw[: len(h)] if into is None else into
        return torch.mm(h, w, out=out) if tiles.bias is None else torch.addmm(tiles.bias, h, w, out=out)

    def lifted(self, raw: Tensor) -> Tensor:
        """The logits in float32, tempered."""
        temperature = self.tiles.temperature
        if raw.dtype == torch.float32 and temperature == 1.0:
            return raw
        wide = self.wide[: len(raw)]
        if raw.data_ptr() != wide.data_ptr():
            wide.copy_(raw)
        return wide if temperature == 1.0 else wide.div_(temperature)

    def softmax(self, x: Tensor, *, apart: bool = False) -> Tensor:
        """In the place of `x` if that is the float32 tile, unless both are wanted."""
        if apart and x.data_ptr() == self.wide.data_ptr():
            self.other = torch.empty_like(self.wide) if self.other is None else self.other
            return torch.softmax(x, -1, out=self.other[: len(x)])
        return torch.softmax(x, -1, out=self.wide[: len(x)])


class Sums:
    """Gradients for hidden states, weight and bias, as far as they are wanted, summed over tiles."""

    def __init__(self, tiles: Tiles, hidden: bool, weight: bool, bias: bool) -> None:
        self.tiles, made = tiles, tiles.hidden
        self.wide = torch.promote_types(made.dtype, torch.float32)
        start = made.new_empty if len(made) else made.new_zeros
        self.hidden = torch.empty_like(made) if hidden else None
        self.weight: Tensor | None = start(tiles.weight.shape, dtype=self.wide) if weight else None
        self.bias: Tensor | None = made.new_zeros(len(tiles.weight), dtype=self.wide) if bias else None

    def add(self, at: slice, p: Tensor, slope: Tensor, buffers: Buffers) -> None:
        """A tile's part, from its softmax, which is overwritten."""
        tiles = self.tiles
        h, y = tiles.hidden[at], tiles.targets[at, None]
        p.scatter_add_(-1, y, p.new_full(y.shape, -1.0))
        g = torch.mul(p, -slope[:, None] / tiles.temperature, out=buffers.raw[: len(h)])  # for the untempered logits
        if self.hidden is not None:
            torch.mm(g, tiles.weight, out=self.hidden[at])
        if self.weight is not None:
            self._add_weight(g, h, first=at.start == 0)
        if self.bias is not None:
            self.bias += g.sum(0, dtype=self.wide)

    def _add_weight(self, g: Tensor, h: Tensor, *, first: bool) -> None:
        assert self.weight is not None
        if g.dtype == self.wide:
            self.weight.addmm_(g.t(), h, beta=0 if first else 1)
            return
        for a in range(0, len(self.weight), BLOCK):
            part, into = g[:, a : a + BLOCK].t() @ h, self.weight[a : a + BLOCK]
            into.copy_(part) if first else into.add_(part)

    def scale(self, factor: float) -> None:
        if factor != 1.0:
            for x in (self.hidden, self.weight, self.bias):
                if x is not None:
                    x *= factor
