"""Masked statistics and log-probabilities.  Shapes: b rows, t targets, v vocabulary, k positions."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Sum = Callable[[Tensor], Tensor]
"""Sums a tensor over data-parallel ranks: all that the formulas know of them."""
Variance = Literal["biased", "unbiased"]
CANDIDATES = 256
"""Tokens among which top-p is looked for first."""


def alone(x: Tensor) -> Tensor:
    """The `Sum` of a single process."""
    return x


def masked_mean(x: Tensor, mask: Tensor, *, all_sum: Sum = alone) -> Tensor:
    """Mean over the masked entries of all ranks; 0 when nothing is masked."""
    total, count = all_sum(torch.stack([(x * mask).sum().float(), mask.sum().float()])).unbind()
    return total / count.clamp(min=1)


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    variance: Variance = "biased",
    eps: float = 1e-8,
    keep_mean: bool = False,
    all_sum: Sum = alone,
) -> Tensor:
    """Unit variance and zero (or the old) mean over the masked entries of all ranks; 0 elsewhere.

    The biased variance is OpenRLHF's; TRL and verl divide by n - 1 (docs/numerics.md).
    """
    mean = masked_mean(x, mask, all_sum=all_sum)
    centred = (x - mean) * mask
    squares, count = all_sum(torch.stack([(centred**2).sum().float(), mask.sum().float()])).unbind()
    spread = squares / (count - int(variance == "unbiased")).clamp(min=1)
    return (centred * torch.rsqrt(spread + eps) + mean * keep_mean) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, *, all_sum: Sum = alone) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over masked entries of all ranks; 1 is a perfect critic.

    NaN when the returns do not vary: there is nothing to explain.
    """

    def variance(x: Tensor) -> Tensor:
        mean = masked_mean(x, mask, all_sum=all_sum)
        return masked_mean((x - mean) ** 2, mask, all_sum=all_sum)

    total = variance(returns)
    return torch.where(total > 0, 1 - variance(returns - values) / total, torch.nan)


def sampling_logits(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Logits of the distribution that tokens are drawn from: tempered, then cut to top-k, top-p and min-p in turn.

    (k, v) -> (k, v) float32.  Cut entries are -inf.  `keep` (k,) names tokens that are never cut: an
    update scores tokens that were inside the cut when they were drawn and may have left it since; without
    this their log-probability would be -inf.  Temperature 0 (greedy) leaves the logits as they are.
    Top-p is the smallest set whose mass reaches p (Holtzman 2020, section 3.1); min-p keeps what has at least
    that share of the likeliest token's probability (Nguyen 2025, section 3).
    """
    logits = logits.float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    cut: Tensor | None = None
    if 0 < top_k < logits.shape[-1]:
        cut = logits < logits.topk(top_k, dim=-1).values[..., -1:]
    if top_p < 1.0:
        cut = beyond_mass(logits if cut is None else logits.masked_fill(cut, -torch.inf), top_p)
    if min_p > 0.0:
        small = logits < logits.amax(-1, keepdim=True) + math.log(min_p)
        cut = small if cut is None else cut | small
    if cut is None:
        return logits
    if keep is not None:
        cut = cut.scatter(-1, keep[..., None], False)
    return logits.masked_fill(cut, -torch.inf)


def beyond_mass(logits: Tensor, top_p: float) -> Tensor:
    """What the smallest set of mass `top_p` leaves out (Holtzman 2020, section 3.1).  (k, v) -> (k, v) bool.

    On a CPU the likeliest candidates alone are put in order, unless their mass is too small: sorting a vocabulary
    takes longer than a small model's decoding step.  On a GPU asking would stop the queue, and sorting is quick.
    """
    width = logits.shape[-1] if logits.is_cuda else min(CANDIDATES, logits.shape[-1])
    probs = logits.softmax(-1)
    ordered, index = probs.topk(width, dim=-1)
    if width < logits.shape[-1] and bool((ordered.sum(-1) < top_p).any()):
        ordered, index = probs.sort(dim=-1, descending=True)
    return torch.ones_like(logits, dtype=torch.bool).scatter(-1, index, ordered.cumsum(-1) - ordered >= top_p)


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[tokens].  (k, v) float32, (k,) -> (k,)."""
    chosen = logits.gather(-1, tokens[..., None]).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats; cut entries (-inf) count as probability 0.  (k, v) -> (k,)."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
