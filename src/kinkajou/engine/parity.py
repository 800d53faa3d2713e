"""Whether a server has the weights that it was given: its log-probabilities of fixed tokens beside the trainer's."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

NOISE = 3.0
"""How many times the distance of the last look a move must be before the old weights can be told from the new."""


@dataclass(frozen=True)
class Look:
    """Log-probabilities of the same tokens by the server and by the trainer, both with the weights of that time."""

    server: list[float]
    trainer: list[float]

    @property
    def worst(self) -> float:
        return max(distances(self.server, self.trainer))

    @property
    def mean(self) -> float:
        return fmean(distances(self.server, self.trainer))


def distances(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [abs(x - y) for x, y in zip(a, b, strict=True)]


def is_stale(now: Look, before: Look) -> bool:
    """The server is nearer to the trainer of before than to that of now, by a move that is no rounding.

    This finds old weights also where a step moves less than engine and trainer may differ.
    """
    moved = fmean(distances(now.trainer, before.trainer))
    return moved > NOISE * before.mean and fmean(distances(now.server, before.trainer)) < now.mean


def told(now: Look, before: Look | None) -> str:
    """The evidence, in nats a token."""
    seen = (
        f"log-probs of {len(now.server)} fixed tokens are off by {now.worst:.2g} at worst, {now.mean:.2g} in the mean"
    )
    if before is None:
        return seen
    trainer = fmean(distances(now.trainer, before.trainer))
    server = fmean(distances(now.server, before.server))
    return f"{seen}; since the last weights the trainer's moved by {trainer:.2g}, the server's by {server:.2g}"
