"""The order of training rows: a pure function of (seed, step), so that any step can be taken up again."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from kinkajou.errors import UserError


@lru_cache(maxsize=4)
def permutation(rows: int, seed: str) -> list[int]:
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return order


@dataclass(frozen=True)
class Shuffle:
    """Epoch after epoch of permutations of range(rows); a remainder shorter than a batch waits for the next epoch."""

    rows: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.rows < self.batch_size:
            raise UserError(
                "not enough rows for a batch",
                evidence=f"{self.rows} usable rows, a batch takes {self.batch_size}",
                fix="give more data or a smaller batch",
            )

    @property
    def batches_per_epoch(self) -> int:
        return self.rows // self.batch_size

    def batch(self, step: int) -> list[int]:
        """Row numbers of the step's batch (steps count from 0), over all ranks."""
        epoch, place = divmod(step, self.batches_per_epoch)
        order = permutation(self.rows, f"{self.seed}/{epoch}")
        return order[place * self.batch_size : (place + 1) * self.batch_size]


def share(rows: Sequence[int], *, rank: int, world: int) -> list[int]:
    """This rank's part of a batch; the union over ranks is the batch, whatever their number."""
    check_shares(len(rows), world)
    return list(rows[rank::world])


def check_shares(size: int, world: int) -> None:
    """Refuses a batch of which not every process would get the same number of samples."""
    if size < world:
        raise UserError(
            "there are more processes than samples in a batch",
            evidence=f"{world} processes with data of their own, a batch of {size}",
            fix=f"start {size} or fewer, or use a batch size that {world} divides",
        )
    if size % world:
        divisors = [number for number in range(1, world) if size % number == 0]
        raise UserError(
            f"a batch of {size} cannot be shared by {world} processes",
            fix=f"use a batch size that {world} divides ({size - size % world} or {size + world - size % world}), "
            f"or {divisors[-1]} processes",
        )


def hold_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers to train on and to hold out, in order; at least one is held out if share > 0."""
    order = permutation(count, f"{seed}/held out")
    held = max(1, round(count * share)) if share > 0 else 0
    return sorted(order[held:]), sorted(order[:held])
