"""Who looks on at a run from outside: `kinkajou profile` hears where steps and phases begin and end."""

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar


class Watcher:
    """Told by the run what it does; this one does nothing."""

    def total(self, own: int) -> int:
        """How many steps the run shall have, of those that its settings say."""
        return own

    def step(self, number: int) -> None:
        """Before each step, and once more behind the last."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around each phase."""
        return nullcontext()

    def tokens(self, phase: str, count: int) -> None:
        """Real tokens that a phase took or made."""


WATCHER: ContextVar[Watcher] = ContextVar("WATCHER", default=Watcher())  # noqa: B039  # it holds no state
