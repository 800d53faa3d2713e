"""A cluster that is not there: tensors without data, collectives that are only counted, torch's own memory tracker.

All that is private in PyTorch and needed for it stands here.  One process is rank 0 of any number: parameters and what
is computed from them are fake tensors (shapes, types and storages without memory); what comes from real tensors alone,
such as indices of packed rows, is computed.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "Sharded Param": "parameters",
    "Parameter": "parameters",
    "Buffer": "parameters",
    "Unsharded Param": "gathered",
    "All Gather": "gathered",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "Gradient": "gradients",
    "Reduce Scatter": "gradients",
    "OptState": "optimizer",
    "Optstate": "optimizer",
    "Activation": "activations",
    "Inputs": "activations",
    "Other": "activations",
    "Temp": "temporaries",
}
"""The trackers' names of what lies in memory, and ours."""
HOSTED = {"Sharded Param", "Sharded Grad", "OptState"}
"""What an offloading strategy keeps on the host."""
ATEN = torch.ops.aten


@dataclass
class World:
    """Collectives since they were last forgotten: calls of each kind, and bytes that this rank sends in rings."""

    ranks: int
    calls: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)

    def forget(self) -> None:
        self.calls, self.sent = Counter(), Counter()


class Imagined(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Above PyTorch's fake mode: real tensors stay real among themselves, and questions for a number get an answer."""

    def __init__(self, world: World) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.world = world

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with the tensors below
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.name(), args)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(isinstance(x, FakeTensor) for x in given):
            if not given and not whole_numbers(func, args, kwargs):
                return func(*args, **kwargs)
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is ATEN._local_scalar_dense.default:
            return {torch.bool: True}.get(given[0].dtype, 1.0 if given[0].is_floating_point() else 1)
        if func in (ATEN.allclose.default, ATEN.equal.default):
            return True
        if func is ATEN.index.Tensor:
            args = (args[0], numbered(args[1]))
        return func(*args, **kwargs)

    def _count(self, name: str, args: Any) -> None:
        name = name.partition("::")[2]
        for kind, found in (("all_gather", "gather"), ("reduce_scatter", "scatter"), ("all_reduce", "reduce")):
            if kind.replace("_", "") in name.replace("_", ""):
                self.world.calls[kind] += 1
                self.world.sent[kind] += sent(found, args)
                return
        if "wait" not in name and "barrier" not in name:
            self.world.calls[name] += 1


def sent(kind: str, args: Any) -> int:
    """Bytes that one rank of a ring sends in a collective, from an operator's arguments."""
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    sizes = [x.numel() * x.element_size() for x in tensors]
    if kind == "reduce":
        n = ranks_of(args)
        return 2 * sum(sizes) * (n - 1) // n
    if len(tensors) > 1:  # output and input are both given
        return max(sizes) - min(sizes)
    n = next(x for x in args if isinstance(x, int))
    return sizes[0] * (n - 1) if kind == "gather" else sizes[0] * (n - 1) // n


def ranks_of(args: Any) -> int:
    """Members of the process group among an operator's arguments."""
    for x in args:
        if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()):
            return int(dist.ProcessGroup.unbox(x).size())
    return int(_resolve_process_group(cast(Any, next(x for x in reversed(args) if isinstance(x, str)))).size())


