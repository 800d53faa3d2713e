"""Strategies: how parameters, gradients and optimiser state lie over ranks.  Trainers know only the protocol."""

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kinkajou.errors import UserError
from kinkajou.parallel import allocator

M = TypeVar("M", bound=nn.Module)


class Strategy(Protocol):
    rank: int
    world: int
    """Processes that have data of their own, and which of them this is."""
    main: bool
    """Whether this process speaks and writes for all."""
    device: torch.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """Places the model on this rank's device and makes its backward pass collective."""
        ...

    def unwrap(self, model: nn.Module) -> nn.Module: ...

    def sync(self, model: nn.Module, on: bool) -> None:
        """Whether the next forward and backward pass sums gradients over ranks; off while accumulating."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss that already carries the global denominator."""
        ...

    def clip_grads(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scales gradients down to `max_norm`; returns the norm they had."""
        ...

    def full_params(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]: ...

    def all_sum(self, x: Tensor) -> Tensor: ...

    def all_rows(self, x: Tensor) -> Tensor:
        """The ranks' equally shaped rows interleaved: row i of rank r is row i * world + r of the whole."""
        ...

    def gather(self, rows: Sequence[object]) -> list[object]:
        """The ranks' lists joined, rank by rank: rank r holds rows r, r + world, ... of the whole."""
        ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...


class Single:
    """One process."""

    rank, world, main = 0, 1, True

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def wrap(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model

    def sync(self, model: nn.Module, on: bool) -> None:
        return None

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def clip_grads(self, model: nn.Module, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def full_params(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        return self.unwrap(model).named_parameters()

    def all_sum(self, x: Tensor) -> Tensor:
        return x

    def all_rows(self, x: Tensor) -> Tensor:
        return x

    def gather(self, rows: Sequence[object]) -> list[object]:
        return list(rows)

    def barrier(self) -> None:
        return None

    def close(self) -> None:
        return None


class Replicated(Single):
    """DDP under torchrun: every rank holds everything.  gloo on CPU, nccl on GPU."""

    def __init__(self) -> None:
        if "LOCAL_RANK" not in os.environ:
            raise UserError(
                "strategy 'ddp' runs under torchrun",
                fix="torchrun --standalone --nproc_per_node=2 -m kinkajou sft ..., or --strategy naive",
            )
        gpu = torch.cuda.is_available()
        local = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cuda", local) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=600))
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.main = self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        model.to(self.device)
        if not any(param.requires_grad for param in model.parameters()):
            return model
        # torch 2.13 renames the option, and warns of the name that 2.11 has.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        buffers: dict[str, Any] = {name: False}
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **buffers)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return cast(nn.Module, model.module) if isinstance(model, DistributedDataParallel) else model

    def sync(self, model: nn.Module, on: bool) -> None:
        model.require_backward_grad_sync = on  # type: ignore[assignment]

    def backward(self, loss: Tensor) -> None:
        (loss * self.world).backward()  # type: ignore[no-untyped-call]  # undoes DDP's average

    def all_sum(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    def all_rows(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def gather(self, rows: Sequence[object]) -> list[object]:
        parts: list[Sequence[object]] = [()] * self.world
        dist.all_gather_object(parts, list(rows))
        return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        dist.destroy_process_group()


BUILT: dict[str, Callable[[], Strategy]] = {"naive": Single, "ddp": Replicated}


def make_strategy(name: str) -> Strategy:
    """The named strategy.  A process group without a strategy that uses it would train the same thing twice."""
    if name == "naive" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "strategy 'naive' is one process, but torchrun started several",
            evidence=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
            fix="say --strategy ddp, or start one process",
        )
    allocator.settle()
    return BUILT[name]()
