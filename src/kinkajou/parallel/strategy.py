"""Strategies: how parameters, gradients and optimiser state lie over ranks.  Trainers know only the protocol."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from kinkajou.parallel import files

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class Strategy(Protocol):
    rank: int
    world: int
    """Processes that have data of their own, and which of them this is."""
    processes: int
    """All of them, those of tensor parallel included."""
    main: bool
    """Whether this process speaks and writes for all."""
    device: torch.device
    sharded: bool
    """Whether a wrapped model's weights are spread over ranks, so that they are used by all ranks together."""
    notes: list[str]
    """What was decided on the way and the user should know."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Places the model on this rank's device and makes its backward pass collective."""
        ...

    def unwrap(self, model: nn.Module) -> nn.Module: ...

    def sync(self, model: nn.Module, on: bool) -> None:
        """Whether the next forward and backward pass sums gradients over ranks; off while accumulating."""
        ...

    def passes(self, number: int) -> int:
        """Passes through a wrapped model that this rank must make, if it has this many micro-batches of its own.

        Where weights are sharded every pass is made by all ranks together, so those with fewer make empty ones.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss that already carries the global denominator."""
        ...

    def clip_grads(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scales gradients down to `max_norm`; returns the norm they had."""
        ...

    def full_params(self, model: nn.Module, *, frozen: bool) -> Iterable[tuple[str, Tensor]]:
        """Trained parameters, or all of them, whole, one after the other; all ranks must go through them together."""
        ...

    def full(self, x: Tensor) -> Tensor:
        """A tensor that may be a shard, whole on the device; by all ranks together."""
        ...

    def full_state(self, model: nn.Module) -> dict[str, Tensor] | None:
        """The state dict whole in the main process's memory, as it is now; None elsewhere."""
        ...

    def saver(self, tensors: Mapping[str, Tensor]) -> Callable[[Path], None]:
        """Copies to the host what this process has to write of the tensors; what is returned writes it, in any thread.

        Whole tensors become PATH.safetensors, by the main process alone; shards become PATH-00001-of-00004.safetensors,
        one file of each process.  All ranks call this together, and each its own writer.
        """
        ...

    def fill(self, tensors: Mapping[str, Tensor], paths: Sequence[Path]) -> None:
        """Fills tensors in place from files that a `saver` or Hugging Face wrote, under any strategy and on any number
        of ranks."""
        ...

    def all_sum(self, x: Tensor) -> Tensor: ...

    def all_rows(self, x: Tensor) -> Tensor:
        """The ranks' equally shaped rows interleaved: row i of rank r is row i * world + r of the whole."""
        ...

    def gather(self, rows: Sequence[object]) -> list[object]:
        """The ranks' lists joined, rank by rank: rank r holds rows r, r + world, ... of the whole."""
        ...

    def agree(self, votes: Sequence[float]) -> list[float]:
        """The sums of all processes' votes, those of tensor parallel included."""
        ...

    def told(self, x: T) -> T:
        """What the main process has, in all processes."""
        ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...


class Single:
    """One process."""

    rank, world, processes, main, sharded = 0, 1, 1, True, False

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.notes: list[str] = []

    def wrap(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model

    def sync(self, model: nn.Module, on: bool) -> None:
        return None

    def passes(self, number: int) -> int:
        return number

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def clip_grads(self, model: nn.Module, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def full_params(self, model: nn.Module, *, frozen: bool) -> Iterable[tuple[str, Tensor]]:
        for name, param in self.unwrap(model).named_parameters():
            if frozen or param.requires_grad:
                yield name, self.full(param.detach())

    def full(self, x: Tensor) -> Tensor:
        return x

    def full_state(self, model: nn.Module) -> dict[str, Tensor] | None:
        if not self.main:
            return None
        trained = {id(x): x.detach().to("cpu", copy=True) for x in model.parameters() if x.requires_grad}
        return {name: trained.get(id(x), x.detach()) for name, x in model.state_dict(keep_vars=True).items()}

    def saver(self, tensors: Mapping[str, Tensor]) -> Callable[[Path], None]:
        if not self.main:
            return lambda path: None
        return files.writer({name: files.held(x) for name, x in tensors.items()}, ".safetensors")

    def fill(self, tensors: Mapping[str, Tensor], paths: Sequence[Path]) -> None:
        files.fill(tensors, paths)

    def all_sum(self, x: Tensor) -> Tensor:
        return x

    def all_rows(self, x: Tensor) -> Tensor:
        return x

    def gather(self, rows: Sequence[object]) -> list[object]:
        return list(rows)

    def agree(self, votes: Sequence[float]) -> list[float]:
        return [float(x) for x in votes]

    def told(self, x: T) -> T:
        return x

    def barrier(self) -> None:
        return None

    def close(self) -> None:
        return None
