"""Settings of what a run keeps, and of how it goes on after it was stopped."""

from dataclasses import dataclass

from kinkajou.config.groups import at_least
from kinkajou.errors import UserError


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    save_every: int = 0
    """Checkpoint every N steps; 0: only at the end."""
    save_minutes: float = 0.0
    """Checkpoint also once this many minutes have gone by since the last one, between two optimiser steps; 0: never."""
    save_updates: int = 0
    """Checkpoint also after every N optimiser steps inside a step of PPO and GRPO; 0: only between steps."""
    save_state: bool = True
    """Checkpoints hold all that decides the future of the run, so that it can go on; without it they are models."""
    save_behind: bool = True
    """Training goes on while a checkpoint, copied into main memory, is written."""
    keep_last: int = 0
    """Checkpoints that stay, the newest of those of `save_every`; 0: all."""
    keep_every: int = 0
    """Checkpoints of every K-th step stay too, beyond `keep_last`; 0: none."""
    resume: str | None = None
    """Go on from the newest whole checkpoint of this run folder, or from this checkpoint, in another `output`."""
    from_step: int | None = None
    """Go on from the checkpoint of this step instead of the newest."""
    allow_change: tuple[str, ...] = ()
    """Settings that may differ from those that the checkpoint was trained with, by name."""

    def __post_init__(self) -> None:
        if (self.keep_last or self.keep_every) and not self.save_every:
            raise UserError(
                "--keep_last and --keep_every choose among the checkpoints of --save_every", fix="--save_every N"
            )
        at_least(self, 0, "save_every", "save_minutes", "save_updates", "keep_last", "keep_every", "from_step")
