"""CUDA graphs of one decoding step: a small model's step is a thousand launches that a graph replays as one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kinkajou.batch import Sampling

Step = Callable[[Tensor, Tensor, Tensor, Sampling], tuple[Tensor, Tensor]]
"""Tokens, positions and uniform numbers of the first n slots -> their next tokens and log-probabilities."""
WARM_UP = 2
"""Runs of a step before it is recorded: libraries choose their kernels then."""


def buckets(rows: int) -> list[int]:
    """Numbers of rows that graphs are recorded for: powers of two, and all rows."""
    sizes = [1]
    while sizes[-1] * 2 < rows:
        sizes.append(sizes[-1] * 2)
    return [*sizes, rows] if rows > 1 else sizes


@dataclass(frozen=True)
class Inputs:
    """What a recorded step reads: (size,) each, where they lie for good."""

    tokens: Tensor
    positions: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, size: int, like: tuple[Tensor, Tensor, Tensor]) -> "Inputs":
        return cls(*(x.new_zeros(size) for x in like))

    def fill(self, tokens: Tensor, positions: Tensor, uniform: Tensor) -> None:
        """Rows beyond those given are a token at position 0 of a free slot."""
        for own, new in ((self.tokens, tokens), (self.positions, positions), (self.uniform, uniform)):
            own[: len(new)].copy_(new)
            own[len(new) :].zero_()


class Graphs:
    """Records `step` once for each bucket and distribution.  Rows beyond n run too, in slots that nobody reads; unless
    it is `every` bucket, all rows always run.

    Weights and cache are read where they lay when it was recorded: `forget` when they have moved.
    """

    def __init__(self, step: Step, rows: int, *, every: bool = True) -> None:
        self.step, self.sizes = step, buckets(rows) if every else [rows]
        self.recorded: dict[tuple[int, Sampling], tuple[Inputs, Callable[[], None], tuple[Tensor, Tensor]]] = {}

    def forget(self) -> None:
        self.recorded.clear()

    def run(self, tokens: Tensor, positions: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        given = (tokens, positions, uniform)
        size = next(size for size in self.sizes if size >= len(tokens))
        if (size, sampling) not in self.recorded:
            inputs = Inputs.of(size, given)
            inputs.fill(*given)  # a warm-up writes the keys that the replay writes again
            replay, drawn = record(lambda: self.step(inputs.tokens, inputs.positions, inputs.uniform, sampling))
            self.recorded[size, sampling] = (inputs, replay, drawn)
        inputs, replay, drawn = self.recorded[size, sampling]
        inputs.fill(*given)
        replay()
        return drawn[0][: len(tokens)].clone(), drawn[1][: len(tokens)].clone()


def record(step: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
    """What replays the step on the GPU, and the tensors that it then fills."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = step()
    return graph.replay, drawn
