"""What reinforcement learning works with: models, optimisers, an engine, judges and prompts, loaded and checked."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from kinkajou.batch import Sampling, TokenBatch
from kinkajou.config import PPOConfig, RLConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.loader import Shuffle, share
from kinkajou.data.sources import Prompt
from kinkajou.engine import native
from kinkajou.engine.engine import AheadEngine, Engine
from kinkajou.errors import UserError
from kinkajou.memory import Budget
from kinkajou.models.adapters import base_weights
from kinkajou.models.backbone import BackboneScorer, shares_backbone
from kinkajou.models.folder import SCORE
from kinkajou.models.forward import ActorCritic, LanguageModel, ScalarModel, TokenScores
from kinkajou.models.heads import scalar_head
from kinkajou.models.load import LoadOptions, find_model, load_language_model, load_scalar_model
from kinkajou.parallel.strategy import Strategy
from kinkajou.rewards.judges import Judge
from kinkajou.rewards.load import load_judge, parse_specs, reward_model_folder
from kinkajou.train import planned, preflight, setup
from kinkajou.train.averages import MovingAverage
from kinkajou.train.engines import make_engine, sampled_from
from kinkajou.train.identity import digest_of, digest_of_model
from kinkajou.train.inputs import RLInputs
from kinkajou.train.kept import (
    BegunAhead,
    Kept,
    ModelFolder,
    OptimizerState,
    RandomState,
    Weights,
    digest_of_format,
)
from kinkajou.train.optim import adamw
from kinkajou.train.plan_job import needs_reference
from kinkajou.train.run import budget_of
from kinkajou.train.sft import collate
from kinkajou.train.state import RLState

HEAD = "critic_head"
HEADS = {SCORE: "score.weight", "adapter_model.safetensors": "base_model.model.score.weight"}
"""Files of a critic on the policy's trunk, and the head's name in them (models/folder.py)."""
Reference = Callable[[TokenBatch], Tensor]
"""This rank's rows -> log-probabilities under the reference, (b, t)."""


@dataclass(frozen=True)
class Task:
    """A prompt and its tokens."""

    prompt: Prompt
    tokens: list[int]


@dataclass(frozen=True)
class RLParts:
    form: ChatFormat
    policy: nn.Module  # as the strategy wrapped it; an ActorCritic where the trunk is shared
    language: LanguageModel  # the policy itself
    reference: Reference | None
    optimizer: Optimizer
    engine: Engine
    sampling: Sampling
    judge: Judge
    gold: Judge | None
    tasks: list[Task]
    held_out: list[Task]
    order: Shuffle
    average: MovingAverage | None
    state: RLState
    kept: Kept
    budget: Budget

    def weights(self, s: Strategy, *, frozen: bool = False) -> Iterable[tuple[str, Tensor]]:
        """The policy's trained parameters by the names that the engine knows; before the first step also the others."""
        for name, param in s.full_params(self.policy, frozen=frozen):
            if not name.startswith("head."):
                yield name.removeprefix("language."), param


@dataclass(frozen=True)
class Critic:
    model: nn.Module  # as the strategy wrapped it
    optimizer: Optimizer


def load_parts(cfg: RLConfig, inputs: RLInputs, s: Strategy) -> RLParts:
    say = setup.voice(s)
    form = setup.load_format(cfg.base, setup.texts_of(prompt.messages for prompt in inputs.prompts), say)
    tasks = encode_prompts(cfg, inputs.prompts, form, say)
    held_out = encode_prompts(cfg, inputs.held_out, form, say)
    planned.plan_run(cfg, form, tasks, answers=cfg.rollout.max_new_tokens)
    order = Shuffle(len(tasks), cfg.rollout.prompts_per_step, cfg.run.seed)

    source = find_model(cfg.base.model)
    language = load_language_model(source, form.tokenizer, setup.load_options(cfg.base, cfg.run.seed))
    longest = max(len(task.tokens) for task in (*tasks, *held_out))
    setup.check_context(language, longest + cfg.rollout.max_new_tokens)
    actor = with_critic(cfg, language, source)
    ready = scorers_on_backbone(cfg, language, source, say) if isinstance(actor, ActorCritic) else {}
    engine_model = sampled_from(cfg, language, s)
    policy = s.wrap(actor)
    optimizer = adamw(actor, lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay)
    average = MovingAverage(language.module, cfg.algo.ema_decay) if cfg.algo.ema_decay else None
    state, budget = RLState.at_start(cfg, source, say), budget_of(cfg, s, say)

    if s.device.type == "cpu" and (reason := native.missing()):
        say(f"note: decoding by torch's own products, which is slower: {reason}")
    judge = judge_of(cfg, cfg.judge.reward, form, s, ready, budget=budget)
    preflight.before_run(cfg, form, inputs, preflight.uncounted(task.tokens for task in tasks), say=say, judge=judge)

    engine = make_engine(cfg, engine_model, form, s)
    kept = kept_of(cfg, actor, optimizer, average, form)
    if cfg.engine.max_staleness:
        kept.items.append(BegunAhead(cast(AheadEngine, engine)))
    kept.numbers["rl"] = state
    kept.made_from |= sources_of(cfg, source, state, form) | {"prompts": digest_of(tasks, held_out, inputs.ptx)}
    return RLParts(
        form=form,
        policy=policy,
        language=language,
        reference=load_reference(cfg, state.reference, form, language, s) if needs_reference(cfg) else None,
        optimizer=optimizer,
        engine=engine,
        sampling=drawn_from(cfg),
        judge=judge,
        gold=judge_of(cfg, (cfg.judge.gold,), form, s, budget=budget) if cfg.judge.gold else None,
        tasks=tasks,
        held_out=held_out,
        order=order,
        average=average,
        state=state,
        kept=kept,
        budget=budget,
    )


