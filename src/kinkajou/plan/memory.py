"""Bytes by part and phase, for one process, on its device and on its host."""

from dataclasses import dataclass, field, replace

from kinkajou.plan.activations import Pass, carried, in_flight, kept_by_layer, kept_outside
from kinkajou.plan.architecture import Architecture
from kinkajou.plan.job import HEAD_KEPT, SHARDED, Job

SPARE = 0.5
"""Share of a device that gemini fills with shards: parallel/sharded.py's."""
Parts = dict[str, float]


@dataclass(frozen=True)
class Phase:
    """What lies in memory at a phase's peak, by part."""

    name: str
    device: Parts
    host: Parts = field(default_factory=dict)

    @property
    def on_device(self) -> int:
        return round(sum(self.device.values()))

    @property
    def on_host(self) -> int:
        return round(sum(self.host.values()))


@dataclass(frozen=True)
class Memory:
    standing: Phase
    """What lies there between two steps."""
    phases: tuple[Phase, ...]

    @property
    def device_owner(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.on_device)

    @property
    def host_owner(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.on_host)

    @property
    def device_peak(self) -> int:
        return self.device_owner.on_device

    @property
    def host_peak(self) -> int:
        return self.host_owner.on_host


@dataclass(frozen=True)
class Model:
    """One model of a job: its parameters, and which of them are trained."""

    job: Job
    shape: Architecture
    scalar: bool = False
    trained: bool = True

    @property
    def how(self) -> Pass:
        return self.job.how

    @property
    def sharded(self) -> bool:
        return self.job.layout.strategy in SHARDED

    @property
    def whole(self) -> int:
        found = self.shape.scalar if self.scalar else self.shape.parameters
        return found + self.adapted + (self.shape.width if self.job.shared and not self.scalar else 0)

    @property
    def adapted(self) -> int:
        return self.shape.adapters(self.how.lora_rank) if self.trained and self.how.lora_rank else 0

    @property
    def learning(self) -> int:
        """Parameters with a gradient."""
        if not self.trained:
            return 0
        if not self.how.lora_rank:
            return self.whole
        return self.adapted + (self.shape.width if self.scalar or self.job.shared else 0)

    @property
    def block(self) -> float:
        """Parameters of a layer, adapters included, in one process of a tensor-parallel group."""
        return (self.shape.block + self.adapted / self.shape.layers) / self.job.layout.tp

    @property
    def block_learning(self) -> float:
        if not self.trained:
            return 0.0
        return self.adapted / self.shape.layers / self.job.layout.tp if self.how.lora_rank else self.block

    @property
    def outer(self) -> float:
        return self.whole - self.adapted - self.shape.layers * self.shape.block

    @property
    def held(self) -> float:
        """Parameters in one process: shards where the strategy shards."""
        mine = self.shape.layers * self.block + self.outer
        return mine / self.job.layout.data if self.sharded else mine

    @property
    def held_learning(self) -> float:
        outer = self.outer if self.trained and not self.how.lora_rank else self.learning - self.adapted
        mine = self.shape.layers * self.block_learning + outer
        return mine / self.job.layout.data if self.sharded else mine

    @property
    def stored(self) -> float:
        """Bytes of the weights in one process: float32, and bf16 what LoRA freezes where the compute type is that."""
        wide = self.held_learning if self.how.half and self.how.lora_rank else self.held
        return 4 * wide + 2 * (self.held - wide)

    @property
    def copied(self) -> float:
        """Parameters of which there is a bf16 copy beside the float32 one: all that is multiplied."""
        if not self.how.half or self.sharded:
            return 0.0
        if self.how.lora_rank:
            return self.adapted / self.job.layout.tp
        tied = self.scalar and self.shape.tied  # with a scalar head the embedding is only looked up
        looked_up = self.shape.positions * self.shape.width + (
            self.shape.embedding if tied or not self.shape.tied else 0
        )
        kept = self.shape.width if self.scalar or self.job.shared else 0
        return self.shape.layers * self.block + self.outer - looked_up - kept


def hosted(job: Job, needed: float, memory: float | None) -> float:
    """Share of the shards that lie on the host."""
    strategy = job.layout.strategy
    if strategy == "zero2_cpu":
        return 1.0
    if strategy != "gemini":
        return 0.0
    if job.layout.device_share is not None:
        return 1.0 - job.layout.device_share
    return 1.0 if memory is None else 1.0 - min(1.0, SPARE * memory / max(1.0, needed))


