"""Memory that runs out: a pass is made again in smaller parts, which changes no result, or the run says what helps."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass
from typing import TypeVar

import torch

from kinkajou.errors import UserError

T = TypeVar("T")
LESS = "--gradient_checkpointing, --dtype bf16, a lower --max_len, or more processes with --strategy zero3"
SIGNS = ("can't allocate memory", "out of memory", "cannot allocate memory", "not enough memory")
"""How torch's allocators for main memory say it, which raise a plain RuntimeError."""


@dataclass
class Budget:
    """Tokens that go through a model at once.  One object for all passes of a run."""

    tokens: int
    alone: InitVar[bool] = True
    """Whether this process may make a pass again: others would wait for it in theirs."""
    say: InitVar[Callable[[str], None]] = print

    def __post_init__(self, alone: bool, say: Callable[[str], None]) -> None:
        self._alone, self._say = alone, say

    def halve(self, costs: Sequence[int], place: str, seen: str) -> None:
        """Half of what was tried at most; refused where a single row was too much."""
        longest, tried = max(costs, default=0), min(self.tokens, sum(costs))
        evidence = f"{seen}; {len(costs)} rows, the longest of {longest:,} tokens, micro-batches of {tried:,}"
        if not self._alone:
            raise UserError(
                f"memory ran out in the {place}",
                evidence=f"{evidence}; one process of several cannot go back alone while the others wait for it",
                fix=f"lower --tokens_per_microbatch (to {max(longest, tried // 2)}), or {LESS}",
                exit_code=4,
            )
        if tried <= longest:
            raise UserError(
                f"memory ran out in the {place}, with one row at a time", evidence=evidence, fix=LESS, exit_code=4
            )
        before, self.tokens = self.tokens, max(longest, tried // 2)
        self._say(
            f"note: memory ran out in the {place} ({seen}): micro-batches of {self.tokens:,} tokens from here on "
            f"instead of {before:,}. Results do not depend on it; --tokens_per_microbatch {self.tokens} spares the try"
        )


def afford(budget: Budget | int, costs: Sequence[int], place: str, work: Callable[[int], T]) -> T:
    """`work(tokens)`; where memory runs out, all of it anew in smaller parts.  `costs` are its rows' tokens."""
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    while True:
        try:
            return work(budget.tokens)
        except (RuntimeError, MemoryError) as fault:
            if not ran_out(fault):
                raise
            seen = told(fault)
        # Out here: the fault holds the frames, and with them the tensors, of what has failed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        budget.halve(costs, place, seen)


@contextmanager
def needed(place: str, fix: str) -> Iterator[None]:
    """Where no smaller parts would help: memory that runs out inside is a sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as fault:
        if not ran_out(fault):
            raise
        raise UserError(f"memory ran out in the {place}", evidence=told(fault), fix=fix, exit_code=4) from None


def ran_out(fault: BaseException) -> bool:
    if isinstance(fault, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(fault, RuntimeError) and any(sign in str(fault).lower() for sign in SIGNS)


def told(fault: BaseException) -> str:
    """How much was wanted, as far as the allocator says it."""
    found = re.search(r"allocate ([\d.]+ ?[KMGT]?i?B(?:ytes)?)", str(fault), re.IGNORECASE)
    if not found:
        return str(fault).strip().partition("\n")[0][:200] or "no more is known"
    number = re.fullmatch(r"(\d+) ?bytes", found[1], re.IGNORECASE)
    return f"{int(number[1]) / 2**30:.3g} GiB were wanted" if number else f"{found[1]} were wanted"
