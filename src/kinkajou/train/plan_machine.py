"""The machine that is at hand: its memory, and its rates, measured in half a second."""

import dataclasses
import os
import time
from collections.abc import Callable
from functools import cache

import torch

from kinkajou.plan.rates import MACHINES, REACHED, Machine

SIZE, BYTES = 1024, 2**26
TRIES = 3


def here(*, gpu: bool, half: bool) -> Machine:
    """The present GPU by the table where it is known; a GPU that is planned without one at hand, as an A100; else the
    measured CPU."""
    if not gpu:
        return this_cpu(half)
    if not torch.cuda.is_available():
        return dataclasses.replace(MACHINES["a100"], name="a GPU like an A100", memory=None)
    name, memory = torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[1])
    known = [machine for key, machine in MACHINES.items() if key.split("-")[0].upper() in name.upper()]
    found = known[0] if known else MACHINES["a100"]
    return dataclasses.replace(found, name=name if known else f"{name}, rated as an A100", memory=memory)


@cache
def this_cpu(half: bool) -> Machine:
    """Products and copies, timed; the link of processes on one machine is its memory."""
    dtype = torch.bfloat16 if half else torch.float32
    x = torch.randn(SIZE, SIZE).to(dtype)
    rate = 2.0 * SIZE**3 / best_of(lambda: x @ x)
    source = torch.zeros(BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    moved = 2.0 * BYTES / best_of(lambda: target.copy_(source))
    return Machine("this CPU, measured", rate, rate, moved, moved / 4, moved, measured=True)


def best_of(work: Callable[[], object]) -> float:
    found = []
    for _ in range(TRIES):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def stated(machine: Machine, *, tflops: float | None, bandwidth: float | None, link: float | None) -> Machine:
    """With the rates that the user says; a stated rate of products is one that is reached."""
    if tflops:
        rate = tflops * 1e12 / (1.0 if machine.measured else REACHED)
        machine = dataclasses.replace(machine, fp32=rate, bf16=rate)
    if bandwidth:
        machine = dataclasses.replace(machine, bandwidth=bandwidth * 1e9)
    return dataclasses.replace(machine, link=link * 1e9) if link else machine


def host_memory() -> int | None:
    """Bytes of main memory of this machine, None where the system does not say."""
    names = os.sysconf_names
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
