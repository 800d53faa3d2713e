"""The policy's loss and what is measured beside it: the same for PPO and the critic-free methods."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from kinkajou.algos import kl, losses, tensors
from kinkajou.algos.losses import Loss
from kinkajou.batch import GRPOBatch, Rollout
from kinkajou.config import ClipConfig, RLConfig, SurrogateConfig
from kinkajou.models.forward import TokenScores
from kinkajou.parallel.strategy import Strategy
from kinkajou.train.optim import lr_at, set_lr
from kinkajou.train.parts import RLParts
from kinkajou.train.rollouts import Sampled, mean_over_samples
from kinkajou.train.update import in_parts

GATE = 1e-3
"""Nats of the worst token up to which the engine's log-probabilities stand for the trainer's."""
TRUSTED = 9
"""Rollouts after one that was looked at."""


def policy_loss(cfg: RLConfig, new: TokenScores, b: GRPOBatch, count: Tensor, *, kl_coef: float) -> Loss:
    """Surrogate, and the KL to the reference where it is in the loss.  count (2,): tokens and samples."""
    how, mask, sur = cfg.surrogate.aggregation, b.mask, cfg.surrogate
    longest = cfg.rollout.max_new_tokens
    level = sur.ratio if isinstance(sur, SurrogateConfig) else "token"
    ratio = losses.importance_ratio(new.logp, b.old_logp, mask, level, clamp=sur.log_ratio_clamp)
    terms = objective(sur, ratio, new.logp, b.advantages) * b.correction
    value = losses.aggregated(terms, mask, count, how, longest=longest)
    metrics = surrogate_metrics(sur, ratio, new, b, count[0])
    if cfg.kl.kl_in == "loss" and kl_coef:
        term = kl.with_gradient(kl_term(cfg, new.logp, b.ref_logp), new.logp, b.ref_logp, ratio, cfg.kl.kl_gradient)
        kl_loss = losses.aggregated(term, mask, count, how, longest=longest)
        value, metrics["kl_loss"] = value + kl_coef * kl_loss, kl_loss.detach()
    return Loss(value, metrics)


def objective(sur: ClipConfig, ratio: Tensor, logp: Tensor, advantages: Tensor) -> Tensor:
    """The named loss of each token."""
    kind = kind_of(sur)
    if kind == "cispo":
        return losses.cispo_objective(ratio, logp, advantages, high=bounds(sur)["high"])
    if kind == "reinforce":
        return losses.reinforce_objective(logp, advantages)
    if kind == "sapo":
        assert isinstance(sur, SurrogateConfig)
        return losses.sapo_objective(
            ratio, advantages, tau_positive=sur.sapo_tau_positive, tau_negative=sur.sapo_tau_negative
        )
    return losses.clipped_objective(ratio, advantages, **bounds(sur))


def kind_of(sur: ClipConfig) -> str:
    return sur.surrogate if isinstance(sur, SurrogateConfig) else "clip"


def bounds(sur: ClipConfig) -> dict[str, float]:
    """The bounds on the ratio, by the names of `clipped_objective`."""
    high = sur.clip if sur.clip_high is None else sur.clip_high
    cap = sur.ratio_cap if isinstance(sur, SurrogateConfig) else 0.0
    return {"low": sur.clip, "high": high, "dual_clip": sur.dual_clip, "cap": cap}


def kl_term(cfg: RLConfig, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """The estimator of the settings, per token."""
    return kl.estimate(
        logp,
        ref_logp,
        cfg.kl.kl_estimator,
        clamp=cfg.kl.kl_clamp,
        k3_input_clamp=cfg.kl.k3_input_clamp,
        k3_output_clamp=cfg.kl.k3_output_clamp,
    )


@torch.no_grad()
def surrogate_metrics(
    sur: ClipConfig, ratio: Tensor, new: TokenScores, b: GRPOBatch, tokens: Tensor
) -> dict[str, Tensor]:
    """`clip_frac`, the share of tokens whose gradient the clip cuts off, 0 for an objective without a clip; `kl_old`,
    k3 of KL(old || new) in nats a token; `ratio`, the mean of new over old probability, and `ratio_gap`, the
    mean distance of their logarithms (1 and 0 before the first step); `entropy` in nats a token."""
    cut = losses.clipped_away(ratio, b.advantages, **bounds(sur)) if kind_of(sur) == "clip" else torch.zeros_like(ratio)
    log_ratio = (new.logp - b.old_logp) * b.mask
    assert new.entropy is not None
    terms = {
        "clip_frac": cut,
        "kl_old": kl.k3(b.old_logp, new.logp),
        "ratio": log_ratio.exp(),
        "ratio_gap": log_ratio.abs(),
        "entropy": new.entropy,
    }
    return {name: (x * b.mask).sum() / tokens for name, x in terms.items()}


def old_logps(cfg: RLConfig, parts: RLParts, rollout: Rollout, s: Strategy) -> Tensor:
    """Log-probabilities that the ratio starts from: the trainer's, or the engine's where that is the same.  (b, t).

    Answers of earlier weights are never the same: the ratio then starts from the weights of now, and `correction`
    weighs what lies between.
    """
    how, state = cfg.rollout.old_logp, parts.state
    if how == "engine" or (how == "auto" and state.trusted and not cfg.engine.max_staleness):
        state.trusted = max(0, state.trusted - 1)
        return rollout.sampler_logp
    budget, sampling = parts.budget, parts.sampling
    logp = in_parts(rollout, budget, lambda b: parts.language(b.tokens, b.mask, sampling).logp, s.passes)
    bound = cfg.rollout.correction_bound if cfg.rollout.rollout_correction != "none" else GATE
    worst = max_over_ranks(((rollout.sampler_logp - logp).abs() * rollout.mask).max(), s)
    own = cfg.engine.rollout != "vllm"  # a server is other code, which somebody else may change: it is always looked at
    state.trusted = TRUSTED if own and how == "auto" and worst <= min(bound, GATE) else 0
    return logp


def correction(
    cfg: RLConfig, sampler_logp: Tensor, logp: Tensor, mask: Tensor, s: Strategy
) -> tuple[Tensor, dict[str, float]]:
    """Importance weights of the tokens where engine and trainer disagree beyond the bound, else 1.

    `engine_gap` is the mean distance in nats, `engine_gap_max` that of the worst token (`stale_gap` and
    `stale_gap_max` where answers may be of earlier weights, which is no fault of the engine), `correction` the share
    of tokens whose weight is not 1.  Nothing is said where the log-probabilities are the engine's own.
    """
    if logp is sampler_logp:
        return torch.ones_like(logp), {}
    of = "stale_gap" if cfg.engine.max_staleness else "engine_gap"
    gap = {of: tensors.masked_mean((sampler_logp - logp).abs(), mask, all_sum=s.all_sum).item()}
    worst = max_over_ranks(((sampler_logp - logp).abs() * mask).max(), s)
    how = cfg.rollout.rollout_correction
    if how == "none" or worst <= cfg.rollout.correction_bound:
        return torch.ones_like(logp), {**gap, f"{of}_max": worst, "correction": 0.0}
    weights = losses.importance_correction(logp, sampler_logp, mask, how, cap=cfg.rollout.correction_cap)
    moved = tensors.masked_mean((weights != 1).float(), mask, all_sum=s.all_sum).item()
    return weights, {**gap, f"{of}_max": worst, "correction": moved}


def max_over_ranks(x: Tensor, s: Strategy) -> float:
    return float(s.all_rows(x.reshape(1)).max())


def sample_metrics(sampled: Sampled, shaped: Tensor, kl_ref: Tensor | None, s: Strategy) -> dict[str, float]:
    """What every step of reinforcement learning says of its answers: means over the answers of all ranks."""
    rollout = sampled.rollout
    mask, lengths = rollout.mask, rollout.mask.sum(1).float()

    def mean(x: Tensor) -> float:
        return mean_over_samples(x, s)

    score, length = mean(rollout.scores), mean(lengths)
    spread = mean((rollout.scores - score) ** 2) * mean((lengths - length) ** 2)
    together = mean((rollout.scores - score) * (lengths - length))
    found = {
        "score": score,
        "reward": mean(shaped),
        "response_length": length,
        "ended": mean(rollout.ended.float()),
        "length_corr": together / spread**0.5 if spread > 0 else 0.0,
        **sampled.metrics,
    }
    if kl_ref is not None:
        answers = (kl_ref * mask).sum(1)
        found["kl_ref"] = mean(answers)
        samples = float(s.all_sum(torch.tensor(float(len(answers)), device=answers.device)))
        found["kl_ref_se"] = (mean((answers - found["kl_ref"]) ** 2) / samples) ** 0.5
    return found


def summarised(history: Sequence[Mapping[str, float]], *, stale: bool = False) -> dict[str, float]:
    """Means of what a step's updates reported, their number, and ratio and its gap before the first of them.

    `stale`: answers may be of earlier weights, so the ratio never starts from the engine.
    """
    names = dict.fromkeys(name for row in history for name in row)
    means = {name: fmean(row[name] for row in history if name in row) for name in names}
    before = next((row for row in history if "ratio" in row), None)
    first = {"first_ratio": before["ratio"], "first_gap": before["ratio_gap"]} if before else {}
    if before and not stale:  # weights have not moved yet: where the ratio starts from the engine, this is its distance
        first["engine_gap"] = before["ratio_gap"]
    means.pop("ratio_gap", None)  # later it only says that the policy moves, which kl_old says better
    return means | first | {"updates": float(len(history))}


def set_rate(cfg: RLConfig, parts: RLParts, step: int, peak: float, optimizer: torch.optim.Optimizer) -> float:
    lr = lr_at(step - 1, cfg.algo.steps, peak=peak, warmup=cfg.optim.warmup, schedule=cfg.optim.schedule)
    set_lr(optimizer, lr)
    return lr
