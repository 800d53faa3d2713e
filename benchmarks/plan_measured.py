"""What a run really needs: bytes of live tensors by torch's allocator, traced over a whole run of some steps."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

PHASES = ("data", "train", "rollout", "score", "update")


@dataclass(frozen=True)
class Measured:
    """Bytes: the peak, what lies at the beginning of the last step, and the peak inside each phase."""

    peak: int
    standing: int
    phases: dict[str, int]


def measured(run: Callable[[], Any]) -> Measured:
    """Runs it with every allocation written down.  Tensors from before do not count."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    found = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes, windows = [], []
    for event in found:
        name = event.name()
        if name == "[memory]" and event.device_type() == DeviceType.CPU:
            sizes.append((event.start_ns(), event.nbytes()))
        elif name.startswith("kinkajou/") and name.partition("/")[2] in PHASES:
            windows.append((event.start_ns(), event.end_ns(), name.partition("/")[2]))
    return curve(sorted(sizes), sorted(windows))


def curve(sizes: list[tuple[int, int]], windows: list[tuple[int, int, str]]) -> Measured:
    live = peak = standing = 0
    phases: dict[str, int] = {}
    first = [begin for begin, _, name in windows if name in ("data", "rollout")][-1]
    at = 0
    for time, change in sizes:
        if time < first:
            standing = live + change
        live += change
        peak = max(peak, live)
        while at < len(windows) and windows[at][1] < time:
            at += 1
        for begin, end, name in windows[at : at + 2]:
            if begin <= time <= end:
                phases[name] = max(phases.get(name, 0), live)
    return Measured(peak, standing, phases)
