"""A run's own plan: what certainly does not fit is refused before it is loaded, and the peak is compared at the end."""

import os
import resource
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from kinkajou import config
from kinkajou.data.chat import ChatFormat
from kinkajou.errors import UserError
from kinkajou.plan.fitting import Room, planned, remedies
from kinkajou.plan.job import Job
from kinkajou.plan.memory import Memory
from kinkajou.train.plan_job import job_of
from kinkajou.train.plan_machine import host_memory
from kinkajou.train.plan_page import size
from kinkajou.train.profile_memory import resident


@dataclass(frozen=True)
class Planned:
    """Bytes that the plan expects, and what the process held when it was made."""

    peak: int
    gpu: bool
    held: int
    most: int

    def told(self) -> str:
        """The plan against the allocator of the GPU, or against the growth of the process, libraries included."""
        if self.gpu:
            return f"memory: planned {size(self.peak)}, measured {size(torch.cuda.max_memory_allocated())} at the peak"
        most = most_resident()
        if most <= self.most:
            return f"memory: planned {size(self.peak)}, within what this process held before"
        return f"memory: planned {size(self.peak)}, the process grew by {size(most - self.held)} at its peak"


PLANNED: ContextVar[Planned | None] = ContextVar("PLANNED", default=None)


def plan_run(cfg: config.StageConfig, form: ChatFormat, rows: Sequence[Any], *, answers: int = 0) -> None:
    """Plans with rows of the mean length of these (which have `tokens`), and `answers` tokens after each."""
    gpu, ranks = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    mean = sum(len(row.tokens) for row in rows) // max(1, len(rows)) + answers
    try:
        job = job_of(cfg, ranks=ranks, gpu=gpu, vocabulary=len(form.tokenizer), row_tokens=max(2, mean), per_node=local)
    except UserError:  # a model whose sizes are not known has no plan; what is wrong with it is said when it loads
        PLANNED.set(None)
        return
    memory = float(torch.cuda.mem_get_info()[1]) if gpu else None
    room = Room(memory, host_memory())
    made = planned(job, room)
    if cfg.run.preflight != "off":
        refuse_certain(job, room, made)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    peak = made.device_peak + (0 if gpu else made.host_peak)
    PLANNED.set(Planned(peak, gpu, resident(), most_resident()))


def refuse_certain(job: Job, room: Room, made: Memory) -> None:
    """What stands between two steps alone is more than there is."""
    device, host = made.standing.on_device, made.standing.on_host
    if job.how.gpu and room.memory is not None and device > room.memory:
        refuse(job, room, f"{size(device)} of each GPU, which has {size(room.memory)}")
    wanted = (host + (0 if job.how.gpu else device)) * job.layout.on_one_host
    if room.host is not None and wanted > room.host:
        refuse(job, room, f"{size(wanted)} of main memory, of which the machine has {size(room.host)}")


def refuse(job: Job, room: Room, needs: str) -> None:
    found = remedies(job, room, most=1)
    fix = f"{found[0].flags}; " if found else ""
    raise UserError(
        "the run cannot fit into memory",
        evidence=f"between two steps alone it needs {needs}",
        fix=f"{fix}kinkajou plan shows each part; --preflight off starts all the same",
    )


def most_resident() -> int:
    """The most bytes of main memory that the process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
