"""Critic-free reinforcement learning: answers to the same prompt are compared with each other.

GRPO (Shao 2024), Dr. GRPO (Liu 2025), DAPO (Yu 2025), GSPO (Zheng 2025), CISPO (MiniMax 2025), SAPO (Gao 2025), RLOO
(Ahmadian 2024), REINFORCE++ (Hu 2025), REINFORCE (Williams 1992): one loop, and a row of settings for each
(config/dialects.py).
"""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn

from kinkajou.algos import kl
from kinkajou.algos.groups import zero_spread
from kinkajou.algos.losses import Loss
from kinkajou.batch import GRPOBatch
from kinkajou.config import GRPOConfig
from kinkajou.data.loader import share
from kinkajou.parallel.strategy import Strategy
from kinkajou.train import setup
from kinkajou.train.estimates import grpo_advantages
from kinkajou.train.inputs import RLInputs
from kinkajou.train.parts import RLParts, check_divisible, load_parts
from kinkajou.train.policy import correction, kl_term, old_logps, policy_loss, sample_metrics, set_rate, summarised
from kinkajou.train.rollouts import (
    Sampled,
    before_steps,
    count_updates,
    end_step,
    joined,
    mean_over_samples,
    minibatches,
    sample_groups,
    shaped,
)
from kinkajou.train.round import Round
from kinkajou.train.run import Run
from kinkajou.train.update import Objective, in_parts, update

SHOWN = ("score", "kl_ref", "eval_gold", "zero_spread", "response_length", "ended")


def train_grpo(cfg: GRPOConfig, inputs: RLInputs) -> Path:
    """Trains the policy against the judge; returns the folder of the checkpoint to use (best, else last)."""
    s = setup.strategy_of(cfg.parallel)
    samples = cfg.rollout.prompts_per_step * cfg.algo.group_size
    check_divisible(cfg, samples, s)
    parts = load_parts(cfg, inputs, s)
    run = Run("grpo", cfg, s, total=cfg.algo.steps, shown=SHOWN, kept=parts.kept, budget=parts.budget)
    with closing(parts.engine), run:
        parts.engine.load(parts.weights(s, frozen=True))
        before_steps(run, cfg, parts)
        for step in run.steps():
            rate = {"lr": set_rate(cfg, parts, step, cfg.optim.lr, parts.optimizer)}
            round = run.taken_up(GRPOBatch) or run.begun(collect(run, cfg, parts))
            with run.phase("update"):
                improved = improve(run, cfg, parts, round)
            count_updates(run, cfg, round)
            end_step(run, cfg, parts, round, {**rate, **improved, **round.metrics}, samples=samples)
        return run.finish()


def collect(run: Run, cfg: GRPOConfig, parts: RLParts) -> Round[GRPOBatch]:
    """Samples and scores a step's answers, those of all ranks."""
    with run.phase("rollout"):
        sampled = sample_groups(run, cfg, parts)
    run.count_tokens("rollout", sampled.rollout.mask)
    with run.phase("score"):
        batch, found = score(cfg, parts, sampled, run.strategy)
    run.count_tokens("score", sampled.rollout.lengths)
    return Round(joined(batch, run.strategy, cfg.algo.group_size), found, sampled.samples)


def score(cfg: GRPOConfig, parts: RLParts, sampled: Sampled, s: Strategy) -> tuple[GRPOBatch, dict[str, float]]:
    """Log-probabilities and advantages of this rank's rollouts: all that an update reads."""
    rollout, budget = sampled.rollout, parts.budget
    mask, coefficient = rollout.mask, parts.state.kl_coef
    logp = old_logps(cfg, parts, rollout, s)
    ref_logp = in_parts(rollout, budget, parts.reference, s.passes) if parts.reference else torch.zeros_like(logp)
    kl_reward = kl_term(cfg, logp, ref_logp) * mask if parts.reference else torch.zeros_like(logp)
    in_reward = coefficient if cfg.kl.kl_in == "reward" else 0.0
    running = parts.state.see(cfg, rollout, s)
    scores = shaped(cfg, rollout, parts.state.scores)
    advantages = grpo_advantages(cfg, scores, kl_reward, mask, kl_coef=in_reward, s=s)
    weights, gap = correction(cfg, rollout.sampler_logp, logp, mask, s)
    trained = mask & rollout.ended[:, None] if cfg.shaping.mask_truncated else mask
    flat = zero_spread(scores.view(-1, cfg.algo.group_size)).float()
    return GRPOBatch(rollout.tokens, trained, logp, ref_logp, advantages, weights), {
        **sample_metrics(
            sampled,
            scores - in_reward * kl_reward.sum(1),
            kl.k1(logp, ref_logp) if parts.reference else None,
            s,
        ),
        **({"kl_coef": coefficient} if parts.reference else {}),
        "zero_spread": mean_over_samples(flat, s),
        **running,
        **gap,
    }


def loss_of(cfg: GRPOConfig, parts: RLParts) -> Callable[[nn.Module, GRPOBatch, Tensor], Loss]:
    def loss(model: nn.Module, b: GRPOBatch, count: Tensor) -> Loss:
        new = model(b.tokens, b.mask, parts.sampling, entropy=True)
        return policy_loss(cfg, new, b, count, kl_coef=parts.state.kl_coef)

    return loss


def improve(run: Run, cfg: GRPOConfig, parts: RLParts, round: Round[GRPOBatch]) -> dict[str, float]:
    """Epochs over shuffled minibatches of all ranks' rollouts; means of what `update` reports."""
    loss, batch, s = loss_of(cfg, parts), round.batch, run.strategy
    for _, rows in round.left(minibatches(cfg, len(batch), run.step)):
        if not batch.mask[rows].any():  # `mask_truncated` may leave nothing to learn from
            round.updated({})
            continue
        mine = batch.select(torch.tensor(share(rows, rank=s.rank, world=s.world)))
        found = update(
            s,
            parts.policy,
            parts.optimizer,
            [Objective(mine, loss, name="policy_loss")],
            tokens_per_microbatch=run.budget,
            max_norm=cfg.optim.max_norm,
            guard=run.guard,
        )
        if found and parts.average:
            parts.average.follow()
        round.updated(found, last=bool(cfg.algo.stop_kl) and found.get("kl_old", 0.0) > cfg.algo.stop_kl)
        run.pause()
    return summarised(round.history, stale=cfg.engine.max_staleness > 0)
