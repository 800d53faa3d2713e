"""Answers to prompts with fields, and a rollout to go with them."""

from collections.abc import Sequence
from typing import Any

import torch

from kinkajou.batch import Rollout
from kinkajou.data.records import Message, Prompt
from kinkajou.rewards.rules import Answer


def answer(text: str, prompt: str = "why?", *, ended: bool = True, **meta: Any) -> Answer:
    return Answer(Prompt((Message("user", prompt),), meta, "prompts.jsonl:7"), text, ended)


def rollout_of(rows: Sequence[Sequence[int]], prompt: int = 1) -> Rollout:
    """Token rows, right-padded with 96; all but the first `prompt` tokens were sampled."""
    width = max([2, *map(len, rows)])
    tokens = torch.tensor([[*row, *[96] * (width - len(row))] for row in rows], dtype=torch.long).view(-1, width)
    mask = torch.tensor([[prompt <= j < len(row) for j in range(1, width)] for row in rows]).view(-1, width - 1).bool()
    return Rollout(tokens, mask, torch.zeros(mask.shape), torch.ones(len(rows), dtype=torch.bool))