def whole_numbers(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a new tensor holds whole numbers, so that something may be looked up by it."""
    if "dtype" in kwargs and kwargs["dtype"] is not None:
        return kwargs["dtype"] in (torch.int64, torch.bool)
    return func.overloadpacket is ATEN.arange and all(isinstance(x, int) for x in args)


def numbered(indices: Any) -> list[Any]:
    """Indices with numbers of places instead of truth values: fake tensors do not know how many are true."""
    found: list[Any] = []
    with unset_fake_temporarily():
        for x in indices:
            true = x is not None and x.dtype == torch.bool
            found += list(x.nonzero().unbind(1)) if true else [x]
    return found


@contextmanager
def imagined_world(ranks: int) -> Iterator[World]:
    """Inside, this process is rank 0 of that many.  Strategies are made first: their grids are of real tensors."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield World(ranks)
    finally:
        dist.destroy_process_group()


@contextmanager
def without_data(world: World) -> Iterator[None]:
    """Inside, what is built and what is computed from parameters has no data."""
    with warnings.catch_warnings(), staying(), FakeTensorMode(allow_non_fake_inputs=True), Imagined(world):
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        # A tracker looks for gradients of weights that are bound as bfloat16 copies.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        yield


@contextmanager
def staying() -> Iterator[None]:
    """Inside, modules stay where they are: there is one device, and torch cannot move a fake parameter that is known
    to anyone."""
    before = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        types = {x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)}
        return self if types <= {param.dtype for param in self.parameters()} else before(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.to = before  # type: ignore[method-assign]


class Peak:
    """Mixed into a tracker of torch's: the fullest moment of the device, by the tracker's own names."""

    host_share = 0.0
    most, most_on_host = -1, 0

    def begin(self, outer: nn.Module, host_share: float, called: Callable[[], None]) -> AbstractContextManager[None]:
        """`outer` is the module whose calls are told; the trackers stop at a second unless they forget the first."""
        self.outer, self.host_share = outer, host_share
        self.most, self.at, self.most_on_host = -1, dict[str, int](), 0
        return self._watching(outer, called)

    @contextmanager
    def _watching(self, outer: nn.Module, called: Callable[[], None]) -> Iterator[None]:
        tracker: Any = self

        def before(*_: Any) -> None:
            if isinstance(tracker, FSDPMemTracker):  # the other one is told before this hook
                tracker.reset_mod_stats()
            called()

        with tracker:
            handle = outer.register_forward_pre_hook(before, prepend=True)
            try:
                yield
            finally:
                handle.remove()

    def _update_peak_stats(self, peak_state: Any) -> None:
        now = {getattr(kind, "value", kind): size for kind, size in self.now().items()}
        total = now.pop("Total", 0)
        hosted = round(self.host_share * sum(now.get(kind, 0) for kind in HOSTED))
        self.most_on_host = max(self.most_on_host, hosted)
        if total - hosted > self.most:
            self.most, self.at = total - hosted, now

    def now(self) -> dict[Any, int]:
        snapshot: dict[torch.device, dict[Any, int]] = self._curr_mem_snap  # type: ignore[attr-defined]
        return snapshot.get(torch.device("cpu"), {})

    def split(self) -> dict[str, int]:
        """Bytes on the device at its fullest moment, by our kinds."""
        found: Counter[str] = Counter()
        for kind, size in self.at.items():
            found[KINDS[kind]] += round((1.0 - self.host_share if kind in HOSTED else 1.0) * size)
        return dict(found)


class ShardedPeak(Peak, FSDPMemTracker):  # type: ignore[no-untyped-call]
    pass


class WholePeak(Peak, MemTracker):  # type: ignore[no-untyped-call]
    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        # What is frozen, or bound as a bfloat16 copy, has no gradient of its own.
        own = all(param.is_leaf and param.requires_grad for param in module.parameters())
        return super()._track_module_params_and_buffers(module, install_grad_hooks and own)

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
        if module is self.outer:
            self.reset_mod_stats()
        super()._pre_fw_hook(module, inputs)


def tracker_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Peak:
    """torch's tracker for a model as a strategy has wrapped it."""
    root = getattr(model, "root", model)
    if isinstance(root, FSDPModule):
        return ShardedPeak(cast(nn.Module, root), optimizer)
    tracker = WholePeak()
    tracker.track_external(model, *([optimizer] if optimizer else []))
    return tracker


def answered(model: nn.Module) -> nn.Module:
    """The model; DDP's sums of gradients are answered by hand, because a fake group's own answer is nothing."""
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, summed_at_once)
    return model


def summed_at_once(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    dist.all_reduce(bucket.buffer())
    found: torch.futures.Future[Tensor] = torch.futures.Future()
    found.set_result(bucket.buffer())
    return found


def host_share(model: nn.Module) -> float:
    """Share of a wrapped model's weights that its strategy keeps on the host."""
    sizes = Counter[bool]()
    for module in model.modules():
        group: Any = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for param in group.fsdp_params if group else ():
            sizes[isinstance(group.offload_policy, CPUOffloadPolicy)] += param.sharded_param.numel()
    return sizes[True] / max(1, sizes.total())


def standing(model: nn.Module, optimizer: torch.optim.Optimizer | None, share: float) -> tuple[dict[str, int], int]:
    """Bytes by kind that a rank keeps of a model between passes, and on the host."""
    states = [x for entry in optimizer.state.values() for x in entry.values()] if optimizer else []
    trained, kept = map(local_bytes, ([*model.parameters(), *model.buffers()], states))
    hosted = round(share * trained), round(share * kept)
    return {"parameters": trained - hosted[0], "optimizer": kept - hosted[1]}, sum(hosted)


def local_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of what this rank holds of them, each storage once."""
    local = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
    return sum({id(st): st.nbytes() for x in local if isinstance(x, Tensor) for st in [x.untyped_storage()]}.values())
