"""Rollouts that several frameworks read: prompts, answers, and where their tokens stand."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from benchmarks.models import END, PAD, VOCABULARY
from kinkajou.batch import ScoredRollout, pad_rows
from kinkajou.models.forward import TokenScores
from kinkajou.train.rollouts import Sampled

SAMPLES, LONGEST, GROUP = 16, 8, 4


def draw_prompts(seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(2, VOCABULARY) for _ in range(draw.randrange(2, 7))] for _ in range(SAMPLES)]


def draw_answers(seed: int = 1) -> list[list[int]]:
    """Answers of unequal length; all but the longest end with the end token."""
    draw = random.Random(seed)
    rows = [[draw.randrange(2, VOCABULARY) for _ in range(draw.randrange(1, LONGEST + 1))] for _ in range(SAMPLES)]
    return [row if len(row) == LONGEST else [*row, END] for row in rows]


class Layout:
    """TRL's tensors (b, LONGEST) begin with the answer, ours (b, t) with the prompt."""

    def __init__(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
        both = list(zip(prompts, answers, strict=True))
        counts = [[False] * len(prompt) + [True] * len(answer) for prompt, answer in both]
        self.batch = pad_rows([[*prompt, *answer] for prompt, answer in both], counts, pad_id=PAD)
        self.index = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None] + torch.arange(LONGEST)
        self.ended = torch.tensor([answer[-1] == END for answer in answers])
        self.lengths = torch.tensor([len(answer) for answer in answers])

    def within(self, more: int = 0) -> Tensor:
        """(b, LONGEST) bool: the answer's tokens and so many after them."""
        return torch.arange(LONGEST) < self.lengths[:, None] + more

    def answers(self, x: Tensor) -> Tensor:
        """Ours as TRL's."""
        return pad(x, (0, LONGEST + 1)).gather(1, self.index[: len(x)])

    def placed(self, x: Tensor, columns: int) -> Tensor:
        """TRL's as ours, with its gradient."""
        wide = x.new_zeros(len(x), columns + LONGEST).scatter(1, self.index, x)
        return wide[:, :columns]

    def select(self, rows: Tensor) -> "Layout":
        part = object.__new__(Layout)
        part.batch, part.index = self.batch.select(rows), self.index[rows]
        part.ended, part.lengths = self.ended[rows], self.lengths[rows]
        return part

    def sampled(self, scores: Tensor, sampler_logp: Tensor) -> Sampled:
        """As the rollout that `score` reads."""
        logp = self.placed(sampler_logp, self.batch.mask.shape[1]) * self.batch.mask
        rollout = ScoredRollout(self.batch.tokens, self.batch.mask, logp, self.ended, scores)
        return Sampled(rollout, [], {})


class Recorded(nn.Module):
    """A model that answers with TRL's own tensor: log-probabilities, or values where `at` is given."""

    def __init__(self, layout: Layout, x: Tensor) -> None:
        super().__init__()
        self.layout, self.x = layout, x

    def forward(
        self, tokens: Tensor, mask: Tensor, sampling: Any = None, *, at: str = "", entropy: bool = False
    ) -> Any:
        placed = self.layout.placed(self.x, mask.shape[1]) * mask
        return placed if at else TokenScores(placed, torch.zeros_like(placed))
