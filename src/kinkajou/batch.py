"""What flows between the parts: frozen batches of right-padded rows, aligned to targets.

Row i of `tokens` is (t+1) ids; target j is token j+1, predicted from tokens 0..j.  `mask` (b, t) is True where
a target counts.  Everything after a row's last counting target is padding and never enters a model, so the
value of the padding does not matter.  Batches are selected, split and moved, never edited.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from, and that log-probabilities refer to."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Above 1 it makes tokens of the prompt and the answer less likely; for answers only, nothing is trained on it."""


PLAIN = Sampling()
"""The model's own distribution."""


@dataclass(frozen=True)
class TokenBatch:
    tokens: Tensor  # (b, t+1) int64
    mask: Tensor  # (b, t) bool

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(*(fn(getattr(self, field.name)) for field in dataclasses.fields(self)))

    def select(self, rows: Tensor) -> Self:
        return self.map(lambda x: x[rows])

    def to(self, device: torch.device | str) -> Self:
        """On a GPU from pinned memory, so that nobody waits for the copy."""
        if torch.device(device).type == "cuda":
            return self.map(lambda x: x if x.is_cuda else x.pin_memory()).map(lambda x: x.to(device, non_blocking=True))
        return self.map(lambda x: x.to(device))

    def widen(self, columns: int) -> Self:
        """The same rows with that many more columns of padding."""
        return self.map(lambda x: pad(x, (0, columns)) if x.ndim > 1 else x)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row up to its last counting target, 0 for a row without one.  (b,)"""
        return lengths_of(self.mask)

    @property
    def costs(self) -> list[int]:
        """Tokens that each row puts through the model: what a micro-batch is filled by."""
        return whole(self.lengths)

    @property
    def count(self) -> Tensor:
        """What a mean over this batch divides by: its counting targets."""
        return self.mask.sum().float()


def whole(x: Tensor) -> list[int]:
    """(n,) -> n numbers, by one copy: on a GPU each number by itself would be waited for."""
    return [int(n) for n in x.tolist()]


def lengths_of(mask: Tensor) -> Tensor:
    """Tokens of each row up to its last True target, 0 for an empty row.  (b, t) -> (b,)."""
    ends = torch.arange(2, mask.shape[-1] + 2, device=mask.device) * mask
    return ends.amax(-1)


B = TypeVar("B", bound=TokenBatch)
Passes = Callable[[int], int]
"""A rank's own number of passes through a model -> how many it has to make (`Strategy.passes`)."""


@dataclass(frozen=True)
class PairBatch(TokenBatch):
    """Preferred (index 0) and rejected (index 1) answers: tokens (b, 2, t+1), mask (b, 2, t)."""

    @property
    def costs(self) -> list[int]:
        return whole(self.lengths.sum(1))

    @property
    def count(self) -> Tensor:
        return torch.tensor(float(len(self)), device=self.tokens.device)

    def stacked(self) -> TokenBatch:
        """Rows of both sides, alternating.  (2b, t+1), (2b, t)."""
        return TokenBatch(self.tokens.flatten(0, 1), self.mask.flatten(0, 1))


@dataclass(frozen=True)
class PreferenceBatch(PairBatch):
    """What a loss over pairs reads; `mask` marks the targets that are scored, `answer` those of the answers."""

    answer: Tensor  # (b, 2, t) bool
    ref_logp: Tensor  # (b, 2) of the whole answers, 0 without a reference
    weight: Tensor  # (b,)
    partners: Tensor  # (b, 3) of the same rank in the whole batch: reference's gap, rejected, chosen log-ratio

    @property
    def count(self) -> Tensor:
        """Pairs, targets of the chosen answers, scored targets of the chosen side, (3,)."""
        pairs = self.mask.new_tensor(len(self), dtype=torch.float32)
        return torch.stack([pairs, self.answer[:, 0].sum().float(), self.mask[:, 0].sum().float()])


@dataclass(frozen=True)
class JudgedBatch(TokenBatch):
    """Single answers that are known to be good or bad."""

    good: Tensor  # (b,) bool
    ref_logp: Tensor  # (b,) of the whole answer, 0 without a reference
    kl: Tensor  # (b,) the batch's reference point

    @property
    def count(self) -> Tensor:
        """Records, good ones, targets of the good ones, (3,)."""
        rows = self.mask.new_tensor(len(self), dtype=torch.float32)
        return torch.stack([rows, self.good.sum().float(), self.mask[self.good].sum().float()])


