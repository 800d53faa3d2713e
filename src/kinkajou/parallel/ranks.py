"""Several processes under torchrun: what they tell each other, and the strategy in which each holds everything."""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from kinkajou.errors import UserError
from kinkajou.parallel.launch import COLLECTIVE_S, join
from kinkajou.parallel.strategy import Single, T


class Ranks(Single):
    """Processes in a grid: `tp` neighbours share their rows and each matrix, the others split the rows."""

    def __init__(
        self,
        *,
        tp: int = 1,
        interface: str | None = None,
        start_timeout_s: float = 60.0,
        collective_timeout_s: float = COLLECTIVE_S,
    ) -> None:
        super().__init__()
        if dist.is_initialized():  # an imagined world (imagined.py)
            self.device = torch.device("cpu")
        else:
            bounds = {"start_timeout_s": start_timeout_s, "collective_timeout_s": collective_timeout_s}
            self.device = join(interface=interface, **bounds)
        everyone = self.processes = dist.get_world_size()
        if everyone % tp:
            raise UserError(
                "the processes cannot be grouped for tensor parallel",
                evidence=f"{everyone} processes, --tp {tp}",
                fix=f"start a multiple of {tp} processes, or choose --tp among the divisors of {everyone}",
            )
        self.mesh: DeviceMesh = init_device_mesh(
            self.device.type, (everyone // tp, tp), mesh_dim_names=("data", "tensor")
        )
        self.tp = tp
        self.group = self.mesh.get_group("data")
        self.rank, self.world = self.mesh.get_local_rank("data"), everyone // tp
        self.main = dist.get_rank() == 0

    def all_sum(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def all_rows(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts, dim=1).flatten(0, 1)

    def gather(self, rows: Sequence[object]) -> list[object]:
        parts: list[Sequence[object]] = [()] * self.world
        dist.all_gather_object(parts, list(rows), group=self.group)
        return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]

    def agree(self, votes: Sequence[float]) -> list[float]:
        sums = torch.tensor([float(x) for x in votes], device=self.device)
        dist.all_reduce(sums)
        return cast("list[float]", sums.tolist())

    def told(self, x: T) -> T:
        held = [x]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        dist.destroy_process_group()


class Replicated(Ranks):
    """DDP: every rank holds everything.  gloo on CPU, nccl on GPU."""

    def wrap(self, model: nn.Module) -> nn.Module:
        model.to(self.device)
        if not any(param.requires_grad for param in model.parameters()):
            return model
        # torch 2.13 renames the option, and warns of the name that 2.11 has.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        buffers: dict[str, Any] = {name: False}
        return DistributedDataParallel(model, process_group=self.group, gradient_as_bucket_view=True, **buffers)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return cast(nn.Module, model.module) if isinstance(model, DistributedDataParallel) else model

    def sync(self, model: nn.Module, on: bool) -> None:
        model.require_backward_grad_sync = on  # type: ignore[assignment]

    def backward(self, loss: Tensor) -> None:
        (loss * self.world).backward()  # type: ignore[no-untyped-call]  # undoes DDP's average
