"""What PPO works with: four models, two optimisers, an engine, judges and prompts, loaded and checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from kinkajou.batch import Sampling, TokenBatch
from kinkajou.config import PPOConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.loader import Shuffle, share
from kinkajou.data.sources import Prompt
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.engine.engine import Engine, LocalEngine
from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel
from kinkajou.models.load import LoadOptions, find_model, load_language_model, load_scalar_model, save_model
from kinkajou.parallel.strategy import Strategy
from kinkajou.rewards.judges import Judge, ModelJudge, RuleJudge
from kinkajou.rewards.rules import parse_rule
from kinkajou.train import setup
from kinkajou.train.inputs import PPOInputs
from kinkajou.train.optim import adamw, save_optimizers
from kinkajou.train.sft import collate


@dataclass(frozen=True)
class Task:
    """A prompt and its tokens."""

    prompt: Prompt
    tokens: list[int]


@dataclass(frozen=True)
class PPOParts:
    form: ChatFormat
    policy: nn.Module  # wrapped by the strategy, as is the critic
    critic: nn.Module
    reference: LanguageModel
    optimizer: Optimizer
    critic_optimizer: Optimizer
    engine: Engine
    sampling: Sampling
    judge: Judge
    gold: Judge | None
    tasks: list[Task]
    held_out: list[Task]
    order: Shuffle
    ptx: Callable[[int, int], TokenBatch] | None  # (step, number of the update) -> this rank's chats
    write: Callable[[Path], None]


def load_parts(cfg: PPOConfig, inputs: PPOInputs, s: Strategy) -> PPOParts:
    say = print if s.rank == 0 else lambda text: None
    form = setup.load_format(cfg.base, (), say)
    tasks = encode_prompts(cfg, inputs.prompts, form, say)
    held_out = encode_prompts(cfg, inputs.held_out, form, say)
    order = Shuffle(len(tasks), cfg.rollout.prompts_per_step, cfg.run.seed)
    check_divisible(cfg, s)

    options = setup.load_options(cfg.base, cfg.run.seed)
    frozen = LoadOptions(family=cfg.base.family, dtype=cfg.base.dtype)
    source = find_model(cfg.base.model)
    policy = load_language_model(source, form.tokenizer, options)
    reference = load_language_model(source, form.tokenizer, frozen).requires_grad_(False)
    longest = max(len(task.tokens) for task in (*tasks, *held_out))
    setup.check_context(policy, longest + cfg.rollout.max_new_tokens)
    judge = load_judge(cfg.judge.reward, cfg, form, s)
    gold = load_judge(cfg.judge.gold, cfg, form, s) if cfg.judge.gold else None
    # `family` speaks of the policy: a reward model may be of another that has the same vocabulary.
    critic = load_scalar_model(critic_source(cfg), form.tokenizer, replace(options, family=None))
    policy_wrapped, critic_wrapped = s.wrap(policy), s.wrap(critic)
    optimizer = adamw(policy, lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay)
    critic_optimizer = adamw(critic, lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay)

    def write(folder: Path) -> None:
        save_model(policy, form.tokenizer, folder, end_ids=form.end_ids, lora=cfg.base.lora_save)
        if cfg.run.save_optimizer:
            save_optimizers({"optimizer": optimizer, "critic_optimizer": critic_optimizer}, folder)

    return PPOParts(
        form=form,
        policy=policy_wrapped,
        critic=critic_wrapped,
        reference=reference.to(s.device),
        optimizer=optimizer,
        critic_optimizer=critic_optimizer,
        engine=LocalEngine(policy, end_ids=form.end_ids, pad_id=form.pad_id),
        sampling=Sampling(cfg.rollout.temperature, cfg.rollout.top_k, cfg.rollout.top_p),
        judge=judge,
        gold=gold,
        tasks=tasks,
        held_out=held_out,
        order=order,
        ptx=ptx_batches(cfg, inputs, form, s, say) if inputs.ptx else None,
        write=write,
    )


def encode_prompts(cfg: PPOConfig, prompts: Sequence[Prompt], form: ChatFormat, say: setup.Say) -> list[Task]:
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


def check_divisible(cfg: PPOConfig, s: Strategy) -> None:
    """Rollouts fill whole minibatches, and each process has the same share of both."""
    if cfg.rollout.prompts_per_step % cfg.algo.minibatch_size:
        raise UserError(
            "prompts_per_step must be a multiple of minibatch_size",
            evidence=f"{cfg.rollout.prompts_per_step} and {cfg.algo.minibatch_size}",
        )
    share(range(cfg.algo.minibatch_size), rank=s.rank, world=s.world)


def critic_source(cfg: PPOConfig) -> str:
    rule = cfg.judge.reward.startswith("rule:")
    return find_model(cfg.judge.critic or (cfg.base.model if rule else cfg.judge.reward))


def load_judge(spec: str, cfg: PPOConfig, form: ChatFormat, s: Strategy) -> Judge:
    """A rule by name, or a reward model from a folder; its vocabulary must be the policy's."""
    if spec.startswith("rule:"):
        return RuleJudge(parse_rule(spec))
    source = find_model(spec)
    tokenizer, _ = load_tokenizer(source)
    if tokenizer.get_vocab() != form.tokenizer.get_vocab():
        raise UserError(
            "policy and reward model have different vocabularies",
            evidence=f"{len(form.tokenizer)} entries in {cfg.base.model}, {len(tokenizer)} in {spec}",
            fix="train the reward model from the policy's SFT model, or with its tokenizer",
        )
    options = LoadOptions(dtype=cfg.base.dtype)
    model = load_scalar_model(source, form.tokenizer, options, fresh=False).requires_grad_(False)
    return ModelJudge(model.to(s.device), tokens_per_microbatch=cfg.optim.tokens_per_microbatch)


def ptx_batches(
    cfg: PPOConfig, inputs: PPOInputs, form: ChatFormat, s: Strategy, say: setup.Say
) -> Callable[[int, int], TokenBatch]:
    rows = setup.encode_chats(inputs.ptx, form, cfg.base.max_len, say)
    order = Shuffle(len(rows), cfg.algo.ptx_batch_size, cfg.run.seed)
    updates = cfg.algo.epochs * cfg.rollout.prompts_per_step // cfg.algo.minibatch_size

    def batch(step: int, number: int) -> TokenBatch:
        chosen = share(order.batch((step - 1) * updates + number), rank=s.rank, world=s.world)
        return collate(setup.pick(rows, chosen), form).to(s.device)

    return batch