class Books:
    """A job's standing parts and the peaks of its phases.  `memory`: bytes of the device, which gemini fills."""

    def __init__(self, job: Job, *, memory: float | None = None) -> None:
        self.job, self.memory = job, memory
        self.policy = Model(job, job.policy)
        scorer = job.scorer or job.policy
        self.critic = Model(job, scorer, scalar=True) if job.critic and not job.shared else None
        self.judge = Model(replace(job, shared=False), scorer, scalar=True, trained=False)
        self.frozen = Model(replace(job, shared=False), job.policy, trained=False)
        if job.stage == "reward":
            self.policy = Model(job, job.policy, scalar=True)

    # --- what stands -------------------------------------------------------------------------------------------

    def standing(self) -> Phase:
        job, device, host = self.job, Parts(), Parts()
        for name, model in self.trained.items():
            away = self.away(model)
            for part, size in (
                (name, model.stored),
                ("optimiser state", 8 * model.held_learning),
            ):
                add(device, part, size * (1 - away))
                add(host, part, size * away)
            add(device, "bf16 copies", 2 * model.copied)
            if job.layout.strategy == "ddp":  # buckets stay, gradients are views of them
                add(device, "gradients", 4 * model.held_learning)
        half = 2 if job.how.half else 4
        if job.reference:
            self._frozen(device, host, "reference", self.frozen, half)
        for _ in range(job.judges):
            self._frozen(device, host, "reward models", self.judge, half)
        if job.average:
            add(device, "moving average", 4 * self.policy.held_learning)
        if job.reinforced and self.policy.sharded and job.engine_copy:
            add(device, "engine's copy", half * (self.policy.whole - self.policy.adapted))
        return Phase("between steps", device, host)

    def _frozen(self, device: Parts, host: Parts, name: str, model: Model, half: int) -> None:
        away = self.away(model)
        size = half * model.held
        add(device, name, size * (1 - away))
        add(host, name, size * away)

    @property
    def trained(self) -> dict[str, Model]:
        name = "reward model" if self.job.stage == "reward" else "policy"
        return {name: self.policy} | ({"critic": self.critic} if self.critic else {})

    def away(self, model: Model) -> float:
        if not model.sharded:
            return 0.0
        models = list(self.trained.values())
        needed = sum(4 * x.held + 12 * x.held_learning for x in models)
        return hosted(self.job, needed, self.memory)

    # --- gathered weights --------------------------------------------------------------------------------------

    def gathered(self, model: Model, *, blocks: float, training: bool = False) -> float:
        """Bytes of whole weights beside the shards: those outside the blocks, and so many blocks."""
        if not model.sharded:
            return 0.0
        stay = training and model.trained and self.job.layout.strategy in ("zero2", "zero2_cpu")
        return self.job.how.bytes * (model.outer + (model.shape.layers if stay else blocks) * model.block)

    def reduced(self, model: Model, *, summing: bool) -> float:
        """Bytes of a block's whole gradients, beside those outside the blocks, and of the buffer in which those of the
        block before are summed."""
        if not model.sharded:
            return 0.0
        outer = model.outer if not self.job.how.lora_rank else 0.0
        return self.job.how.bytes * (model.block_learning + outer) + 4 * model.block_learning * summing

    # --- training ----------------------------------------------------------------------------------------------

    def update(self, name: str, model: Model) -> Phase:
        """The peak over one optimiser step's passes: forward, then layer by layer backward, then the step."""
        job, how = self.job, self.job.how
        base = self.standing()
        away = self.away(model)
        n, a = job.pack, model.shape
        layer = n * kept_by_layer(a, how, length=job.length) / job.layout.tp
        thin = n * carried(a, how)
        outside = n * kept_outside(a, how)
        kept = thin if how.checkpointing else layer
        again = layer if how.checkpointing else 0.0
        forward, backward = self.head(model, n)
        buckets = job.layout.strategy == "ddp"
        before = job.passes > 1  # gradients of earlier micro-batches are there already
        grads = 0.0 if buckets or (model.sharded and away) else 4 * model.held_learning
        moment = best(
            self._moments(model, grads, before, kept, again, outside, forward, backward),
        )
        device = dict(base.device)
        host = dict(base.host)
        for part, size in moment.items():
            add(device, part, size)
        if model.sharded and away:
            add(device, "gradients", 4 * model.held_learning * (1 - away))
            add(host, "gradients", 4 * model.held_learning * away)
        return Phase(name, device, host)

    def _moments(
        self,
        model: Model,
        grads: float,
        before: bool,
        kept: float,
        again: float,
        outside: float,
        forward: Parts,
        backward: Parts,
    ) -> list[Parts]:
        """What lies beside the standing parts at each moment that can be the peak."""
        layers = model.shape.layers
        all_kept = layers * kept + outside
        outer = 4 * model.outer / (self.job.layout.data if model.sharded else 1)
        own_outer = 0.0 if self.job.how.lora_rank or not grads else outer
        each = (grads - own_outer) / layers
        flow = self.job.pack * self.flowing(model)
        earlier = {"activations": all_kept, "gradients": grads if before else 0.0}
        earlier["gathered weights"] = self.gathered(model, blocks=0, training=True)
        moments = [{**earlier, **forward}, {**earlier, **backward}]
        # A block and the buffer in which the next one comes meanwhile.
        whole = self.gathered(model, blocks=2, training=True)
        table = self.table(model)
        for done in range(layers):
            there = grads if before else own_outer + done * each
            moments.append(
                {
                    "activations": (layers - done) * kept + again + flow,
                    "gradients": there + self.passing(model),
                    "gathered weights": whole,
                    "communication": self.reduced(model, summing=done > 0),
                }
            )
        last = {"gathered weights": whole, "communication": self.reduced(model, summing=True)}
        moments.append({"activations": flow / 2, "gradients": grads + table, **last})
        return moments

    def flowing(self, model: Model) -> float:
        """Bytes a token of gradients inside a layer on the way back."""
        return in_flight(model.shape, self.job.how)

    def passing(self, model: Model) -> float:
        """Bytes of the largest weight's gradient before it is added."""
        if self.job.how.lora_rank:
            return 0.0
        largest = max(x * y for x, y in model.shape.matrices) / self.job.layout.tp
        return (6 if self.job.how.half else 4) * largest

    def table(self, model: Model) -> float:
        """Bytes of the embedding's own gradient, where it is added to the head's."""
        return 0.0 if self.job.how.lora_rank else 4.0 * model.shape.embedding

    def head(self, model: Model, n: int) -> tuple[Parts, Parts]:
        """At the end of the forward pass and at the start of the backward one."""
        job, how = self.job, self.job.how
        c, v, k = model.shape.width, model.shape.vocabulary, job.counted
        if model.scalar:
            return {}, {"logits": 4.0 * 2 * c * n}
        b = how.bytes
        learning = 0 if how.lora_rank else 4 * model.shape.embedding
        tile = (4 + (2 if how.half else 0)) * job.tile(k) * v
        other = 4 * job.tile(k) * v if job.entropy else 0
        hidden, sums = b * k * c, b * k * c
        if job.stage == "sft":  # gradients are made in the forward pass
            return {"logits": hidden + sums + learning + tile}, {"logits": hidden + sums + learning + b * n * c}
        logits = b * k * v if k * v <= HEAD_KEPT[how.gpu] else 0
        forward = {"logits": float(hidden + logits + tile + other)}
        return forward, {"logits": float(hidden + logits + tile + sums + learning)}

    # --- the other phases --------------------------------------------------------------------------------------

    def scoring(self) -> Phase:
        """Log-probabilities and scores of a step's answers, without gradients."""
        job, base = self.job, self.standing()
        device = dict(base.device)
        n = job.score_pack
        k = n // job.length * job.new_tokens
        b, v = job.how.bytes, job.policy.vocabulary
        tile = (4 + (2 if job.how.half else 0)) * job.tile(k) * v
        deep = n * in_flight(job.policy, job.how) / job.layout.tp + n * b * job.policy.width
        add(device, "activations", max(deep, n * b * job.policy.width + 2.0 * b * k * job.policy.width))
        add(device, "logits", tile)
        models = [model for model in (self.policy, self.critic) if model]
        # In a forward pass the buffer of the block at work is kept too, until the next one has come.
        add(device, "gathered weights", max(self.gathered(model, blocks=3) for model in models))
        add(device, "rows", self.rows)
        return Phase("scoring", device, base.host)

    @property
    def rows(self) -> float:
        """Bytes of a step's answers with what is known of each token."""
        columns = {"ppo": 8 + 4 * 6 + 2, "grpo": 8 + 4 * 4 + 1}.get(self.job.stage, 9)
        return float(columns * self.job.samples * self.job.length)

    def rollout(self) -> Phase:
        job, how, a = self.job, self.job.how, self.job.policy
        base = self.standing()
        device = dict(base.device)
        slots = min(job.slots, job.own_samples)
        add(device, "KV cache", how.bytes * 2.0 * a.layers * slots * job.length * a.keyed / job.layout.tp)
        add(device, "logits", 4.0 * 3 * slots * a.vocabulary)
        prompts = slots * (job.length - job.new_tokens)
        add(device, "activations", prompts * (in_flight(a, how) + how.bytes * a.width) / job.layout.tp)
        if self.policy.sharded and not job.engine_copy:
            add(device, "gathered weights", self.gathered(self.policy, blocks=3))
        return Phase("rollout", device, base.host)

    def loading(self) -> Phase:
        """The last model comes to lie beside the others; before they are sharded, each process holds it whole."""
        base = self.standing()
        device = {name: size for name, size in base.device.items() if name != "optimiser state"}
        host = {name: size for name, size in base.host.items() if name != "optimiser state"}
        if self.policy.sharded:
            add(host, "whole weights", 4.0 * max(model.whole for model in self.trained.values()))
        return Phase("load", device, host)

    def memory_of(self) -> Memory:
        phases = [self.loading()]
        if self.job.reinforced:
            phases += [self.rollout(), self.scoring()]
        main = "policy update" if self.job.reinforced else "update"
        phases.append(self.update(main, self.policy))
        if self.critic:
            phases.append(self.update("critic update", self.critic))
        return Memory(self.standing(), tuple(phases))


def memory_of(job: Job, *, memory: float | None = None) -> Memory:
    """Bytes of every part in every phase; `memory` is the device's, which gemini fills."""
    return Books(job, memory=memory).memory_of()


def add(parts: Parts, name: str, size: float) -> None:
    if size:
        parts[name] = parts.get(name, 0.0) + size


def best(moments: list[Parts]) -> Parts:
    return max(moments, key=lambda parts: sum(parts.values()))
