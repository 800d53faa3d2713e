"""Sampling answers to prompts and having them judged, for training and on held-out prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinkajou.algos.kl import k1
from kinkajou.algos.tensors import masked_mean
from kinkajou.batch import Rollout
from kinkajou.config import PPOConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.loader import share
from kinkajou.engine.sampling import derive_seed
from kinkajou.parallel.strategy import Strategy
from kinkajou.rewards.rules import Answer
from kinkajou.train.parts import PPOParts, Task
from kinkajou.train.run import Run
from kinkajou.train.update import in_parts


@dataclass(frozen=True)
class Sampled:
    """This rank's answers with their scores."""

    rollout: Rollout
    answers: list[Answer]
    scores: Tensor  # (b,) float32


def sample_prompts(cfg: PPOConfig, parts: PPOParts, batch: Sequence[int], step: int, s: Strategy) -> Sampled:
    """Answers this rank's share of the batch; the seed of each is (run seed, step, prompt)."""
    mine = share(batch, rank=s.rank, world=s.world)
    seeds = [derive_seed(cfg.run.seed, step, i) for i in mine]
    return answer([parts.tasks[i] for i in mine], seeds, cfg, parts)


def answer(tasks: Sequence[Task], seeds: Sequence[int], cfg: PPOConfig, parts: PPOParts) -> Sampled:
    rollout = parts.engine.generate(
        [task.tokens for task in tasks],
        parts.sampling,
        max_new_tokens=cfg.rollout.max_new_tokens,
        seeds=seeds,
    )
    answers = [
        Answer(task.prompt, text, bool(ended))
        for task, text, ended in zip(tasks, texts(rollout, parts.form), rollout.ended, strict=True)
    ]
    return Sampled(rollout, answers, parts.judge(answers, rollout))


def texts(rollout: Rollout, form: ChatFormat) -> list[str]:
    return [form.answer(row[1:][mask].tolist()) for row, mask in zip(rollout.tokens, rollout.mask, strict=True)]


def held_out_scores(run: Run, cfg: PPOConfig, parts: PPOParts) -> dict[str, float]:
    """Mean score (and gold score if there is a gold judge) over the held-out prompts; the seeds never change.

    `eval_score_se` is the mean's standard error, `eval_kl_ref` in nats an answer. `eval_ref_nll`, the answers'
    negative log-likelihood under the reference in nats a token, shows whether they still are text of its kind.
    """
    s = run.strategy
    mine = range(s.rank, len(parts.held_out), s.world)
    seeds = [derive_seed(cfg.run.seed, "held out", i) for i in mine]
    sampled = answer([parts.held_out[i] for i in mine], seeds, cfg, parts)
    every = torch.ones_like(sampled.scores, dtype=torch.bool)

    def mean(x: Tensor) -> float:
        return masked_mean(x, every, all_sum=s.all_sum).item()

    rollout = sampled.rollout
    ref_logp = in_parts(
        rollout,
        cfg.optim.tokens_per_microbatch,
        lambda b: parts.reference(b.tokens, b.mask, parts.sampling).logp,
    )
    score = mean(sampled.scores)
    spread = mean((sampled.scores - score) ** 2) / len(parts.held_out)
    found = {
        "eval_score": score,
        "eval_score_se": spread**0.5,
        "eval_ended": mean(rollout.ended.float()),
        "eval_kl_ref": mean(k1(rollout.sampler_logp, ref_logp).sum(1)),
        "eval_ref_nll": -masked_mean(ref_logp, rollout.mask, all_sum=s.all_sum).item(),
    }
    if parts.gold:
        found["eval_gold"] = mean(parts.gold(sampled.answers, sampled.rollout))
    if run.step == 0:
        run.log(found)
    return found


def sample_rows(sampled: Sampled, s: Strategy, limit: int = 16) -> list[dict[str, Any]]:
    """The first answers of the step as rows of `samples.jsonl`."""
    rows = [
        {
            "prompt": answer.prompt.messages[-1].content,
            "response": answer.text,
            "score": round(score, 5),
            "ended": answer.ended,
        }
        for answer, score in zip(sampled.answers, sampled.scores.tolist(), strict=True)
    ]
    return s.gather(rows)[:limit]  # type: ignore[return-value]
