"""Sharded weights through PyTorch's FSDP2 (Rajbhandari 2020, ZeRO stages 2 and 3; Zhao 2023), block by block.

Each rank holds 1 / n of every float32 weight with its gradient and optimiser state.  A block's weights are gathered
before its forward pass, in the compute type, and its gradients are summed in float32.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from kinkajou.errors import UserError
from kinkajou.parallel import files
from kinkajou.parallel.ranks import Ranks
from kinkajou.parallel.tensors import split_matrices

SPARE = 0.5
"""Share of the device's free memory that gemini fills with shards; the rest is for gathered blocks and activations."""
STATES = 4
"""Float32 numbers that lie beside each other for a trained weight: itself, its gradient, two moments of Adam."""


class Divided(Protocol):
    """What a model says of itself to be sharded."""

    dtype: str
    blocks: list[nn.Module]
    wide: list[nn.Module]
    """Modules that compute in float32 whatever the compute type."""
    root: nn.Module
    """The module whose `forward` and `run` are all ways to the blocks."""

    def hand_over(self, device: torch.device) -> None:
        """From now on weights are gathered on that device, in the compute type."""
        ...


@dataclass(frozen=True)
class Placement:
    """Where shards lie: `gathered` keeps whole weights from the forward to the backward pass; `host` keeps all shards
    there (True), none (False), or as many as the device has no room for (None)."""

    gathered: bool = False
    host: bool | None = False


ZERO2, ZERO2_CPU = Placement(gathered=True), Placement(gathered=True, host=True)
ZERO3, GEMINI = Placement(), Placement(host=None)


