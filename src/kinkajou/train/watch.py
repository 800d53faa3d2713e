"""Who looks on at a run: `kinkajou profile` hears where steps and phases begin and end; else what is said about a lost
rank names them."""

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar

from kinkajou.parallel.whereabouts import NOW


class Watcher:
    """Told by the run what it does; this one only notes where the process is."""

    def total(self, own: int) -> int:
        """How many steps the run shall have, of those that its settings say."""
        return own

    def step(self, number: int) -> None:
        """Before each step, and once more behind the last."""
        NOW.step, NOW.phase = number, ""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around each phase."""
        NOW.phase = name
        return nullcontext()

    def tokens(self, phase: str, count: int) -> None:
        """Real tokens that a phase took or made."""


WATCHER: ContextVar[Watcher] = ContextVar("WATCHER", default=Watcher())  # noqa: B039  # it holds no state
