"""Mean and deviation of everything seen so far, in float64."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kinkajou.algos.tensors import Sum, alone

ScoreScale = Literal["none", "std", "mean_std"]


class Moments(NamedTuple):
    number: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    @property
    def std(self) -> float:
        """With n - 1, as TRL has it; 1 while nothing varies, so that dividing by it changes nothing."""
        return math.sqrt(self.squares / (self.number - 1)) if self.number > 1 and self.squares > 0 else 1.0


def moments(x: Tensor, mask: Tensor, *, all_sum: Sum = alone) -> Moments:
    """Of the masked entries of all ranks, in two passes (Chan 1983).  (b,), (b,)."""
    x = x.double().where(mask, 0.0)
    count, total = all_sum(torch.stack([mask.sum().double(), x.sum()])).tolist()
    mean = total / max(count, 1.0)
    squares = all_sum((((x - mean) ** 2) * mask).sum()).item()
    return Moments(count, mean, squares)


def merged(a: Moments, b: Moments) -> Moments:
    """Moments of both sets together (Chan 1979, eq. 2.1)."""
    count = a.number + b.number
    if not count:
        return a
    apart = b.mean - a.mean
    return Moments(
        count, a.mean + apart * b.number / count, a.squares + b.squares + apart**2 * a.number * b.number / count
    )


def scaled(scores: Tensor, seen: Moments, how: ScoreScale) -> Tensor:
    """Scores over the deviation of all that were seen, less their mean where that is wanted too.  (b,) -> (b,).

    TRL's `use_score_scaling` and `use_score_norm` (von Werra 2020, `ppo_trainer.py`), OpenRLHF's reward normalisation
    (Hu 2024).
    """
    if how == "none":
        return scores
    return (scores - (seen.mean if how == "mean_std" else 0.0)) / seen.std
