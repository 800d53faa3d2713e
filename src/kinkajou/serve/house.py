"""What all routes share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import Request

from kinkajou.serve.backend import Backend, Scorer
from kinkajou.serve.desk import Desk
from kinkajou.serve.limits import Limits
from kinkajou.serve.metrics import Metrics
from kinkajou.serve.problems import Problem
from kinkajou.serve.words import Words


@dataclass(frozen=True, kw_only=True)
class House:
    backends: Mapping[str, Backend]
    """By the names that requests use; the first is asked where none is named."""
    desk: Desk
    scorer: Scorer | None = None
    words: Words | None = None
    """What no answer may say."""
    rate: float = 0.0
    """Requests a second that one client may send to the routes of 2023; 0: any number."""
    key: bytes | None = field(default=None, repr=False)
    hosts: frozenset[str] = frozenset()
    """Names in lower case by which the server may be called besides its own; some with a port."""
    origins: frozenset[str] = frozenset()
    """Origins of web pages that may call it besides its own page."""

    def __post_init__(self) -> None:
        if self.scorer and self.scorer.name in self.backends:  # the desk counts, and /ready tells, by name
            raise ValueError(f"a model and the reward model have one name, {self.scorer.name}")

    @property
    def limits(self) -> Limits:
        return self.desk.limits

    @property
    def metrics(self) -> Metrics:
        return self.desk.metrics

    def backend(self, name: str | None) -> Backend:
        """Problem 404 for a name that is not here."""
        if name is None:
            return next(iter(self.backends.values()))
        if found := self.backends.get(name):
            return found
        known = ", ".join(self.backends)
        raise Problem(404, f"there is no model of that name; here are: {known}", param="model", code="model_not_found")


def request_id(request: Request) -> str:
    """What the guard has named this request; also in the header x-request-id."""
    return str(request.scope.get("kinkajou.request_id", ""))
