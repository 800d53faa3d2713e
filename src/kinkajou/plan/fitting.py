"""Whether a job fits into machines, the smallest changes that make it fit, and the largest model that does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from kinkajou.plan.architecture import GATED, NAMED, Architecture
from kinkajou.plan.job import SHARDED, Job
from kinkajou.plan.memory import Memory, memory_of

RESERVED = 2**30
"""Bytes of a GPU that its context, the libraries' workspaces and gaps between tensors take, about."""
ADAPTERS = 8
"""Rank of the adapters that are proposed."""


@dataclass(frozen=True)
class Room:
    """Bytes of one device and of one machine's host; None where nobody has said."""

    memory: float | None
    host: float | None

    @property
    def usable(self) -> float | None:
        return None if self.memory is None else self.memory - RESERVED


def planned(job: Job, room: Room) -> Memory:
    return memory_of(job, memory=room.usable)


def on_machine(job: Job, memory: Memory) -> float:
    """Bytes of the host's memory that all processes of one machine take; without GPUs that is all memory."""
    return float((memory.host_peak + (0 if job.how.gpu else memory.device_peak)) * job.layout.on_one_host)


def excess(job: Job, room: Room) -> tuple[float, float]:
    """Bytes too many on the device and on a machine's host."""
    memory = planned(job, room)
    over = 0.0 if room.usable is None or not job.how.gpu else max(0.0, memory.device_peak - room.usable)
    return over, 0.0 if room.host is None else max(0.0, on_machine(job, memory) - room.host)


def fits(job: Job, room: Room) -> bool:
    return excess(job, room) == (0.0, 0.0)


@dataclass(frozen=True)
class Change:
    """A setting and what it costs beside memory, as a rank: 1 hardly anything, 9 other hardware."""

    flag: str
    what: str
    cost: int
    apply: Callable[[Job], Job]

    @property
    def kind(self) -> str:
        return self.flag.split()[0]


@dataclass(frozen=True)
class Proposal:
    changes: tuple[Change, ...]
    saving: int
    """Bytes less at the device's peak."""
    host: int
    """Bytes more at one machine's host."""

    @property
    def flags(self) -> str:
        return " ".join(change.flag for change in self.changes)


def changes_of(job: Job) -> Iterator[Change]:
    """What this job does not do yet."""
    how, layout = job.how, job.layout
    one = job.length * (2 if job.stage in ("reward", "prefer") else 1)
    if job.microbatch > one:
        yield Change(
            f"--tokens_per_microbatch {one}", "one row at a time, slower", 1, lambda j: replace(j, microbatch=one)
        )
    if not how.half:
        yield Change("--dtype bf16", "computes in bfloat16", 2, lambda j: replace(j, how=replace(j.how, half=True)))
    if not how.checkpointing:
        yield Change(
            "--gradient_checkpointing",
            "a third more time",
            2,
            lambda j: replace(j, how=replace(j.how, checkpointing=True)),
        )
    for name, what, cost in (
        ("zero2", "gradients and optimiser over all processes", 2),
        ("zero3", "everything over all processes", 3),
        ("zero2_cpu", "optimiser and weights on the host", 5),
        ("gemini", "what does not fit streams from the host", 6),
    ):
        if name != layout.strategy and (layout.data > 1 or name in ("zero2_cpu", "gemini")):
            yield Change(f"--strategy {name}", what, cost, strategy(name))
    if job.reinforced and job.engine_copy and layout.strategy in SHARDED:
        yield Change("--engine_weights sharded", "slower sampling", 4, lambda j: replace(j, engine_copy=False))
    if job.critic and not job.shared:
        yield Change(
            "--backbone shared", "the critic is a head on the policy's trunk", 4, lambda j: replace(j, shared=True)
        )
    if not how.lora_rank:
        yield Change(
            f"--lora_rank {ADAPTERS}",
            "trains adapters alone",
            5,
            lambda j: replace(j, how=replace(j.how, lora_rank=ADAPTERS), reference=False),
        )
    yield from wider(job)


def wider(job: Job) -> Iterator[Change]:
    """More processes, or processes that share matrices."""
    layout, a = job.layout, job.policy
    if layout.strategy in SHARDED and layout.tp == 1 and a.family in GATED:
        for tp in (2, 4, 8):
            if layout.ranks % tp == 0 and a.kv_heads % tp == 0 and a.inner % tp == 0:
                yield Change(f"--tp {tp}", "each matrix over neighbours", 4, parallel(tp))
    for times in (2, 4, 8, 16):
        ranks = layout.ranks * times
        if job.rows % (ranks // layout.tp) == 0:
            yield Change(f"--gpus {ranks}", "more machines", 8 + times, processes(ranks))


def strategy(name: str) -> Callable[[Job], Job]:
    return lambda job: replace(job, layout=replace(job.layout, strategy=name))


def parallel(tp: int) -> Callable[[Job], Job]:
    return lambda job: replace(job, layout=replace(job.layout, tp=tp))


def processes(ranks: int) -> Callable[[Job], Job]:
    def apply(job: Job) -> Job:
        name = "ddp" if job.layout.strategy == "naive" else job.layout.strategy
        return replace(job, layout=replace(job.layout, ranks=ranks, strategy=name))

    return apply


def applied(job: Job, changes: tuple[Change, ...]) -> Job:
    # The strategy last: more processes alone would make ddp of naive.
    for change in sorted(changes, key=lambda change: change.kind == "--strategy"):
        job = change.apply(job)
    return job


def proposal(job: Job, changes: tuple[Change, ...], room: Room) -> Proposal:
    after = applied(job, changes)
    before, then = planned(job, room), planned(after, room)
    return Proposal(
        changes, before.device_peak - then.device_peak, round(on_machine(after, then) - on_machine(job, before))
    )


def singles(job: Job, room: Room) -> list[Proposal]:
    """Each change by itself, the largest saving first; those that save nothing are left out."""
    found = [proposal(job, (change,), room) for change in changes_of(job)]
    return sorted((one for one in found if one.saving > 0), key=lambda one: -one.saving)


def remedies(job: Job, room: Room, *, most: int = 3) -> list[Proposal]:
    """The sets of fewest changes that make it fit, the cheapest first."""
    known = list(changes_of(job))
    for size in (1, 2, 3, 4):
        sets = (chosen for chosen in combinations(known, size) if len({change.kind for change in chosen}) == size)
        held = [chosen for chosen in sets if fits(applied(job, chosen), room)]
        if held:
            held.sort(key=lambda chosen: sum(change.cost for change in chosen))
            return [proposal(job, chosen, room) for chosen in held[:most]]
    return []


def largest(job: Job, room: Room) -> tuple[str, Architecture] | None:
    """The largest model of the same family, among those known by name, that fits with these settings."""
    relatives = [(name, a) for name, a in NAMED.items() if a.family == job.policy.family]
    for name, a in sorted(relatives, key=lambda pair: -pair[1].parameters):
        if fits(replace(job, policy=a, scorer=a if job.scorer else None), room):
            return name, a
    return None
