"""The one optimiser step in which every trainer ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from kinkajou.algos.losses import Loss
from kinkajou.batch import TokenBatch, split_by_tokens
from kinkajou.parallel.strategy import Strategy

B = TypeVar("B", bound=TokenBatch)


@dataclass(frozen=True)
class Objective:
    """A loss over this rank's rows.  `loss_fn(model, rows, count)` divides by the count it is handed."""

    batch: TokenBatch
    loss_fn: Callable[[nn.Module, Any, Tensor], Loss]
    weight: float = 1.0
    name: str = "loss"


def update(
    strategy: Strategy,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objectives: Sequence[Objective],
    *,
    tokens_per_microbatch: int,
    max_norm: float,
) -> dict[str, float]:
    """One step on the weighted sum of objectives: the same for any micro-batch size and number of ranks.

    Each objective is divided by its count over all ranks before anything is summed, so accumulation,
    normalisation and clipping are written once, here.  Returns the losses by name, their metrics and
    `grad_norm` before clipping.  A gradient that is not finite never reaches the weights.
    """
    counts = [strategy.all_sum(objective.batch.count) for objective in objectives]
    parts = [
        (objective, count, rows)
        for objective, count in zip(objectives, counts, strict=True)
        for rows in split_by_tokens(objective.batch, tokens_per_microbatch)
    ]
    totals: dict[str, Tensor] = {}
    for i, (objective, count, rows) in enumerate(parts):
        strategy.sync(model, i == len(parts) - 1)
        with record_function("kinkajou/forward"):
            loss = objective.loss_fn(model, objective.batch.select(rows), count)
        with record_function("kinkajou/backward"):
            strategy.backward(objective.weight * loss.value)
        for name, x in {objective.name: loss.value, **loss.metrics}.items():
            totals[name] = totals.get(name, torch.zeros((), device=x.device)) + x.detach()
    with record_function("kinkajou/clip"):
        norm = strategy.clip_grads(model, max_norm)
    if not torch.isfinite(norm):
        from kinkajou.train.nonfinite import not_finite  # it looks at objectives, so it comes after this module

        raise not_finite(strategy, model, parts, norm)
    with record_function("kinkajou/optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    summed = strategy.all_sum(torch.stack([totals[name].float() for name in totals]))
    return dict(zip(totals, summed.tolist(), strict=True)) | {"grad_norm": norm.item()}


@torch.no_grad()
def in_parts(batch: B, budget: int, fn: Callable[[B], Tensor]) -> Tensor:
    """`fn`, which returns (rows, t), over micro-batches of at most `budget` tokens, rows joined again; no gradient."""
    parts = [fn(batch.select(rows)) for rows in split_by_tokens(batch, budget)]
    # A rank may have no row of a small held-out set.
    return torch.cat(parts) if parts else torch.zeros(batch.mask.shape, device=batch.mask.device)