@dataclass(frozen=True)
class Rollout(TokenBatch):
    """What an engine returns: mask marks the sampled targets."""

    sampler_logp: Tensor  # (b, t) float32, as the engine computed it
    ended: Tensor  # (b,) bool: the sample stopped by itself, at an end token


@dataclass(frozen=True)
class ScoredRollout(Rollout):
    scores: Tensor  # (b,) float32, as the judge gave them


@dataclass(frozen=True)
class GRPOBatch(TokenBatch):
    """What a policy's loss reads."""

    old_logp: Tensor  # (b, t)
    ref_logp: Tensor  # (b, t), 0 without a reference
    advantages: Tensor  # (b, t)
    correction: Tensor  # (b, t) importance weights for the engine's distance from the trainer, 1 where it is small

    @property
    def count(self) -> Tensor:
        """Tokens and samples, (2,): what the ways of aggregation divide by."""
        return torch.stack([self.mask.sum().float(), self.mask.new_tensor(len(self), dtype=torch.float32)])


@dataclass(frozen=True)
class ValueBatch(TokenBatch):
    """What a critic's loss reads; `mask` marks the targets before which it is asked."""

    old_values: Tensor  # (b, t)
    returns: Tensor  # (b, t)


@dataclass(frozen=True)
class PPOBatch(GRPOBatch):
    value_mask: Tensor  # (b, t) bool
    old_values: Tensor  # (b, t)
    returns: Tensor  # (b, t)

    @property
    def costs(self) -> list[int]:
        return whole(lengths_of(self.mask | self.value_mask))

    @property
    def count(self) -> Tensor:
        """Tokens, samples and value targets, (3,)."""
        return torch.cat([super().count, self.value_mask.sum().float()[None]])

    def for_policy(self) -> GRPOBatch:
        return GRPOBatch(self.tokens, self.mask, self.old_logp, self.ref_logp, self.advantages, self.correction)

    def for_critic(self) -> ValueBatch:
        return ValueBatch(self.tokens, self.value_mask, self.old_values, self.returns)


def pad_rows(rows: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], *, pad_id: int) -> TokenBatch:
    """Right-pads token rows; masks[i][j] says whether token j of row i counts as a target (j >= 1)."""
    width = max(2, *(len(row) for row in rows)) if rows else 2
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width - 1), dtype=torch.bool)
    for i, (row, counts) in enumerate(zip(rows, masks, strict=True)):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row) - 1] = torch.tensor(counts[1:], dtype=torch.bool)
    return TokenBatch(tokens, mask)


def pad_pairs(chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]], *, pad_id: int) -> PairBatch:
    """Right-pads both sides to one width; every real target counts, so lengths are the rows' own."""
    rows = [row for pair in zip(chosen, rejected, strict=True) for row in pair]
    both = pad_rows(rows, [[True] * len(row) for row in rows], pad_id=pad_id)
    width = both.tokens.shape[1]
    return PairBatch(both.tokens.view(len(chosen), 2, width), both.mask.view(len(chosen), 2, width - 1))


def passed(batch: B, budget: int, passes: Passes = int) -> Iterator[tuple[B, bool]]:
    """The micro-batches of a pass without gradients, in row order; then, as often as `passes` says that this rank has
    to keep the others company, a row of no account (False)."""
    parts = split_by_tokens(batch, budget)
    idle = passes(len(parts)) - len(parts)  # asked before the first pass: ranks talk to each other in one order
    for rows in parts:
        yield batch.select(rows), True
    for _ in range(idle):
        yield batch.map(lambda x: x[:1] if len(x) else x.new_zeros(1, *x.shape[1:])), False


def split_by_tokens(batch: TokenBatch, budget: int) -> list[Tensor]:
    """Row indices of micro-batches, each of at most `budget` tokens (one row at least), in row order."""
    parts: list[list[int]] = []
    filled = 0
    for i, cost in enumerate(batch.costs):
        if not parts or filled + cost > budget:
            parts.append([])
            filled = 0
        parts[-1].append(i)
        filled += cost
    return [torch.tensor(part) for part in parts]
