"""What a run really needs: bytes of live tensors by torch's allocator, traced over a whole run of some steps."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from kinkajou.train.watch import WATCHER, Watcher

PHASES = ("data", "train", "rollout", "score", "update")


@dataclass(frozen=True)
class Measured:
    """Bytes: the peak, what lies at the beginning of the last step, and the peak inside each phase."""

    peak: int
    standing: int
    phases: dict[str, int]


class Seen(Watcher):
    """Where the tensors lie that Python knows, before each step."""

    def __init__(self) -> None:
        self.places: list[set[int]] = []

    def step(self, number: int) -> None:
        tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
        local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
        self.places.append({x.untyped_storage().data_ptr() for x in local})


def measured(run: Callable[[], Any], *, sharded: bool) -> Measured:
    """Runs it with every allocation written down.  Tensors from before do not count.

    Gathered weights that other threads let go of are not told by torch's profiler: where weights are sharded, every
    step starts from the tensors that Python knows.
    """
    gc.collect()
    seen = Seen()
    token = WATCHER.set(seen)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    WATCHER.reset(token)
    events = list(flat(profiler.profiler.kineto_results.experimental_event_tree()))  # type: ignore[union-attr]
    windows = [
        (event.start_time_ns, event.end_time_ns, event.name.partition("/")[2])
        for event in events
        if event.name.startswith("kinkajou/") and event.name.partition("/")[2] in PHASES
    ]
    sizes = [
        (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
        for event in events
        if event.tag == _EventType.Allocation and event.extra_fields.device == torch.device("cpu")
    ]
    return curve(sorted(sizes), sorted(windows), seen.places if sharded else [])


def flat(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from flat(event.children)


def curve(sizes: list[tuple[int, int, int]], windows: list[tuple[int, int, str]], seen: list[set[int]]) -> Measured:
    """`sizes`: time, place and bytes, negative where they are let go."""
    starts = [begin for begin, _, name in windows if name in ("data", "rollout")]
    held: dict[int, int] = {}
    live = peak = standing = step = at = 0
    phases: dict[str, int] = {}
    for time, place, change in sizes:
        while step < len(starts) and time >= starts[step]:
            if seen:
                held = {key: size for key, size in held.items() if key in seen[step]}
                live = sum(held.values())
            standing, step = live, step + 1
        live -= held.pop(place, 0)
        if change > 0:
            held[place] = change
            live += change
        peak = max(peak, live)
        while at < len(windows) and windows[at][1] < time:
            at += 1
        for begin, end, name in windows[at : at + 2]:
            if begin <= time <= end:
                phases[name] = max(phases.get(name, 0), live)
    return Measured(peak, standing, phases)
