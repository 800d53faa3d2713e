"""Losses over pairs of answers.  Shapes: b pairs; `count` is the global number of pairs."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kinkajou.algos.losses import Loss


def log_sigmoid_ranking(chosen: Tensor, rejected: Tensor, count: Tensor) -> Loss:
    """-log sigmoid(chosen - rejected) (Ouyang 2022, eq. 1; Bradley and Terry 1952), finite for any margin.

    (b,), (b,).  Anthropic's log(1 + exp(rejected - chosen)) (Bai 2022, section 4.1; Askell 2021) is the same
    function; both are softplus of the negated margin.  Metrics: `accuracy` (a tie counts half), `margin`.
    """
    margin = chosen - rejected
    value = softplus(-margin).sum() / count
    with torch.no_grad():
        wins = (margin > 0).float() + 0.5 * (margin == 0).float()
        metrics = {"accuracy": wins.sum() / count, "margin": margin.sum() / count}
    return Loss(value, metrics)


RANKING = {"log_sig": log_sigmoid_ranking, "log_exp": log_sigmoid_ranking}
"""Both published names of the one function."""


def wilson_interval(wins: float, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927), 95 % at z = 1.96; (0, 1) when nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    share, spread = wins / count, z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / count + spread / (4 * count)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
