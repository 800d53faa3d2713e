"""The trainers' own steps in an imagined world: `update` with the losses of each stage, over models without data.

Generation is not simulated: it needs no gradients, and its cache is the plan's business (plan/memory.py).
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import ceil
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from kinkajou import config
from kinkajou.batch import GRPOBatch, JudgedBatch, PairBatch, PPOBatch, PreferenceBatch, TokenBatch
from kinkajou.errors import UserError
from kinkajou.models.forward import ActorCritic
from kinkajou.models.heads import scalar_head
from kinkajou.models.imagined import as_on_gpu, language_model, scalar_model
from kinkajou.models.load import LoadOptions
from kinkajou.parallel.imagined import World, answered, host_share, imagined_world, standing, tracker_of, without_data
from kinkajou.parallel.strategy import Strategy
from kinkajou.plan.simulate import Change, Passed, Simulation, Standing, ladder
from kinkajou.train import grpo, ppo, reward, setup, sft
from kinkajou.train.engines import COPY_SHARE
from kinkajou.train.optim import adamw
from kinkajou.train.parts import RLParts, drawn_from
from kinkajou.train.plan_job import needs_reference
from kinkajou.train.preference_tasks import JudgedTask, PairTask
from kinkajou.train.update import Objective, in_parts, update

Stage = config.SFTConfig | config.RewardConfig | config.PreferConfig | config.PPOConfig | config.GRPOConfig
MICROBATCHES = 2
"""As many show all there is: with a second, gradients of the first lie beside it."""


@dataclass(frozen=True)
class Actor:
    """A model as the strategy has wrapped it, and its optimiser if it is trained."""

    name: str
    model: nn.Module
    optimizer: Optimizer | None = None


@dataclass(frozen=True)
class Work:
    """A pass: the model that is called, the rows of one step, how many of them lie in a micro-batch."""

    name: str
    actor: Actor
    rows: int
    run: Callable[[int], Any]
    """Does it on that many rows."""
    times: int = 1


class Simulator:
    """Builds a stage's models in an imagined world and makes its passes."""

    def __init__(
        self,
        cfg: Stage,
        policy: Mapping[str, Any],
        scorer: Mapping[str, Any],
        *,
        s: Strategy,
        world: World,
        memory: float,
    ) -> None:
        self.cfg, self.s, self.world, self.memory = cfg, s, world, memory
        self.actors: list[Actor] = []
        self.works: list[Work] = []
        self.engine = 0
        if isinstance(cfg, config.PPOConfig | config.GRPOConfig):
            self._reinforced(cfg, policy, scorer)
        elif isinstance(cfg, config.RewardConfig):
            actor = self._trained("reward model", scalar_model(policy, options_of(cfg.base)))
            self._update(actor, "reward model update", cfg.batch_size, self._pairs, reward.loss_of(cfg))
        elif isinstance(cfg, config.PreferConfig):
            actor = self._trained("policy", language_model(policy, options_of(cfg.base)))
            judged = cfg.method.reads == "judged"
            task = JudgedTask(cfg.method, (), 0, cfg.base.max_len) if judged else PairTask(cfg.method, (), 0)
            made = self._judged if judged else self._compared
            self._update(actor, "policy update", cfg.batch_size, made, task.loss)
        else:
            actor = self._trained("policy", language_model(policy, options_of(cfg.base)))
            self._update(actor, "policy update", cfg.batch_size, self._chats, sft.token_loss)

    def _reinforced(
        self, cfg: config.PPOConfig | config.GRPOConfig, policy: Mapping[str, Any], scorer: Mapping[str, Any]
    ) -> None:
        """The models as `load_parts` and `load_critic` make them."""
        language = language_model(policy, options_of(cfg.base))
        self.engine = self._engine_bytes(cfg, language)
        shared = isinstance(cfg, config.PPOConfig) and cfg.algo.backbone == "shared"
        if shared:  # PyTorch's tracker knows no module that is entered by another way than `forward`
            raise UserError("a trunk that policy and critic share is not simulated", fix="--backbone separate")
        actor = self._trained(
            "policy", ActorCritic(language, scalar_head(language.width, seed=0)) if shared else language
        )
        plain = LoadOptions(dtype=cfg.base.dtype)
        if any(spec.startswith(("model:", "ensemble:")) for spec in cfg.judge.reward):
            judge = self._frozen("reward model", scalar_model(scorer, plain).freeze())
            self._scoring(judge, "reward model scoring", lambda b: cast(Any, judge.model)(b.tokens, b.mask, at="end"))
        if needs_reference(cfg) and not cfg.base.lora_rank:
            frozen = self._frozen("reference", language_model(policy, plain).freeze())
            self._scoring(frozen, "reference scoring", lambda b: cast(Any, frozen.model)(b.tokens, b.mask).logp)
        samples, epochs = cfg.algo.minibatch_size, cfg.algo.epochs
        all_rows = cfg.rollout.prompts_per_step
        if isinstance(cfg, config.GRPOConfig):
            all_rows *= cfg.algo.group_size
        updates = epochs * max(1, all_rows // samples)
        state = SimpleNamespace(kl_coef=cfg.kl.kl_coef)
        parts = cast(RLParts, SimpleNamespace(state=state, sampling=drawn_from(cfg)))
        if isinstance(cfg, config.GRPOConfig):
            self._update(actor, "policy update", samples, self._answers, grpo.loss_of(cfg, parts), updates)
            return
        actor_loss, value_loss, shared_loss = ppo.losses_of(cfg, parts)
        if shared:
            self._update(actor, "policy update", samples, self._valued, shared_loss, updates)
            return
        critic = self._trained("critic", scalar_model(scorer, options_of(cfg.base)))
        self._update(critic, "critic update", samples, lambda n: self._valued(n).for_critic(), value_loss, updates)
        self._update(actor, "policy update", samples, self._answers, actor_loss, updates)

    def _engine_bytes(self, cfg: config.PPOConfig | config.GRPOConfig, language: nn.Module) -> int:
        """A copy that a local engine samples from where weights are sharded: train/engines.py's rule."""
        if not self.s.sharded or cfg.engine.rollout != "local" or cfg.parallel.engine_weights == "sharded":
            return 0
        size = sum(param.numel() for param in language.parameters()) * (2 if cfg.base.dtype == "bf16" else 4)
        return size if cfg.parallel.engine_weights == "copy" or size <= COPY_SHARE * self.memory else 0

    def _trained(self, name: str, model: nn.Module) -> Actor:
        wrapped = answered(self.s.wrap(model))
        optimizer = adamw(model, lr=1e-5, weight_decay=self.cfg.optim.weight_decay)
        for param in model.parameters():
            param.grad = torch.zeros_like(param) if param.requires_grad else None
        # The optimiser's state, and DTensor's first look at every operation, which trackers mistake for memory.
        self.s.clip_grads(wrapped, self.cfg.optim.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        return self._kept(Actor(name, wrapped, optimizer))

    def _frozen(self, name: str, model: nn.Module) -> Actor:
        return self._kept(Actor(name, self.s.wrap(model)))

    def _kept(self, actor: Actor) -> Actor:
        self.actors.append(actor)
        return actor

    def _update(
        self,
        actor: Actor,
        name: str,
        rows: int,
        batch: Callable[[int], TokenBatch],
        loss: Callable[[nn.Module, Any, torch.Tensor], Any],
        times: int = 1,
    ) -> None:
        optimizer, optim = actor.optimizer, self.cfg.optim
        assert optimizer is not None

        def run(rows: int) -> None:
            update(
                self.s,
                actor.model,
                optimizer,
                [Objective(batch(rows), loss)],
                tokens_per_microbatch=optim.tokens_per_microbatch,
                max_norm=optim.max_norm,
            )

        self.works.append(Work(name, actor, rows, run, times))

    def _scoring(self, actor: Actor, name: str, fn: Callable[[TokenBatch], torch.Tensor]) -> None:
        cfg = cast(config.PPOConfig | config.GRPOConfig, self.cfg)
        group = cfg.algo.group_size if isinstance(cfg, config.GRPOConfig) else 1

        def run(rows: int) -> None:
            in_parts(self._chats(rows), cfg.optim.tokens_per_microbatch, fn, self.s.passes)

        self.works.append(Work(name, actor, cfg.rollout.prompts_per_step * group, run))

    def _chats(self, rows: int) -> TokenBatch:
        width = self.cfg.base.max_len
        return TokenBatch(torch.ones(rows, width, dtype=torch.long), torch.ones(rows, width - 1, dtype=torch.bool))

    def _pairs(self, rows: int) -> PairBatch:
        both = self._chats(2 * rows)
        width = both.mask.shape[1]
        return PairBatch(both.tokens.view(rows, 2, width + 1), both.mask.view(rows, 2, width))

    def _compared(self, rows: int) -> PreferenceBatch:
        pairs = self._pairs(rows)
        none = torch.zeros(rows, 2), torch.ones(rows), torch.zeros(rows, 3)
        return PreferenceBatch(pairs.tokens, pairs.mask, pairs.mask, *none)

    def _judged(self, rows: int) -> JudgedBatch:
        chats, none = self._chats(rows), torch.zeros(rows)
        return JudgedBatch(chats.tokens, chats.mask, torch.ones(rows, dtype=torch.bool), none, none)

    def _answers(self, rows: int) -> GRPOBatch:
        chats, cfg = self._chats(rows), cast(config.PPOConfig | config.GRPOConfig, self.cfg)
        mask = chats.mask.clone()
        mask[:, : -cfg.rollout.max_new_tokens] = False
        none = torch.zeros(mask.shape)
        return GRPOBatch(chats.tokens, mask, none, none, none, none)

    def _valued(self, rows: int) -> PPOBatch:
        b, none = self._answers(rows), torch.zeros(rows, self.cfg.base.max_len - 1)
        return PPOBatch(b.tokens, b.mask, none, none, none, none, b.mask, none, none)

    def standing(self) -> dict[str, Standing]:
        return {
            actor.name: Standing(*standing(actor.model, actor.optimizer, host_share(actor.model)))
            for actor in self.actors
        }

    def passes(self) -> Iterator[Passed]:
        """The last first: where the policy's update is too much, nobody needs to know the rest."""
        for work in reversed(self.works):
            own = ceil(work.rows / self.s.world)
            pair = 2 if isinstance(self.cfg, config.RewardConfig) or self._compares else 1
            held = max(1, self.cfg.optim.tokens_per_microbatch // (pair * self.cfg.base.max_len))
            number = ceil(own / held)
            rows = min(own, MICROBATCHES * held)
            if self.cfg.parallel.tp > 1:
                work.run(rows)  # DTensor looks at products too
            yield self._passed(work, rows, number)

    @property
    def _compares(self) -> bool:
        return isinstance(self.cfg, config.PreferConfig) and self.cfg.method.reads != "judged"

    def _passed(self, work: Work, rows: int, number: int) -> Passed:
        """One pass; traffic of further micro-batches is that of the first again."""
        actor, world = work.actor, self.world
        marks: list[tuple[Counter[str], Counter[str]]] = []
        world.forget()
        tracker = tracker_of(actor.model, actor.optimizer)
        with tracker.begin(
            actor.model, host_share(actor.model), lambda: marks.append((world.calls.copy(), world.sent.copy()))
        ):
            work.run(rows)
        calls, sent = world.calls, world.sent
        if number > len(marks) > 1:
            for total, first, second in zip((calls, sent), marks[0], marks[1], strict=True):
                for name in second:
                    total[name] += (number - len(marks)) * (second[name] - first[name])
        return Passed(work.name, actor.name, tracker.split(), tracker.most_on_host, dict(calls), dict(sent), work.times)


@dataclass(frozen=True)
class Cluster:
    """Ranks, the bytes that each has, and whether it computes as a GPU does."""

    ranks: int
    memory: float = math.inf
    gpu: bool = True


def simulate(
    cfg: Stage, policy: Mapping[str, Any], on: Cluster, *, scorer: Mapping[str, Any] | None = None
) -> Simulation:
    """One rank of many in a step of that stage; `policy` and `scorer` (reward model, critic) as in config.json.

    Where models at rest are too much already, or a pass is, no further pass is made.
    """
    start = time.perf_counter()
    with imagined_world(on.ranks) as world, as_on_gpu() if on.gpu else nullcontext():
        s = setup.strategy_of(cfg.parallel)
        with without_data(world):
            made = Simulator(cfg, policy, scorer or policy, s=s, world=world, memory=on.memory)
            found = Simulation(described(cfg), on.ranks, made.standing(), engine=made.engine)
            passes = made.passes()
            while found.fits(on.memory) and (one := next(passes, None)):
                found = replace(found, passes=(*found.passes, one))
    return replace(found, seconds=time.perf_counter() - start)


def options_of(base: config.ModelConfig) -> LoadOptions:
    return LoadOptions(
        dtype=base.dtype,
        lora_rank=base.lora_rank,
        lora_alpha=base.lora_alpha,
        gradient_checkpointing=base.gradient_checkpointing,
    )


def described(cfg: Stage) -> dict[str, Any]:
    return {
        "strategy": cfg.parallel.strategy,
        "tp": cfg.parallel.tp,
        "device_share": cfg.parallel.device_share,
        "dtype": cfg.base.dtype,
        "gradient_checkpointing": cfg.base.gradient_checkpointing,
        "lora_rank": cfg.base.lora_rank,
        "tokens_per_microbatch": cfg.optim.tokens_per_microbatch,
        "max_len": cfg.base.max_len,
    }


def search(
    cfg: Stage, policy: Mapping[str, Any], on: Cluster, *, scorer: Mapping[str, Any] | None = None
) -> list[tuple[Change, Simulation]]:
    """Simulations of changed settings, the last of them the first that fits, if one does."""
    found: list[tuple[Change, Simulation]] = []
    changes = ladder(
        cfg.parallel.strategy,
        checkpointing=cfg.base.gradient_checkpointing,
        lora=cfg.base.lora_rank > 0,
        ranks=on.ranks,
        tp=cfg.parallel.tp,
        row=cfg.base.max_len,
    )
    for change in changes:
        made = simulate(changed(cfg, change), policy, on, scorer=scorer)
        found.append((change, made))
        if made.fits(on.memory):
            break
    return found


def changed(cfg: Stage, change: Change) -> Stage:
    """The settings with those flags."""
    groups: dict[str, Any] = {}
    for name in ("base", "parallel", "optim"):
        group = getattr(cfg, name)
        flags = {flag: value for flag, value in change.flags.items() if hasattr(group, flag)}
        groups[name] = replace(group, **flags)
    return replace(cfg, **groups)