def kept_of(
    cfg: RLConfig,
    actor: LanguageModel | ActorCritic,
    optimizer: Optimizer,
    average: MovingAverage | None,
    form: ChatFormat,
) -> Kept:
    """What all policy-gradient methods keep of their policy."""
    language, head = (actor.language, actor.head) if isinstance(actor, ActorCritic) else (actor, None)
    kept = Kept(
        [
            ModelFolder("policy", "", language, form, lora=cfg.base.lora_save, head=head),
            OptimizerState("optimizer", optimizer, actor),
            RandomState(),
        ]
    )
    if average:
        kept.items.append(ModelFolder("ema", "ema", language, form, lora=cfg.base.lora_save, average=average))
    if head:
        kept.items.append(Weights(HEAD, {"score.weight": head.weight}))
    return kept


def with_critic(cfg: RLConfig, language: LanguageModel, source: str) -> LanguageModel | ActorCritic:
    """The policy alone, or with the critic that shares its trunk."""
    if not (isinstance(cfg, PPOConfig) and cfg.algo.backbone == "shared"):
        return language
    actor = ActorCritic(language, scalar_head(language.width, seed=cfg.run.seed))
    load_head(actor, Path(source) / "critic")
    return actor


def drawn_from(cfg: RLConfig) -> Sampling:
    """The distribution of the settings."""
    return Sampling(cfg.rollout.temperature, cfg.rollout.top_k, cfg.rollout.top_p, cfg.rollout.min_p)


def scorers_on_backbone(
    cfg: RLConfig, language: LanguageModel, source: str, say: Callable[[str], None]
) -> dict[str, ScalarModel]:
    """With LoRA, reward models that are adapters on the policy's own base need no weights beside it."""
    found: dict[str, ScalarModel] = {}
    for spec in parse_specs(cfg.judge.reward) if cfg.base.lora_rank else ():
        for folder in spec.body.split(",") if spec.kind in ("model", "ensemble") else ():
            if shares_backbone(find_model(folder), source):
                found[folder] = BackboneScorer(language, find_model(folder), number=len(found))
                say(f"the reward model {folder} is an adapter on the policy's backbone")
    return found


def judge_of(
    cfg: RLConfig,
    specs: Sequence[str],
    form: ChatFormat,
    s: Strategy,
    ready: Mapping[str, ScalarModel] = MappingProxyType({}),
    *,
    budget: Budget,
) -> Judge:
    return load_judge(
        specs,
        tokenizer=form.tokenizer,
        dtype=cfg.base.dtype,
        place=s.wrap,
        passes=s.passes,
        tokens_per_microbatch=budget,
        ensemble_penalty=cfg.judge.ensemble_penalty,
        timeout_s=cfg.judge.reward_timeout_s,
        retries=cfg.judge.reward_retries,
        ready=ready,
    )


def load_reference(cfg: RLConfig, source: str, form: ChatFormat, language: LanguageModel, s: Strategy) -> Reference:
    """The policy as it starts, or another model: with LoRA the weights below the adapters, else a frozen copy."""
    sampling = drawn_from(cfg)
    if cfg.base.lora_rank and source == find_model(cfg.base.model):

        def below(batch: TokenBatch) -> Tensor:
            with base_weights(language.module):
                return cast(TokenScores, language(batch.tokens, batch.mask, sampling)).logp

        return below
    options = LoadOptions(family=cfg.base.family, dtype=cfg.base.dtype)
    frozen = cast(LanguageModel, s.wrap(load_language_model(source, form.tokenizer, options).freeze()))

    def apart(batch: TokenBatch) -> Tensor:
        return cast(TokenScores, frozen(batch.tokens, batch.mask, sampling)).logp

    return apart


