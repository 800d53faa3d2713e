"""How fast machines are, and what a step takes on them: an estimate, since only a run knows."""

from dataclasses import dataclass

from kinkajou.errors import UserError, did_you_mean
from kinkajou.plan.job import SHARDED, Job
from kinkajou.plan.memory import Books, Model


@dataclass(frozen=True)
class Machine:
    """Rates of one device: operations a second in float32 and bfloat16, bytes a second of its memory, of its link to
    other devices and of that to its host; and the bytes that it holds."""

    name: str
    fp32: float
    bf16: float
    bandwidth: float
    link: float
    host_link: float
    memory: float | None = None
    measured: bool = False


GB = 2.0**30
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("h200", 67e12, 990e12, 4.8e12, 450e9, 50e9, 141 * GB),
        Machine("h100", 67e12, 990e12, 3.35e12, 450e9, 50e9, 80 * GB),
        Machine("a100", 19.5e12, 312e12, 2.0e12, 300e9, 25e9, 80 * GB),
        Machine("a100-40g", 19.5e12, 312e12, 1.55e12, 300e9, 25e9, 40 * GB),
        Machine("v100", 15.7e12, 15.7e12, 0.9e12, 150e9, 12e9, 32 * GB),
        Machine("l40s", 91e12, 362e12, 0.86e12, 25e9, 25e9, 48 * GB),
        Machine("a10", 31e12, 125e12, 0.6e12, 12e9, 25e9, 24 * GB),
        Machine("4090", 82e12, 165e12, 1.0e12, 12e9, 25e9, 24 * GB),
        Machine("3090", 35e12, 71e12, 0.94e12, 12e9, 25e9, 24 * GB),
        Machine("t4", 8.1e12, 8.1e12, 0.32e12, 12e9, 12e9, 16 * GB),
    )
}
"""By the makers' data sheets, without sparsity."""
REACHED = 0.4
"""Share of a machine's products that a training step reaches where they are looked up; measured ones are reached."""
ADAM_BYTES = 28
"""Read and written for each parameter of an optimiser step: weight, gradient, two moments."""


def machine(name: str) -> Machine:
    if name not in MACHINES:
        raise UserError(f"unknown GPU {name!r}", fix=did_you_mean(name, [*MACHINES, "cpu"]))
    return MACHINES[name]


@dataclass(frozen=True)
class Times:
    """Seconds of one step by phase, tokens that it trains on, and their number a second over all processes."""

    phases: dict[str, float]
    tokens: int

    @property
    def step_s(self) -> float:
        return sum(self.phases.values())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


def times_of(job: Job, on: Machine, *, away: float = 0.0) -> Times:
    """`away`: share of the shards on the host."""
    books = Books(job)
    phases: dict[str, float] = {}
    updates = max(1, job.samples * job.epochs // job.rows) if job.reinforced else 1
    tokens = job.rows * job.length
    if job.reinforced:
        phases["rollout"] = rollout_s(job, books.policy, on)
        readers = [books.policy, *([books.critic] if books.critic else [])]
        readers += [books.frozen] * job.reference + [books.judge] * job.judges
        own = job.own_samples * job.length
        phases["scoring"] = sum(flops(model, job, own, backward=False) for model in readers) / speed(job, on)
    main = "policy update" if job.reinforced else "update"
    phases[main] = updates * update_s(job, books.policy, on, away)
    if books.critic:
        phases["critic update"] = updates * update_s(job, books.critic, on, away)
    return Times(phases, (job.samples * job.length) if job.reinforced else tokens)


def speed(job: Job, on: Machine) -> float:
    return (on.bf16 if job.how.half else on.fp32) * (1.0 if on.measured else REACHED)


def flops(model: Model, job: Job, tokens: float, *, backward: bool) -> float:
    """Operations of one process: 2 for each multiplied weight and token, and attention's products over the row."""
    a = model.shape
    looked_up = a.positions * a.width + (a.embedding if model.scalar or not a.tied else 0)
    products = 2.0 * (model.whole - looked_up) + 2.0 * a.layers * a.attended * job.length
    passes = 1.0
    if backward:
        passes = (2.0 if job.how.lora_rank else 3.0) + (1.0 if job.how.checkpointing else 0.0)
    return passes * products * tokens / job.layout.tp


def update_s(job: Job, model: Model, on: Machine, away: float) -> float:
    tokens = job.own_rows * job.length
    compute = flops(model, job, tokens, backward=True) / speed(job, on)
    bandwidth = on.bandwidth * (1 - away) + on.host_link * away
    optimiser = ADAM_BYTES * model.held_learning / bandwidth
    moved = away * (job.how.bytes + 4) * model.held / on.host_link
    return max(compute, traffic(job, model) / on.link + moved) + optimiser


def traffic(job: Job, model: Model) -> float:
    """Bytes that one process sends over its link for one optimiser step, as rings send."""
    n = job.layout.data
    ring = (n - 1) / n
    learning, whole = 4.0 * model.learning / job.layout.tp, job.how.bytes * model.whole / job.layout.tp
    found = 0.0
    if job.layout.strategy == "ddp":
        found = 2 * ring * learning
    elif job.layout.strategy in SHARDED:
        gathers = 1 if job.layout.strategy in ("zero2", "zero2_cpu") else 2
        found = ring * (gathers * job.passes * whole + learning)
    if job.layout.tp > 1:  # after attention and after the inner layer, forward and backward
        between = 2.0 * (job.layout.tp - 1) / job.layout.tp * job.how.bytes * model.shape.width
        found += 4 * model.shape.layers * between * job.own_rows * job.length
    return found


def rollout_s(job: Job, model: Model, on: Machine) -> float:
    """A decoding step reads all weights and the cache, or multiplies them: whatever takes longer."""
    a, slots = model.shape, max(1, min(job.slots, job.own_samples))
    rounds = -(-job.own_samples // slots)
    cache = 2.0 * job.how.bytes * a.layers * a.keyed * slots * (job.length - job.new_tokens / 2)
    step_bytes = (job.how.bytes * (model.whole - (0 if a.tied else a.embedding)) + cache) / job.layout.tp
    step = max(step_bytes / on.bandwidth, flops(model, job, slots, backward=False) / speed(job, on))
    prompts = flops(model, job, job.own_samples * (job.length - job.new_tokens), backward=False) / speed(job, on)
    return rounds * job.new_tokens * step + prompts
