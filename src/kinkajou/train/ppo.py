"""PPO from human feedback: sample, score, estimate advantages, update policy and critic.

Schulman 2017 (clipped objective), Schulman 2016 (GAE), Ziegler 2019 and Ouyang 2022 (KL to the reference in the
reward, critic from the reward model, ptx mix).
"""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import cast

import torch
from torch import Tensor, nn

from kinkajou.algos import advantages, kl, losses, tensors
from kinkajou.algos.losses import Loss
from kinkajou.batch import PPOBatch
from kinkajou.config import PPOConfig
from kinkajou.data.loader import share
from kinkajou.parallel.strategy import Strategy, make_strategy
from kinkajou.train.inputs import PPOInputs
from kinkajou.train.optim import lr_at, set_lr
from kinkajou.train.parts import PPOParts, load_parts
from kinkajou.train.rollouts import Sampled, held_out_scores, sample_prompts, sample_rows
from kinkajou.train.run import Run
from kinkajou.train.sft import token_loss
from kinkajou.train.update import Objective, in_parts, update

SHOWN = ("score", "kl_ref", "eval_gold", "response_length", "ended")


def train_ppo(cfg: PPOConfig, inputs: PPOInputs) -> Path:
    """Trains the policy against the judge; returns the folder of the checkpoint to use (best, else last)."""
    s = make_strategy(cfg.run.strategy)
    parts = load_parts(cfg, inputs, s)
    run = Run("ppo", cfg, s, total=cfg.algo.steps, shown=SHOWN)
    if parts.held_out:
        keep_best(run, cfg, parts, held_out_scores(run, cfg, parts))
    for step in run.steps():
        lr, critic_lr = set_rates(cfg, parts, step)
        with run.phase("rollout"):
            sampled = sample_prompts(cfg, parts, parts.order.batch(step - 1), step, s)
        run.count_tokens("rollout", sampled.rollout.mask)
        with run.phase("score"):
            batch, metrics = score(cfg, parts, sampled, s)
        run.count_tokens("score", sampled.rollout.lengths)
        with run.phase("update"):
            metrics |= improve(cfg, parts, joined(batch, s), step, s)
        run.count_tokens("update", sampled.rollout.lengths * cfg.algo.epochs)
        parts.engine.load(s.full_params(parts.policy))
        metrics |= {"lr": lr, "critic_lr": critic_lr}
        if run.due(cfg.run.sample_every) or step == 1:
            run.write_samples(sample_rows(sampled, s))
        if parts.held_out and (run.due(cfg.run.eval_every) or step == run.total):
            held_out = held_out_scores(run, cfg, parts)
            metrics |= held_out
            keep_best(run, cfg, parts, held_out)
        run.log(metrics)
        if run.due(cfg.run.save_every):
            run.save(parts.write)
    return run.finish(parts.write)


def score(cfg: PPOConfig, parts: PPOParts, sampled: Sampled, s: Strategy) -> tuple[PPOBatch, dict[str, float]]:
    """Log-probabilities, values, rewards and advantages of this rank's rollouts: all that an update reads."""
    rollout, budget, sampling = sampled.rollout, cfg.optim.tokens_per_microbatch, parts.sampling
    mask, policy, critic = rollout.mask, s.unwrap(parts.policy), s.unwrap(parts.critic)
    logp = in_parts(rollout, budget, lambda b: policy(b.tokens, b.mask, sampling).logp)
    ref_logp = in_parts(rollout, budget, lambda b: parts.reference(b.tokens, b.mask, sampling).logp)
    values = in_parts(rollout, budget, lambda b: critic(b.tokens, b.mask, at="targets"))
    scores = sampled.scores - cfg.algo.missing_end_penalty * ~rollout.ended
    kl_ref = kl.k1(logp, ref_logp)
    rewards = advantages.token_rewards(scores, kl_ref, mask, kl_coef=cfg.algo.kl_coef)
    raw, returns = advantages.gae(rewards, values, mask, gamma=cfg.algo.gamma, lam=cfg.algo.lam)
    batch = PPOBatch(rollout.tokens, mask, logp, tensors.whiten(raw, mask, all_sum=s.all_sum), values, returns)

    def per_sample(x: Tensor) -> float:
        return tensors.masked_mean(x, torch.ones_like(scores, dtype=torch.bool), all_sum=s.all_sum).item()

    variance = tensors.explained_variance(values, returns, mask, all_sum=s.all_sum)
    return batch, {
        "score": per_sample(sampled.scores),
        "reward": per_sample(rewards.sum(1)),
        "kl_ref": per_sample((kl_ref * mask).sum(1)),
        "response_length": per_sample(mask.sum(1).float()),
        "ended": per_sample(rollout.ended.float()),
        "explained_variance": variance.item(),
        "engine_gap": tensors.masked_mean((rollout.sampler_logp - logp).abs(), mask, all_sum=s.all_sum).item(),
    }


