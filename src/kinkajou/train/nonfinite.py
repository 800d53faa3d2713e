"""Where a loss or gradient that is not finite comes from: the first tensor that had it.

Costs nothing while all is well: the search runs the failed step again, on weights that it has not touched.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from kinkajou.errors import UserError
from kinkajou.parallel.sharded import own_part
from kinkajou.parallel.strategy import Strategy
from kinkajou.train.update import Part

AGAIN = "it came once: look at the machine (memory, GPU) if it comes again"


@dataclasses.dataclass(frozen=True)
class Scene:
    """The failed step as this rank knows it."""

    model: nn.Module  # as the strategy wrapped it
    parts: Sequence[Part]


class NotFinite(UserError):
    """A step that cannot be taken; `place` is the first tensor that was not finite, in the micro-batches of `rank`."""

    def __init__(
        self,
        place: str,
        evidence: str,
        fix: str,
        *,
        scene: Scene | None = None,
        rank: int = 0,
        what: str = "a loss or gradient",
    ) -> None:
        self.place, self.scene, self.rank, self.what = place, scene, rank, what
        super().__init__(
            f"the step is not finite, first in {place}; the weights were not touched",
            evidence=evidence,
            fix=fix,
            exit_code=3,
        )

    def ending(self, number: int, kept: str) -> "NotFinite":
        """The same as the end of a run, after so many in a row."""
        evidence = f"{self.evidence}; {number} in a row" if number > 1 else self.evidence
        fix = f"{self.fix}; {kept}" if kept else self.fix
        return NotFinite(self.place, evidence, fix, scene=self.scene, rank=self.rank, what=self.what)


@dataclasses.dataclass(frozen=True)
class Origin:
    place: str
    evidence: str
    fix: str


def not_finite(strategy: Strategy, model: nn.Module, parts: Sequence[Part], norm: Tensor) -> NotFinite:
    """The error of a step whose gradient has this norm, the same on all ranks: that of the first rank to have one."""
    scene = Scene(model, parts)
    found = (together if strategy.sharded else first_origin)(strategy.unwrap(model), parts, strategy)
    origins = cast("list[tuple[int, Origin | None]]", strategy.gather([(strategy.rank, found)]))
    for rank, origin in origins:
        if origin:
            process = f"process {rank}: " if strategy.world > 1 else ""
            evidence = f"{process}{origin.evidence}; gradient norm {norm.item()}"
            return NotFinite(origin.place, evidence, origin.fix, scene=scene, rank=rank)
    place, fix = "the sum of the gradients", "lower --lr: weights or activations have grown out of all bounds"
    if not norm.isinf():
        place, fix = "no tensor that was so again when the step was repeated", AGAIN
    return NotFinite(place, f"each micro-batch's gradient is finite; gradient norm {norm.item()}", fix, scene=scene)


def first_origin(model: nn.Module, parts: Sequence[Part], strategy: Strategy) -> Origin | None:
    """Looks through each micro-batch's forward pass, then through each one's backward pass."""
    for look in (forward_origin, backward_origin):
        for number, part in enumerate(parts, 1):
            if found := look(model, part):
                where = f"micro-batch {number} of {len(parts)}"
                return dataclasses.replace(found, evidence=f"{found.evidence}; {where}{lonely_row(model, part)}")
    return None


def together(model: nn.Module, parts: Sequence[Part], strategy: Strategy) -> Origin | None:
    """The same search where every pass is made by all ranks: none stops before the others have heard of it."""
    objective, count, _ = parts[0]
    company = (objective, count, torch.zeros(1, dtype=torch.long))
    number = strategy.passes(len(parts))
    everything = [*parts, *[company] * (number - len(parts))]
    for look in (forward_origin, backward_origin):
        found = [(i, origin) for i, part in enumerate(everything, 1) if (origin := look(model, part))]
        if strategy.passes(len(found)):
            i, origin = found[0] if found else (0, None)
            where = f"micro-batch {i} of {number}"
            return origin and dataclasses.replace(origin, evidence=f"{origin.evidence}; {where}")
    return None


@torch.no_grad()
def forward_origin(model: nn.Module, part: Part) -> Origin | None:
    """A batch column, a module's output, or the loss itself."""
    objective, count, rows = part
    batch = objective.batch.select(rows)
    with watched(model) as seen:
        loss = objective.loss_fn(model, batch, count)
    if torch.isfinite(loss.value):
        return None
    for item in dataclasses.fields(batch):
        column = getattr(batch, item.name)
        if holds_bad(column):
            return Origin(
                f"the batch's {item.name}", shown(column), "look at what fills it: rewards, reference, critic"
            )
    return (
        seen[0]
        if seen
        else Origin(
            f"the loss {objective.name!r}",
            f"{objective.name} {loss.value.item()}; every module's output is finite",
            "lower --lr, or look for a broken record in this step's batch",
        )
    )


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Origin]]:
    """While open, the first module whose output is not finite enters the list."""
    found: list[Origin] = []
    clean = "the embedding"

    def look(name: str, module: nn.Module, given: object, out: object) -> None:
        nonlocal clean
        bad = [x for x in tensors_in(out) if holds_bad(x)]
        if found or not bad:
            clean = clean if found or bad else name
            return
        weights = [key for key, param in module.named_parameters() if holds_bad(param)]
        if weights:
            place, fix = f"the weight {name}.{weights[0]}", "the model itself is broken: load another checkpoint"
        elif any(holds_bad(x) for x in tensors_in(given)):
            place, fix = f"{name} (its input)", f"it arose after {clean}, the last module that was clean; lower --lr"
        else:
            place, fix = f"{name} (its output; its input is finite)", "lower --lr, or use --dtype fp32"
        found.append(Origin(place, shown(bad[0]), fix))

    hooks = [
        module.register_forward_hook(
            lambda module, given, kwargs, out, name=name: look(short(name), module, (given, kwargs), out),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def backward_origin(model: nn.Module, part: Part) -> Origin | None:
    """The first parameter, in the order of the backward pass, whose gradient is not finite."""
    objective, count, rows = part
    model.zero_grad()
    found: list[Origin] = []

    def look(name: str, param: Tensor) -> None:
        if not found and param.grad is not None and holds_bad(param.grad):
            fix = "lower --lr or --max_norm, or use --dtype fp32; the loss itself is finite"
            found.append(Origin(f"the gradient of {name}", shown(param.grad), fix))

    hooks = [
        param.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda param, name=name: look(short(name), param)
        )
        for name, param in model.named_parameters()
        if param.requires_grad
    ]
    try:
        loss = objective.loss_fn(model, objective.batch.select(rows), count)
        (objective.weight * loss.value).backward()  # type: ignore[no-untyped-call]
        for name, param in reversed(list(model.named_parameters())):  # shards get theirs in another way
            look(short(name), param)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return found[0] if found else None


@torch.no_grad()
def lonely_row(model: nn.Module, part: Part) -> str:
    """The first row that is not finite on its own; empty where there is none."""
    objective, count, rows = part
    for row in rows.tolist():
        alone = objective.batch.select(torch.tensor([row], device=rows.device))
        if not torch.isfinite(objective.loss_fn(model, alone, count).value):
            return f", row {row} of the step's batch"
    return ""


def short(name: str) -> str:
    """A name as the model's own files have it."""
    return name.removeprefix("language.").removeprefix("module.")


def holds_bad(x: object) -> bool:
    """Of a shard: what this rank holds of it."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    return not bool(torch.isfinite(own_part(x)).all())


def shown(x: Tensor) -> str:
    x = own_part(x)
    nans, size = int(x.isnan().sum()), x.numel()
    return f"{nans:,} NaN and {int(x.isinf().sum()):,} infinite of {size:,} entries"


def tensors_in(x: object) -> Iterator[Tensor]:
    """Every tensor of a module's arguments or output."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for part in x.values():
            yield from tensors_in(part)
    elif isinstance(x, list | tuple):
        for part in x:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        yield from tensors_in([getattr(x, item.name) for item in dataclasses.fields(x)])