class Sharded(Ranks):
    sharded = True

    def __init__(
        self,
        placement: Placement,
        *,
        tp: int = 1,
        device_share: float | None = None,
        **joining: Any,
    ) -> None:
        super().__init__(tp=tp, **joining)
        self.placement, self.device_share = placement, device_share

    def wrap(self, model: nn.Module) -> nn.Module:
        if not all(param.is_floating_point() for param in model.parameters()):
            raise UserError("quantised weights are not sharded", fix="--strategy naive or ddp")
        divided = cast(Divided, model)
        trained = any(param.requires_grad for param in model.parameters())
        if self.tp > 1:
            split_matrices(divided.root, self.mesh["tensor"])
        divided.hand_over(self.device)
        units = [*divided.blocks, *divided.wide, divided.root]
        hosted = self._hosted(units)
        for number, unit in enumerate(units):
            wide = any(unit is module for module in divided.wide)
            half = torch.bfloat16 if divided.dtype == "bf16" and not wide else None
            fully_shard(
                unit,
                mesh=self.mesh["data"],
                # A frozen model has no backward pass that would give its weights back.
                reshard_after_forward=not (trained and self.placement.gathered),
                # Inputs stay as they are: counts and slopes of the loss are float32.
                mp_policy=MixedPrecisionPolicy(
                    param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
                ),
                offload_policy=on_host(self.device) if number < hosted else OffloadPolicy(),
            )
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device)
        for unit in units:
            # Now each gathered weight learns whether it is trained; adapters are switched off and on later.
            cast(FSDPModule, unit).unshard()
            cast(FSDPModule, unit).reshard()
        give_back(divided.root)
        return model

    def _hosted(self, units: list[nn.Module]) -> int:
        """How many of the units keep their shards on the host, the first of them."""
        if self.placement.host is not None:
            return len(units) if self.placement.host else 0
        share = self.device_share
        if share is None:
            share = self._fitting(units)
        kept = int(share * len(units))
        place = "the device" if self.device.type != "cpu" else "the device (which is the host here)"
        self.notes.append(
            f"gemini: shards of {kept} of {len(units)} blocks on {place}, {len(units) - kept} on the host"
        )
        return len(units) - kept

    def _fitting(self, units: list[nn.Module]) -> float:
        """Share of the shards, with gradients and optimiser state, that the device has room for; all ranks agree."""
        if self.device.type == "cpu":
            return 0.0
        free, _ = torch.cuda.mem_get_info(self.device)
        params = {id(param): param for unit in units for param in unit.parameters()}
        needed = sum(
            param.numel() * param.element_size() * (STATES if param.requires_grad else 1) for param in params.values()
        )
        share = torch.tensor(min(1.0, SPARE * free * self.world / max(1, needed)), device=self.device)
        dist.all_reduce(share, op=dist.ReduceOp.MIN)
        return float(share)

    def passes(self, number: int) -> int:
        most = torch.tensor(number, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def backward(self, loss: Tensor) -> None:
        (loss * self.world).backward()  # type: ignore[no-untyped-call]  # undoes FSDP's average

    def clip_grads(self, model: nn.Module, max_norm: float) -> Tensor:
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        norm: Tensor = torch.stack([part.to(self.device) for part in norms(grads)]).norm()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            local = own_part(grad)
            local.mul_(scale.to(local.device))
        return norm

    def full(self, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return x
        local = x.to_local()
        if local.device == self.device:
            return x.full_tensor()
        local = local.to(self.device)
        here = DTensor.from_local(local, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())
        return here.full_tensor()

    def full_state(self, model: nn.Module) -> dict[str, Tensor] | None:
        found: dict[str, Tensor] = {}
        seen: dict[int, Tensor] = {}  # tied weights are one tensor, and are written once
        for name, x in model.state_dict(keep_vars=True).items():
            if id(x) not in seen:
                whole = self.full(x.detach())
                seen[id(x)] = whole.to("cpu", copy=x.requires_grad) if self.main else whole.new_empty(0)
            if self.main:
                found[name] = seen[id(x)]
        return found if self.main else None

    def saver(self, tensors: Mapping[str, Tensor]) -> Callable[[Path], None]:
        if not any(isinstance(x, DTensor) for x in tensors.values()):
            return super().saver(tensors)
        own = {name: files.held(x.detach()) for name, x in tensors.items() if self._writes(x)}
        parts = {name: (x, offsets) for name, (x, offsets) in own.items() if x.numel()}
        return files.writer(parts, f"-{dist.get_rank() + 1:05d}-of-{dist.get_world_size():05d}.safetensors")

    def _writes(self, x: Tensor) -> bool:
        """Whether this is the process that writes its part: of those that hold the same, the first."""
        if not isinstance(x, DTensor):
            return self.main
        dims = zip(x.device_mesh.mesh_dim_names or (), x.placements, strict=True)
        split = {name for name, placement in dims if not placement.is_replicate()}
        return all(name in split or self.mesh.get_local_rank(name) == 0 for name in ("data", "tensor"))


def own_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be a shard."""
    return x.to_local() if isinstance(x, DTensor) else x


def on_host(device: torch.device) -> OffloadPolicy:
    # Pinning needs a GPU; without one torch raises.
    return CPUOffloadPolicy(pin_memory=device.type == "cuda")


def norms(grads: Iterable[Tensor]) -> list[Tensor]:
    """The norms of gradients that lie alike, each of the whole matrices.  One of torch's takes no mixture."""
    groups: dict[Any, list[Tensor]] = {}
    for grad in grads:
        key = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        groups.setdefault((key, grad.device), []).append(grad)
    found = [nn.utils.get_total_norm(group) for group in groups.values()]
    return [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in found]


def give_back(root: nn.Module) -> None:
    """Lets go of gathered weights after a pass without gradients: nothing else would before they are stale."""
    register_fsdp_forward_method(root, "run")
    gathered = root.run

    def reshard(*_: Any) -> None:
        if not torch.is_grad_enabled():
            for module in root.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def run(*args: Any, **kwargs: Any) -> Any:
        out = cast(Any, gathered)(*args, **kwargs)
        reshard()
        return out

    root.run = run  # type: ignore[assignment]
    root.register_forward_hook(reshard)
