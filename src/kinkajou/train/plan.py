"""`kinkajou plan`: what a recipe will need on machines that nobody has to have at hand."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from kinkajou import config
from kinkajou.errors import UserError
from kinkajou.plan.fitting import Room, fits, largest, on_machine, planned, remedies, singles
from kinkajou.plan.job import Job
from kinkajou.plan.memory import Books, Memory
from kinkajou.plan.rates import Machine, Times, machine, times_of
from kinkajou.plan.saving import saving_of
from kinkajou.plan.simulate import Change, Simulation, as_row, lines, settings_of
from kinkajou.train import plan_page
from kinkajou.train.plan_job import job_of
from kinkajou.train.plan_machine import here, host_memory, stated


@dataclass(frozen=True)
class Plan:
    job: Job
    room: Room
    machine: Machine
    memory: Memory
    times: Times

    @property
    def fits(self) -> bool:
        return fits(self.job, self.room)


def plan(cfg: config.StageConfig, show: config.PlanConfig) -> None:
    """Prints the plan."""
    made = make_plan(cfg, show)
    found = simulations(cfg, made) if show.simulate else []
    if show.json:
        print(json.dumps(as_json(made) | ({"simulated": [as_row(*one) for one in found]} if found else {}), indent=1))
        return
    console = Console(highlight=False)
    for block in plan_page.page(made.job, made.room, made.machine, made.memory, made.times, cfg.base.model):
        console.print(block, soft_wrap=isinstance(block, Text))
    if not made.fits:
        for block in plan_page.changes(singles(made.job, made.room), remedies(made.job, made.room)):
            console.print(block, soft_wrap=isinstance(block, Text))
    if made.room.memory is not None or made.room.host is not None:
        largest_one = largest(made.job, made.room)
        console.print(plan_page.largest_told(made.job.policy.family, largest_one), soft_wrap=True)
    for change, one in found:
        console.print("\n".join(lines(change, one, made.room.memory)), soft_wrap=True, markup=False)


def simulations(cfg: config.StageConfig, made: Plan) -> list[tuple[Change, Simulation]]:
    """The planned step on tensors without data; with a stated memory also changed settings, until one fits."""
    from kinkajou.train.simulated import Cluster, search  # it needs private parts of PyTorch, which a plan does not

    job = made.job
    long = dataclasses.replace(cfg, base=dataclasses.replace(cfg.base, max_len=job.length))
    scorer = settings_of(job.scorer) if job.scorer else None
    on = Cluster(job.layout.ranks, made.room.memory or math.inf, job.how.gpu)
    return search(long, settings_of(job.policy), on, scorer=scorer)


def make_plan(cfg: config.StageConfig, show: config.PlanConfig) -> Plan:
    ranks = show.gpus or int(os.environ.get("WORLD_SIZE", "1"))
    check_ranks(cfg, ranks)
    gpu = show.gpu != "cpu" if show.gpu else torch.cuda.is_available() or show.gpus is not None or bool(show.memory)
    found = machine(show.gpu) if show.gpu and gpu else here(gpu=gpu, half=cfg.base.dtype == "bf16")
    found = stated(found, tflops=show.tflops, bandwidth=show.bandwidth, link=show.link)
    say = (lambda text: None) if show.json else print
    job = job_of(cfg, ranks=ranks, gpu=gpu, row_tokens=show.row_tokens, per_node=show.per_node, say=say)
    # A machine that is only named has a host of its own, which nobody has spoken of.
    host = show.host_bytes or (None if show.gpu or show.gpus or show.memory else host_memory())
    room = Room(show.memory_bytes or found.memory, host) if gpu else Room(None, host)
    memory = planned(job, room)
    return Plan(job, room, found, memory, times_of(job, found, away=away(job, room)))


def away(job: Job, room: Room) -> float:
    books = Books(job, memory=room.usable)
    return books.away(books.policy)


def check_ranks(cfg: config.StageConfig, ranks: int) -> None:
    strategy, tp = cfg.parallel.strategy, cfg.parallel.tp
    if strategy == "naive" and ranks > 1:
        raise UserError(
            "strategy 'naive' is one process", evidence=f"--gpus {ranks}", fix="--strategy ddp, zero2 or zero3"
        )
    if ranks % tp:
        raise UserError("--tp does not divide the processes", evidence=f"--gpus {ranks}, --tp {tp}")


def as_json(made: Plan) -> dict[str, Any]:
    def phase_of(phase: Any) -> dict[str, Any]:
        parts = ("device", phase.device), ("host", phase.host)
        return {name: {part: round(size) for part, size in found.items()} for name, found in parts}

    job, memory = made.job, made.memory
    proposals = [] if made.fits else remedies(job, made.room)
    found = largest(job, made.room)
    return {
        "stage": job.stage,
        "parameters": job.policy.parameters,
        "ranks": job.layout.ranks,
        "fits": made.fits,
        "device": {"peak": memory.device_peak, "owner": memory.device_owner.name, "memory": made.room.memory},
        "host": {"peak": round(on_machine(job, memory)), "owner": memory.host_owner.name, "memory": made.room.host},
        "checkpoint": {name: round(x) for name, x in saving_of(job)._asdict().items()},
        "standing": phase_of(memory.standing),
        "phases": {phase.name: phase_of(phase) for phase in memory.phases},
        "estimate": {"machine": made.machine.name, "seconds": made.times.phases, "tokens": made.times.tokens},
        "changes": [{"flags": one.flags, "saving": one.saving, "host": one.host} for one in proposals],
        "largest": found[0] if found else None,
    }
