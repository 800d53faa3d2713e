"""The one optimiser step in which every trainer ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from kinkajou.algos.losses import Loss
from kinkajou.batch import Passes, TokenBatch, passed, split_by_tokens
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
    company = [(objectives[0], counts[0], torch.zeros(1, dtype=torch.long))] * (
        strategy.passes(len(parts)) - len(parts)
    )
    totals: dict[str, Tensor] = {}
    for i, (objective, count, rows) in enumerate((*parts, *company)):
        strategy.sync(model, i == len(parts) - 1)
        with record_function("kinkajou/forward"):
            loss = objective.loss_fn(model, objective.batch.select(rows), count)
        with record_function("kinkajou/backward"):
            strategy.backward((objective.weight if i < len(parts) else 0.0) * loss.value)
        if i >= len(parts):  # a pass that other ranks need, and nobody's loss
            continue
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
def in_parts(batch: B, budget: int, fn: Callable[[B], Tensor], passes: Passes = int) -> Tensor:
    """`fn`, which returns (rows, t), over micro-batches of at most `budget` tokens, rows joined again; no gradient."""
    found = [(fn(part), counts) for part, counts in passed(batch, budget, passes)]
    parts = [x for x, counts in found if counts]
    # A rank may have no row of a small held-out set.
    return torch.cat(parts) if parts else torch.zeros(batch.mask.shape, device=batch.mask.device)
