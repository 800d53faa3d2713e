"""PPO from human feedback: sample, score, estimate advantages, update policy and critic.

Schulman 2017 (clipped objective), Schulman 2016 (GAE), Ziegler 2019 and Ouyang 2022 (KL to the reference in the
reward, adaptive coefficient, critic from the reward model, ptx mix).
"""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinkajou.algos import kl, losses, tensors
from kinkajou.algos.losses import Loss
from kinkajou.batch import GRPOBatch, PPOBatch, TokenBatch, ValueBatch
from kinkajou.config import PPOConfig
from kinkajou.data.loader import share
from kinkajou.parallel.strategy import Strategy
from kinkajou.train import setup
from kinkajou.train.estimates import ppo_estimates, value_targets
from kinkajou.train.inputs import RLInputs
from kinkajou.train.parts import Critic, RLParts, check_divisible, load_critic, load_parts, ptx_batches
from kinkajou.train.policy import correction, kl_term, old_logps, policy_loss, sample_metrics, set_rate, summarised
from kinkajou.train.rollouts import (
    Sampled,
    before_steps,
    count_updates,
    end_step,
    joined,
    minibatches,
    sample_prompts,
    shaped,
)
from kinkajou.train.round import Round
from kinkajou.train.run import Run
from kinkajou.train.sft import token_loss
from kinkajou.train.update import Objective, in_parts, update

SHOWN = ("score", "kl_ref", "eval_gold", "response_length", "ended")
Ptx = Callable[[int, int], TokenBatch] | None
LossFn = Callable[[nn.Module, Any, Tensor], Loss]


def train_ppo(cfg: PPOConfig, inputs: RLInputs) -> Path:
    """Trains the policy against the judge; returns the folder of the checkpoint to use (best, else last)."""
    s = setup.strategy_of(cfg.parallel)
    check_divisible(cfg, cfg.rollout.prompts_per_step, s)
    parts = load_parts(cfg, inputs, s)
    critic, ptx = load_critic(cfg, parts, s), ptx_batches(cfg, inputs, parts.form, s)
    run = Run("ppo", cfg, s, total=cfg.algo.steps, shown=SHOWN, kept=parts.kept, budget=parts.budget)
    with closing(parts.engine), run:
        parts.engine.load(parts.weights(s, frozen=True))
        before_steps(run, cfg, parts)
        for step in run.steps():
            rates = set_rates(cfg, parts, critic, step)
            round = run.taken_up(PPOBatch) or run.begun(collect(run, cfg, parts, critic))
            with run.phase("update"):
                improved = improve(run, cfg, parts, critic, ptx, round)
            count_updates(run, cfg, round)
            metrics = {**rates, **improved, **round.metrics}
            end_step(run, cfg, parts, round, metrics, samples=cfg.rollout.prompts_per_step)
        return run.finish()


def collect(run: Run, cfg: PPOConfig, parts: RLParts, critic: Critic | None) -> Round[PPOBatch]:
    """Samples and scores a step's answers, those of all ranks."""
    with run.phase("rollout"):
        sampled = sample_prompts(run, cfg, parts, parts.order.batch(run.step - 1))
    run.count_tokens("rollout", sampled.rollout.mask)
    with run.phase("score"):
        batch, found = score(cfg, parts, critic, sampled, run.strategy)
    run.count_tokens("score", sampled.rollout.lengths)
    return Round(joined(batch, run.strategy), found, sampled.samples)


def score(
    cfg: PPOConfig, parts: RLParts, critic: Critic | None, sampled: Sampled, s: Strategy
) -> tuple[PPOBatch, dict[str, float]]:
    """Log-probabilities, values, rewards and advantages of this rank's rollouts: all that an update reads."""
    rollout, budget = sampled.rollout.widen(1), parts.budget
    mask, coefficient = rollout.mask, parts.state.kl_coef
    asked = TokenBatch(rollout.tokens, value_targets(cfg, mask))
    logp = old_logps(cfg, parts, rollout, s)
    assert parts.reference  # PPO always has one
    ref_logp = in_parts(rollout, budget, parts.reference, s.passes)
    values = in_parts(asked, budget, values_of(parts, critic, s), s.passes)
    running = parts.state.see(cfg, rollout, s)
    scores, kl_reward = shaped(cfg, rollout, parts.state.scores), kl_term(cfg, logp, ref_logp)
    in_reward = coefficient if cfg.kl.kl_in == "reward" else 0.0
    made = ppo_estimates(cfg, scores, kl_reward, values, mask, kl_coef=in_reward, s=s)
    weights, gap = correction(cfg, rollout.sampler_logp, logp, mask, s)
    trained = mask & rollout.ended[:, None] if cfg.shaping.mask_truncated else mask
    batch = PPOBatch(
        rollout.tokens, trained, logp, ref_logp, made.advantages, weights, made.value_mask, values, made.returns
    )
    variance = tensors.explained_variance(values, made.returns, made.value_mask, all_sum=s.all_sum)
    whole = scores - in_reward * (kl_reward * mask).sum(1)
    reward = made.returns.sum(1) if cfg.algo.advantage == "bandit" else whole
    return batch, {
        **sample_metrics(sampled, reward, kl.k1(logp, ref_logp)[:, :-1], s),
        "kl_coef": coefficient,
        "explained_variance": variance.item(),
        **running,
        **gap,
    }


