"""Likelihood of held-out answers."""

import torch

from kinkajou.algos.tensors import Sum, alone
from kinkajou.batch import Passes, TokenBatch, passed
from kinkajou.models.forward import LanguageModel


@torch.no_grad()
def mean_loss(
    model: LanguageModel, batch: TokenBatch, tokens_per_microbatch: int, *, all_sum: Sum = alone, passes: Passes = int
) -> float:
    """Mean negative log-likelihood of the counting targets of all ranks, nats per token."""
    total = torch.zeros(2, dtype=torch.float64, device=model.device)
    for part, counts in passed(batch.to(model.device), tokens_per_microbatch, passes):
        logp = model(part.tokens, part.mask).logp
        total += counts * torch.stack([-logp.double().sum(), part.count.double()])
    nll, count = all_sum(total).tolist()
    return float(nll / count)
