"""Losses of Direct Preference Optimization's family: one number for each pair.

Shapes: (b,) unless said.  A log-ratio is log policy / reference of a whole answer, in nats.  `chosen` and `rejected`
are the two answers' log-ratios; `delta` is the difference of their implicit scores.  `beta` > 0 scales both.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
LARGEST_EXPONENT = 80.0
"""exp of more would leave float32."""


def implicit_score(log_ratio: Tensor, divergence: Divergence = "reverse_kl", *, alpha: float = 0.5) -> Tensor:
    """f'(ratio) of the divergence that holds the policy to the reference (Wang 2023, f-DPO, table 1).  Any shape.

    reverse_kl: the log-ratio itself (Rafailov 2023); `alpha` 1 is the same.
    """
    if divergence == "forward_kl":
        return 1 - (-log_ratio).exp()
    if divergence == "js":
        return math.log(2) + logsigmoid(log_ratio)
    if divergence == "alpha" and alpha != 1:
        return ((alpha - 1) * log_ratio).clamp(max=LARGEST_EXPONENT).expm1() / (alpha - 1)
    return log_ratio


def logistic(delta: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta delta) (Rafailov 2023, eq. 7); smoothed, a share of the labels is taken for wrong
    (Mitchell 2023, cDPO, eq. 3)."""
    if not label_smoothing:
        return -logsigmoid(beta * delta)
    return -(1 - label_smoothing) * logsigmoid(beta * delta) - label_smoothing * logsigmoid(-beta * delta)


def hinge(delta: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 - beta delta) (Zhao 2023, SLiC-HF; Liu 2023, RSO, eq. 8)."""
    return relu(1 - beta * delta)


def squared(delta: Tensor, *, beta: float) -> Tensor:
    """(delta - 1 / (2 beta))^2 (Azar 2023, IPO, eq. 17)."""
    return (delta - 1 / (2 * beta)) ** 2


def robust(delta: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Unbiased under labels of which that share is flipped (Ray Chowdhury 2024, eq. 12).  May fall below 0."""
    right, wrong = logsigmoid(beta * delta), logsigmoid(-beta * delta)
    return (label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)


def exo(delta: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Reverse KL of the policy's preference from the smoothed label's (Ji 2024, EXO, eq. 16).  Smoothing > 0."""
    right, wrong = logsigmoid(beta * delta), logsigmoid(-beta * delta)
    return right.exp() * (right - math.log1p(-label_smoothing)) + wrong.exp() * (wrong - math.log(label_smoothing))


def discopop(delta: Tensor, *, beta: float, tau: float) -> Tensor:
    """Logistic and exponential loss, mixed by the margin (Lu 2024, DiscoPOP, eq. 5)."""
    margin = beta * delta
    share = torch.sigmoid(margin / tau)
    return -logsigmoid(margin) * (1 - share) + (-margin).exp() * share


def nca(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Noise contrastive alignment of a pair (Chen 2024, NCA, eq. 11 with two answers)."""
    good, bad = beta * chosen, beta * rejected
    return -logsigmoid(good) - 0.5 * logsigmoid(-good) - 0.5 * logsigmoid(-bad)


def bco(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """A classifier of good and bad answers, its shift left at 0 (Jung 2024, BCO, eq. 8)."""
    return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)


def sppo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Self-play preference optimization with win rates 1 and 0 (Wu 2024, SPPO, eq. 4.7)."""
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Raises the chosen, lowers the rejected (D'Oosterlinck 2024, APO, eq. 7): both better than the model's own."""
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Lowers both, the rejected more (D'Oosterlinck 2024, APO, eq. 8): both worse than the model's own."""
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def sorted_partner(x: Tensor, other: Tensor) -> Tensor:
    """For each of `x`, the entry of `other` of the same rank: optimal transport in one dimension (Melnyk 2024)."""
    ranks = x.argsort(stable=True).argsort()
    return other.sort().values[ranks]


def aot_unpaired(
    chosen: Tensor, rejected: Tensor, below: Tensor, above: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Chosen against rejected answers of the same rank over the whole batch (Melnyk 2024, AOT, eq. 8).

    `below` is the rejected log-ratio of this chosen one's rank, `above` the chosen one of this rejected one's rank,
    both fixed.  Summed over the batch, value and gradient are exactly those of the sorted loss.
    """
    rises = logistic(chosen - below, beta=beta, label_smoothing=label_smoothing)
    falls = logistic(above - rejected, beta=beta, label_smoothing=label_smoothing)
    return rises + falls - falls.detach()


def length_weights(mask: Tensor, shared: Tensor, alpha: float) -> Tensor:
    """1 for the first `shared` targets, the length that both answers reach, `alpha` beyond (Liu 2024, LD-DPO, eq. 9).

    (..., t) bool, (...) -> (..., t) float, 0 off the mask.
    """
    return torch.where(mask.cumsum(-1) <= shared[..., None], 1.0, alpha) * mask


def policy_weight(alignment: Tensor, mask: Tensor) -> Tensor:
    """How likely the policy would write this pair itself (Zhou 2024, WPO, eq. 2 with sampled alignment).

    `alignment` (b, 2, t) is log p minus the log of its expected value, log sum p^2; (b, 2, t) bool -> (b,).
    """
    means = (alignment * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return means.exp().prod(1)
