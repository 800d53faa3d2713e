"""Answers whose score is not finite are taken out of a step, counted and told."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from kinkajou.batch import ScoredRollout
from kinkajou.parallel.strategy import Strategy
from kinkajou.rewards.answer import Answer, sample_of
from kinkajou.rewards.judges import Verdict
from kinkajou.train.nonfinite import NotFinite
from kinkajou.train.skips import Guard

REWARD = "reward"


def take_out(
    scored: ScoredRollout, verdict: Verdict, answers: Sequence[Answer], size: int, s: Strategy, guard: Guard
) -> tuple[ScoredRollout, dict[str, float]]:
    """The rollout without the groups (of `size` answers) that have a score that is not finite, and their metric.

    Rows stay, so that minibatches are the same on all ranks: no target of theirs counts, and their score is the mean
    of the others, so that no mean of scores moves.  A step without any good score stops the run.
    """
    good = scored.scores.isfinite()
    kept = good.view(-1, size).all(1).repeat_interleave(size)
    told = torch.stack([(~good).sum(), kept.sum(), scored.scores.double().where(kept, 0.0).sum()])
    bad, left, total = s.all_sum(told).tolist()
    if not bad:
        guard.taken(REWARD, moved=False)
        return scored, {}
    first = [shown(i, verdict, answers) for i in (~good).nonzero().flatten().tolist()[:1]]
    name, evidence = cast(list[tuple[str, str]], s.gather(first))[0]
    fault = NotFinite(
        f"the reward {name}",
        f"{evidence}; {bad:.0f} such scores",
        "mend the reward, or leave such prompts out",
        what="a score",
    )
    guard.left_out(REWARD, fault, hopeless=not left)
    scores = scored.scores.where(kept, total / max(left, 1.0))
    return replace(scored, mask=scored.mask & kept[:, None], scores=scores), {"bad_scores": bad}


def shown(i: int, verdict: Verdict, answers: Sequence[Answer]) -> tuple[str, str]:
    """Which reward it was, and its score with the sample."""
    name, score = verdict.bad.get(i, ("sum", float(verdict.scores[i])))
    return name, f"it gave {score} instead of a number to {sample_of(answers[i])}"
