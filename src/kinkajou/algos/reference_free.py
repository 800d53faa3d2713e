"""Parts of the preference losses that need no reference.  Shapes: (b,) unless said; log-probabilities in nats.

CPO and SimPO are `dpo.logistic` of a margin of the policy's own log-probabilities (Xu 2024; Meng 2024, eq. 6).
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it (Maechler 2012).  Any shape."""
    near = x > -math.log(2)
    # Each branch sees only what it can take: the other's gradient would be NaN.
    inner = torch.where(near, x, -1.0)
    outer = torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(inner)), torch.log1p(-torch.exp(outer)))


def odds_ratio(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """-beta log sigmoid of the log odds ratio (Hong 2024, ORPO, eq. 7), of mean log-probabilities of a token."""
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -beta * logsigmoid(log_odds)


def simpo_margin(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """Difference of the scores minus the margin it must win by, in units of beta (Meng 2024, SimPO, eq. 6)."""
    return chosen - rejected - gamma / beta


def alpha_score(mean_logp: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha, p the geometric mean of a token's probability (Gupta 2025, AlphaPO, eq. 5).  Any shape.

    alpha -> 0 is SimPO's log p.
    """
    return -torch.expm1(-alpha * mean_logp) / alpha if alpha else mean_logp
