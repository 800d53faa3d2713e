"""The two kinds of judge behind one protocol: a rule reads text, a reward model reads tokens."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kinkajou.batch import Rollout, split_by_tokens
from kinkajou.models.forward import ScalarModel
from kinkajou.rewards.rules import Answer, Rule


class Judge(Protocol):
    def __call__(self, answers: Sequence[Answer], rollout: Rollout) -> Tensor:
        """One float for each sample.  -> (b,) float32."""
        ...


class RuleJudge:
    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __call__(self, answers: Sequence[Answer], rollout: Rollout) -> Tensor:
        return torch.tensor([self.rule(answer) for answer in answers], device=rollout.tokens.device)


class ModelJudge:
    """A reward model, read at the last sampled token."""

    def __init__(self, model: ScalarModel, *, tokens_per_microbatch: int) -> None:
        self.model, self.budget = model, tokens_per_microbatch

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer], rollout: Rollout) -> Tensor:
        parts = [rollout.select(rows) for rows in split_by_tokens(rollout, self.budget)]
        scores = [self.model(part.tokens, part.mask, at="end") for part in parts]
        return torch.cat([torch.zeros(0, device=rollout.tokens.device), *scores])