def joined(batch: PPOBatch, s: Strategy) -> PPOBatch:
    """All ranks' rollouts in the order of one process, so that minibatches do not depend on the world size."""
    widest = max(cast(list[int], s.gather([batch.mask.shape[1]])))
    return batch.widen(widest - batch.mask.shape[1]).map(s.all_rows)


def improve(cfg: PPOConfig, parts: PPOParts, batch: PPOBatch, step: int, s: Strategy) -> dict[str, float]:
    """Several epochs over shuffled minibatches of all ranks' rollouts; means of what `update` reports."""
    algo = cfg.algo
    step_on = partial(update, s, tokens_per_microbatch=cfg.optim.tokens_per_microbatch, max_norm=cfg.optim.max_norm)

    def policy_loss(model: nn.Module, b: PPOBatch, count: Tensor) -> Loss:
        new = model(b.tokens, b.mask, parts.sampling)
        loss = losses.clipped_surrogate(
            new.logp, b.old_logp, b.advantages, b.mask, count, low=algo.clip, high=algo.clip
        )
        return Loss(loss.value, loss.metrics | {"entropy": new.entropy.sum() / count})

    def value_loss(model: nn.Module, b: PPOBatch, count: Tensor) -> Loss:
        values = model(b.tokens, b.mask, at="targets")
        return losses.clipped_value_loss(values, b.old_values, b.returns, b.mask, count, clip=algo.value_clip)

    history: list[dict[str, float]] = []
    for number, rows in enumerate(minibatches(cfg, len(batch), step)):
        mine = batch.select(torch.tensor(share(rows, rank=s.rank, world=s.world)))
        objectives = [Objective(mine, policy_loss, 1 - algo.ptx_coef if parts.ptx else 1.0, "policy_loss")]
        if parts.ptx:
            ptx = parts.ptx(step, number)
            objectives.append(Objective(ptx, token_loss, algo.ptx_coef, "ptx_loss"))
        actor = step_on(parts.policy, parts.optimizer, objectives)
        value = [Objective(mine, value_loss, name="value_loss")]
        critic = step_on(parts.critic, parts.critic_optimizer, value)
        history.append(actor | {k: v for k, v in critic.items() if k != "grad_norm"})
        history[-1]["critic_grad_norm"] = critic["grad_norm"]
    means = {name: fmean(row[name] for row in history) for name in history[0]}
    return means | {"first_ratio": history[0]["ratio"]}


def minibatches(cfg: PPOConfig, rows: int, step: int) -> Iterator[list[int]]:
    """Row numbers of each minibatch, epoch after epoch: a function of (seed, step), the same on all ranks."""
    for epoch in range(cfg.algo.epochs):
        order = list(range(rows))
        random.Random(f"{cfg.run.seed}/{step}/{epoch}").shuffle(order)
        for start in range(0, rows, cfg.algo.minibatch_size):
            yield order[start : start + cfg.algo.minibatch_size]


def set_rates(cfg: PPOConfig, parts: PPOParts, step: int) -> tuple[float, float]:
    peaks = (cfg.optim.lr, cfg.optim.lr if cfg.algo.critic_lr is None else cfg.algo.critic_lr)
    policy_lr, critic_lr = (
        lr_at(step - 1, cfg.algo.steps, peak=peak, warmup=cfg.optim.warmup, schedule=cfg.optim.schedule)
        for peak in peaks
    )
    set_lr(parts.optimizer, policy_lr)
    set_lr(parts.critic_optimizer, critic_lr)
    return policy_lr, critic_lr


def keep_best(run: Run, cfg: PPOConfig, parts: PPOParts, held_out: dict[str, float]) -> None:
    if cfg.judge.keep_best != "none":
        metric = f"eval_{cfg.judge.keep_best}"
        run.save_if_best(metric, held_out[metric], parts.write)