def load_critic(cfg: PPOConfig, parts: RLParts, s: Strategy) -> Critic | None:
    """A model of its own, from the reward model where there is one (Ouyang 2022); None where the trunk is shared."""
    if cfg.algo.backbone == "shared":
        return None
    source = find_model(cfg.algo.critic or reward_model_folder(cfg.judge.reward) or cfg.base.model)
    # `family` speaks of the policy: a reward model may be of another that has the same vocabulary.
    options = replace(setup.load_options(cfg.base, cfg.run.seed), family=None)
    model = load_scalar_model(source, parts.form.tokenizer, options)
    critic = Critic(s.wrap(model), adamw(model, lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay))
    parts.kept.items += [
        ModelFolder("critic", "critic", model, parts.form),
        OptimizerState("critic_optimizer", critic.optimizer, model),
    ]
    parts.kept.made_from["critic"] = digest_of_model(source)
    return critic


def sources_of(cfg: RLConfig, source: str, state: RLState, form: ChatFormat) -> dict[str, str]:
    """Digests of the models that decide the run."""
    judges = parse_specs((*cfg.judge.reward, *filter(None, [cfg.judge.gold])))
    folders = [f for spec in judges if spec.kind in ("model", "ensemble") for f in spec.body.split(",")]
    return {
        "model": digest_of_model(source),
        "tokenizer": digest_of_format(form),
        "reference": digest_of_model(state.reference) if needs_reference(cfg) else "",
        "reward_models": " ".join(digest_of_model(find_model(folder)) for folder in folders),
    }


def load_head(actor: ActorCritic, critic: Path) -> None:
    """Goes on with the critic of the checkpoint that the policy comes from, where it has one on its trunk."""
    for file, name in HEADS.items():
        if (critic / file).is_file():
            with torch.no_grad():
                actor.head.weight.copy_(load_file(critic / file)[name])


def encode_prompts(cfg: RLConfig, prompts: Sequence[Prompt], form: ChatFormat, say: setup.Say) -> list[Task]:
    """Prompts as tokens; one that leaves no room for an answer is refused, or skipped and counted."""
    room = cfg.base.max_len - cfg.rollout.max_new_tokens
    tasks = [Task(prompt, form.prompt(prompt.messages)) for prompt in prompts]
    long = [task for task in tasks if len(task.tokens) > room]
    if long and cfg.rollout.bad_rows == "error":
        raise UserError(
            f"{long[0].prompt.place}: the prompt is too long",
            evidence=f"{len(long[0].tokens)} tokens; {cfg.base.max_len} (max_len) less "
            f"{cfg.rollout.max_new_tokens} (max_new_tokens) leave {max(room, 0)}; {len(long)} such prompts",
            fix="raise --max_len, lower --max_new_tokens, or pass --bad_rows skip",
        )
    setup.tell(say, f"{len(long)} of {len(tasks)} prompts are longer than {room} tokens and were skipped", len(long))
    return [task for task in tasks if len(task.tokens) <= room]


def check_divisible(cfg: RLConfig, samples: int, s: Strategy) -> None:
    """Rollouts fill whole minibatches, and each process has the same share of prompts and minibatches."""
    if samples % cfg.algo.minibatch_size:
        what = "prompts_per_step" if isinstance(cfg, PPOConfig) else "prompts_per_step x group_size"
        raise UserError(
            f"{what} must be a multiple of minibatch_size",
            evidence=f"{samples} and {cfg.algo.minibatch_size}",
        )
    share(range(cfg.algo.minibatch_size), rank=s.rank, world=s.world)
    share(range(cfg.rollout.prompts_per_step), rank=s.rank, world=s.world)


def ptx_batches(
    cfg: PPOConfig, inputs: RLInputs, form: ChatFormat, s: Strategy
) -> Callable[[int, int], TokenBatch] | None:
    """(step, number of the update) -> this rank's chats of the ptx loss; None without one."""
    if not inputs.ptx:
        return None
    rows = setup.encode_chats(inputs.ptx, form, cfg.base.max_len, setup.voice(s))
    order = Shuffle(len(rows), cfg.ptx.ptx_batch_size, cfg.run.seed)
    updates = cfg.algo.epochs * cfg.rollout.prompts_per_step // cfg.algo.minibatch_size

    def batch(step: int, number: int) -> TokenBatch:
        chosen = share(order.batch((step - 1) * updates + number), rank=s.rank, world=s.world)
        return collate(setup.pick(rows, chosen), form).to(s.device)

    return batch
