"""Judges behind one protocol: rules read text, reward models read tokens, several are summed by weight."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kinkajou.batch import Passes, Rollout, passed
from kinkajou.errors import UserError
from kinkajou.memory import Budget, afford
from kinkajou.models.forward import ScalarModel
from kinkajou.rewards.answer import Answer, Rule, sample_of


@dataclass(frozen=True)
class Verdict:
    scores: Tensor  # (b,) float32 on the rollout's device
    details: dict[str, Tensor] = field(default_factory=dict)  # (b,) each; the names do not depend on the answers
    bad: dict[int, tuple[str, float]] = field(default_factory=dict)
    """By sample, the first reward that gave no finite number, and what it gave."""


class Judge(Protocol):
    def __call__(self, answers: Sequence[Answer], rollout: Rollout) -> Verdict:
        """One float for each sample, and what it is made of."""
        ...


class TextScorer(Protocol):
    def __call__(self, answers: Sequence[Answer]) -> list[float]: ...


class RuleJudge:
    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __call__(self, answers: Sequence[Answer], rollout: Rollout) -> Verdict:
        return Verdict(as_scores([self.rule(answer) for answer in answers], rollout))


class TextJudge:
    """What scores all answers at once, outside this process: a service or a Python function."""

    def __init__(self, scorer: TextScorer) -> None:
        self.scorer = scorer

    def __call__(self, answers: Sequence[Answer], rollout: Rollout) -> Verdict:
        return Verdict(as_scores(self.scorer(answers) if answers else [], rollout))


class ModelJudge:
    """A reward model, read at the last sampled token."""

    def __init__(self, model: ScalarModel, *, tokens_per_microbatch: int | Budget, passes: Passes = int) -> None:
        self.model, self.budget, self.passes = model, tokens_per_microbatch, passes

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer], rollout: Rollout) -> Verdict:
        def attempt(tokens: int) -> list[Tensor]:
            found = [
                (self.model(part.tokens, part.mask, at="end"), counts)
                for part, counts in passed(rollout, tokens, self.passes)
            ]
            return [x for x, counts in found if counts]

        scores = afford(self.budget, rollout.costs, "reward model", attempt)
        return Verdict(torch.cat([torch.zeros(0, device=rollout.tokens.device), *scores]))


class Ensemble:
    """Mean of the members less `penalty` standard deviations of their opinions (Coste 2023, eq. 4, with the std)."""

    def __init__(self, members: Sequence[Judge], *, penalty: float) -> None:
        self.members, self.penalty = members, penalty

    def __call__(self, answers: Sequence[Answer], rollout: Rollout) -> Verdict:
        opinions = torch.stack([member(answers, rollout).scores for member in self.members])  # (members, b)
        mean = opinions.mean(0)
        spread = ((opinions - mean) ** 2).sum(0).div(len(opinions) - 1).sqrt()
        return Verdict(mean - self.penalty * spread, {"disagreement": spread})


@dataclass(frozen=True)
class Term:
    """One judge of a weighted sum."""

    name: str
    weight: float
    judge: Judge


class WeightedSum:
    """Sum of weight x score; which of them gave no finite number is told by name."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = terms

    def __call__(self, answers: Sequence[Answer], rollout: Rollout) -> Verdict:
        total = torch.zeros(len(answers), device=rollout.tokens.device)
        details: dict[str, Tensor] = {}
        bad: dict[int, tuple[str, float]] = {}
        alone = len(self.terms) == 1 and self.terms[0].weight == 1
        for term in self.terms:
            part = term.judge(answers, rollout)
            wrong = (~part.scores.isfinite()).nonzero().flatten().tolist()
            bad = {i: (term.name, float(part.scores[i])) for i in wrong} | bad
            total = total + term.weight * part.scores
            own = {} if alone else {term.name: part.scores}
            further = {key if key not in details else f"{term.name} {key}": x for key, x in part.details.items()}
            details |= own | further
        return Verdict(total, details, bad)


def as_scores(values: Sequence[float], rollout: Rollout) -> Tensor:
    """(b,) float32 beside the rollout."""
    return torch.tensor(values, dtype=torch.float32, device=rollout.tokens.device)


def check_finite(verdict: Verdict, answers: Sequence[Answer]) -> None:
    """Refuses scores that are not finite, where none can be left out."""
    bad = (~verdict.scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        name, score = verdict.bad.get(bad[0], ("sum", float(verdict.scores[bad[0]])))
        raise UserError(
            f"the reward {name} gave {score} instead of a number",
            evidence=f"{sample_of(answers[bad[0]])}; {len(bad)} such samples",
            fix="mend the reward, or leave such prompts out",
            exit_code=3,
        )
