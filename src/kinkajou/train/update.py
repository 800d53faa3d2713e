"""The one optimiser step in which every trainer ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from kinkajou import faults
from kinkajou.algos.losses import Loss
from kinkajou.batch import Passes, TokenBatch, passed, split_by_tokens
from kinkajou.memory import LESS, Budget, afford, needed
from kinkajou.parallel.sharded import own_part
from kinkajou.parallel.strategy import Strategy

B = TypeVar("B", bound=TokenBatch)


@dataclass(frozen=True)
class Objective:
    """A loss over this rank's rows.  `loss_fn(model, rows, count)` divides by the count it is handed."""

    batch: TokenBatch
    loss_fn: Callable[[nn.Module, Any, Tensor], Loss]
    weight: float = 1.0
    name: str = "loss"


Part = tuple[Objective, Tensor, Tensor]
"""A micro-batch: objective, global count, rows."""


class Guard(Protocol):
    """Who decides what becomes of a step that is not finite (train/skips.py)."""

    def taken(self, name: str) -> None: ...

    def left_out(self, name: str, fault: Any) -> None:
        """Returns where the run goes on without the step, else raises the fault."""
        ...


def update(
    strategy: Strategy,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objectives: Sequence[Objective],
    *,
    tokens_per_microbatch: int | Budget,
    max_norm: float,
    guard: Guard | None = None,
) -> dict[str, float]:
    """One step on the weighted sum of objectives: the same for any micro-batch size and number of ranks.

    Each objective is divided by its count over all ranks before anything is summed, so accumulation,
    normalisation and clipping are written once, here.  Returns the losses by name, their metrics and
    `grad_norm` before clipping.  A loss or gradient that is not finite never reaches the weights: without a guard
    the fault is raised, with one that goes on the step is left out on all ranks, and nothing is returned.
    """
    counts = [strategy.all_sum(objective.batch.count) for objective in objectives]
    costs = [cost for objective in objectives for cost in objective.batch.costs]

    def attempt(tokens: int) -> tuple[list[Part], dict[str, Tensor], Tensor]:
        optimizer.zero_grad()
        parts = [
            (objective, count, rows)
            for objective, count in zip(objectives, counts, strict=True)
            for rows in split_by_tokens(objective.batch, tokens)
        ]
        return parts, gradients(strategy, model, parts, (objectives[0], counts[0])), clipped(strategy, model, max_norm)

    parts, totals, norm = afford(tokens_per_microbatch, costs, "update", attempt)
    summed = strategy.all_sum(torch.stack([*(x.float() for x in totals.values()), (~torch.isfinite(norm)).float()]))
    own = {objective.name for objective in objectives}
    decisive = summed[[i for i, name in enumerate(totals) if name in own]]
    if not (torch.isfinite(decisive).all() & (summed[-1] == 0)):
        from kinkajou.train.nonfinite import not_finite  # it looks at objectives, so it comes after this module

        fault = not_finite(strategy, model, parts, norm)
        optimizer.zero_grad()
        if guard is None:
            raise fault
        guard.left_out(objectives[0].name, fault)
        return {}
    faults.reached("update.before_step")
    with record_function("kinkajou/optimizer"), needed("optimiser's step", LESS):
        optimizer.step()
        optimizer.zero_grad()
    faults.reached("update.after_step")
    if guard:
        guard.taken(objectives[0].name)
    return dict(zip(totals, summed.tolist(), strict=False)) | {"grad_norm": norm.item()}


def gradients(
    strategy: Strategy, model: nn.Module, parts: Sequence[Part], company: tuple[Objective, Tensor]
) -> dict[str, Tensor]:
    """Forward and backward pass of each micro-batch; returns losses and metrics by name, of this rank's rows.

    `company` is what a pass is made of that other ranks need, and that is nobody's loss.
    """
    empty = [(*company, torch.zeros(1, dtype=torch.long))] * (strategy.passes(len(parts)) - len(parts))
    totals: dict[str, Tensor] = {}
    for i, (objective, count, rows) in enumerate((*parts, *empty)):
        strategy.sync(model, i == len(parts) - 1)
        with record_function("kinkajou/forward"):
            loss = objective.loss_fn(model, objective.batch.select(rows), count)
        value = loss.value * float("nan") if faults.reached("update.forward") == "nan" else loss.value
        with record_function("kinkajou/backward"):
            strategy.backward((objective.weight if i < len(parts) else 0.0) * value)
        if faults.reached("update.backward") == "nan":
            spoil(model)
        if i >= len(parts):
            continue
        for name, x in {objective.name: value, **loss.metrics}.items():
            totals[name] = totals.get(name, torch.zeros((), device=x.device)) + x.detach()
    return totals


def clipped(strategy: Strategy, model: nn.Module, max_norm: float) -> Tensor:
    with record_function("kinkajou/clip"):
        return strategy.clip_grads(model, max_norm)


def spoil(model: nn.Module) -> None:
    """What a fault point asks for: a gradient that is not a number."""
    next(own_part(param.grad).fill_(float("nan")) for param in model.parameters() if param.grad is not None)


@torch.no_grad()
def in_parts(batch: B, budget: int | Budget, fn: Callable[[B], Tensor], passes: Passes = int) -> Tensor:
    """`fn`, which returns (rows, t), over micro-batches of at most `budget` tokens, rows joined again; no gradient."""

    def attempt(tokens: int) -> list[tuple[Tensor, bool]]:
        return [(fn(part), counts) for part, counts in passed(batch, tokens, passes)]

    found = afford(budget, batch.costs, "scoring", attempt)
    parts = [x for x, counts in found if counts]
    # A rank may have no row of a small held-out set.
    return torch.cat(parts) if parts else torch.zeros(batch.mask.shape, device=batch.mask.device)
