"""What lies in memory during a run: its standing tensors by what they are for, and the peak of each phase."""

import gc
import resource
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kinkajou.engine.cache import Slots
from kinkajou.engine.paged import Pages
from kinkajou.models.forward import PackedModel, ScalarModel
from kinkajou.models.precision import Bfloat16
from kinkajou.train.averages import MovingAverage

INTERVAL_S = 0.005
STATM = Path("/proc/self/statm")
HOLDERS = (PackedModel, Optimizer, Bfloat16, MovingAverage, Slots, Pages)


def resident() -> int:
    """Bytes of main memory that the process holds; where the system does not say, the most it ever held."""
    if STATM.is_file():
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Peaks:
    """The most memory each phase came to: of the GPU's allocator, or of the process, which a thread looks at."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.by_phase = device, dict[str, int]()
        self.phase = ""
        self._over = threading.Event()

    def note(self) -> None:
        gpu = self.device.type == "cuda"
        now = torch.cuda.max_memory_allocated(self.device) if gpu else resident()
        self.by_phase[self.phase] = max(self.by_phase.get(self.phase, 0), now)
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """What comes to lie now is that phase's."""
        before = self.phase
        self.note()
        self.phase = phase
        try:
            yield
        finally:
            self.note()
            self.phase = before

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._look, daemon=True)
        if self.device.type == "cpu":
            thread.start()
        try:
            yield
        finally:
            self.stop()
            if thread.is_alive():
                thread.join()

    def stop(self) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(INTERVAL_S):
            self.note()


@dataclass
class Standing:
    """Bytes of what lies between two steps, each tensor counted once, and of one optimiser's gradients."""

    parts: dict[str, int] = field(default_factory=dict)
    gradients: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def holders() -> list[Any]:
    """Every object of the process that keeps tensors for longer than a pass.

    The collector knows them all; no trainer needs to hand out what it holds, whatever stage it is.
    """
    return [x for x in gc.get_objects() if issubclass(type(x), HOLDERS)]


def standing(found: Iterable[Any], *, scalar: str) -> Standing:
    """`scalar` is what the stage calls a scalar model that it trains."""
    everything, seen, result = list(found), set[int](), Standing()

    def put(name: str, tensors: Iterable[Any]) -> None:
        for x in tensors:
            if isinstance(x, Tensor) and x.data_ptr() not in seen:
                seen.add(x.data_ptr())
                result.parts[name] = result.parts.get(name, 0) + size(x)

    optimizers = [x for x in everything if isinstance(x, Optimizer)]
    trained = [[p for group in x.param_groups for p in group["params"]] for x in optimizers]
    ids = {id(param) for params in trained for param in params}
    models = [x for x in everything if isinstance(x, PackedModel)]
    for model in sorted(models, key=lambda x: not is_trained(x, ids)):
        put(role(model, ids, scalar), [*model.parameters(), *model.buffers()])
    put(scalar, (param for params in trained for param in params))  # a head on a shared trunk
    for kind, name, tensors in (
        (Bfloat16, "bf16 copies", lambda x: x.copies),
        (MovingAverage, "moving average", lambda x: x.weights.values()),
        (Optimizer, "optimiser state", lambda x: (y for state in x.state.values() for y in state.values())),
    ):
        for x in everything:
            if isinstance(x, kind):
                put(name, tensors(x))
    caches = [x for x in everything if isinstance(x, Slots | Pages)]
    before = result.total
    put("KV cache", (y for x in caches for y in (*x.keys.values(), *x.values.values())))
    result.cache = result.total - before
    result.gradients = max((sum(map(size, params)) for params in trained), default=0)
    return result


def is_trained(model: nn.Module, ids: set[int]) -> bool:
    return any(id(param) in ids for param in model.parameters())


def role(model: PackedModel, ids: set[int], scalar: str) -> str:
    """What a model is there for: trained or not, scalar or not."""
    if isinstance(model, ScalarModel):
        return scalar if is_trained(model, ids) else "judges"
    return "policy" if is_trained(model, ids) else "reference"


def size(x: Tensor) -> int:
    return x.numel() * x.element_size()