def values_of(parts: RLParts, critic: Critic | None, s: Strategy) -> Callable[[TokenBatch], Tensor]:
    """Rows -> values before each counting target."""
    if critic:
        model = s.unwrap(critic.model)
        return lambda b: model(b.tokens, b.mask, at="targets")
    actor = s.unwrap(parts.policy)
    return lambda b: actor(b.tokens, torch.zeros_like(b.mask), b.mask).values


def improve(
    run: Run, cfg: PPOConfig, parts: RLParts, critic: Critic | None, ptx: Ptx, round: Round[PPOBatch]
) -> dict[str, float]:
    """Several epochs over shuffled minibatches of all ranks' rollouts; means of what `update` reports."""
    algo, batch, step, s = cfg.algo, round.batch, run.step, run.strategy
    step_on = partial(update, s, tokens_per_microbatch=run.budget, max_norm=cfg.optim.max_norm, guard=run.guard)
    actor_loss, value_loss, shared_loss = losses_of(cfg, parts)
    for number, rows in round.left(minibatches(cfg, len(batch), step)):
        mine = batch.select(torch.tensor(share(rows, rank=s.rank, world=s.world)))
        found: dict[str, float] = {}
        if critic:
            value = Objective(mine.for_critic(), value_loss, name="value_loss")
            found = step_on(critic.model, critic.optimizer, [value])
            if found:
                found["critic_grad_norm"] = found.pop("grad_norm")
        objectives = []
        if step > algo.critic_warmup:
            if batch.mask[rows].any():  # `mask_truncated` may leave nothing to learn from
                rows_of, loss_fn = (mine.for_policy(), actor_loss) if critic else (mine, shared_loss)
                weight = 1 - cfg.ptx.ptx_coef if ptx else 1.0
                objectives.append(Objective(rows_of, loss_fn, weight, "policy_loss"))
            if ptx:
                objectives.append(Objective(ptx(step, number), token_loss, cfg.ptx.ptx_coef, "ptx_loss"))
        if objectives:
            taken = step_on(parts.policy, parts.optimizer, objectives)
            found |= taken
            if taken and parts.average:
                parts.average.follow()
        round.updated(found, last=bool(algo.stop_kl) and found.get("kl_old", 0.0) > algo.stop_kl)
        run.pause()
    return summarised(round.history, stale=cfg.engine.max_staleness > 0)


def losses_of(cfg: PPOConfig, parts: RLParts) -> tuple[LossFn, LossFn, LossFn]:
    """The policy's loss, the critic's, and both over one trunk."""
    coefficient, clip = parts.state.kl_coef, cfg.algo.value_clip

    def actor_loss(model: nn.Module, b: GRPOBatch, count: Tensor) -> Loss:
        return policy_loss(cfg, model(b.tokens, b.mask, parts.sampling, entropy=True), b, count, kl_coef=coefficient)

    def value_loss(model: nn.Module, b: ValueBatch, count: Tensor) -> Loss:
        values = model(b.tokens, b.mask, at="targets")
        return losses.clipped_value_loss(values, b.old_values, b.returns, b.mask, count, clip=clip)

    def shared_loss(model: nn.Module, b: PPOBatch, count: Tensor) -> Loss:
        new = model(b.tokens, b.mask, b.value_mask, parts.sampling, entropy=True)
        actor = policy_loss(cfg, new, b, count[:2], kl_coef=coefficient)
        value = losses.clipped_value_loss(new.values, b.old_values, b.returns, b.value_mask, count[2], clip=clip)
        metrics = actor.metrics | value.metrics | {"value_loss": value.value}
        return Loss(actor.value + cfg.algo.vf_coef * value.value, metrics)

    return actor_loss, value_loss, shared_loss


def set_rates(cfg: PPOConfig, parts: RLParts, critic: Critic | None, step: int) -> dict[str, float]:
    rates = {"lr": set_rate(cfg, parts, step, cfg.optim.lr, parts.optimizer)}
    if critic:
        peak = cfg.optim.lr if cfg.algo.critic_lr is None else cfg.algo.critic_lr
        rates["critic_lr"] = set_rate(cfg, parts, step, peak, critic.optimizer)
    return rates
