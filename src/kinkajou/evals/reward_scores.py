"""Scores of answers, and how far a score depends on what stands beside it in the batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from kinkajou.batch import TokenBatch, pad_rows, split_by_tokens

Scorer: TypeAlias = Callable[[TokenBatch], Tensor]
"""A batch of b rows, every real target of which counts -> (b,) scores."""
Tokens: TypeAlias = Sequence[int]
ROWS_AT_ONCE = 512
"""Rows padded together on the host; how many go through the model is a matter of tokens."""
EXTRA_COLUMNS = 32


@dataclass(frozen=True)
class Stability:
    """Largest change of a score against its value when it is scored alone, over `count` answers."""

    count: int
    padded: float  # with more columns of padding, and other tokens in them
    together: float  # in one batch with the others
    reversed: float  # in that batch in reversed order


def score_rows(scorer: Scorer, rows: Sequence[Tokens], *, pad_id: int, budget: int) -> Iterator[list[float]]:
    """Scores in order of the rows, a micro-batch of at most `budget` tokens (one row at least) at a time."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = padded(rows[start : start + ROWS_AT_ONCE], pad_id)
        for part in split_by_tokens(batch, budget):
            yield values(scorer, batch.select(part))


def stability(scorer: Scorer, rows: Sequence[Tokens], *, pad_id: int) -> Stability:
    """Scores `rows` (few: they make one batch) in four ways that must agree."""
    alone = [value for row in rows for value in values(scorer, padded([row], pad_id))]
    batch = padded(rows, pad_id)
    backwards = torch.arange(len(rows)).flip(0)
    return Stability(
        count=len(rows),
        padded=distance(alone, [value for row in rows for value in values(scorer, widened(row, pad_id))]),
        together=distance(alone, values(scorer, batch)),
        reversed=distance(alone, values(scorer, batch.select(backwards))[::-1]),
    )


def spread_rows(rows: Sequence[Tokens], count: int) -> list[Tokens]:
    """`count` rows of lengths from the shortest to the longest."""
    ordered = sorted(rows, key=len)
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def padded(rows: Sequence[Tokens], pad_id: int) -> TokenBatch:
    return pad_rows(rows, [[True] * len(row) for row in rows], pad_id=pad_id)


def widened(row: Tokens, pad_id: int) -> TokenBatch:
    """The row with columns that do not count: pad tokens, then tokens of its own."""
    batch = padded([row], pad_id).widen(EXTRA_COLUMNS)
    tokens, half = batch.tokens.clone(), EXTRA_COLUMNS // 2
    tokens[:, -EXTRA_COLUMNS:-half] = pad_id
    tokens[:, -half:] = row[0]
    return TokenBatch(tokens, batch.mask)


@torch.no_grad()
def values(scorer: Scorer, batch: TokenBatch) -> list[float]:
    return [float(score) for score in scorer(batch)]


def distance(one: Sequence[float], two: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))
