"""Where jobs are let in: a bound on how many, a bound on how long, a count of how they end."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kinkajou.exchange import is_loopback
from kinkajou.serve.backend import Backend, Began, Broken, Event, Full, Job, Piece, Refused, State
from kinkajou.serve.limits import Limits
from kinkajou.serve.metrics import Metrics
from kinkajou.serve.problems import Busy, Deadline, Problem, Stopping

LONGEST_WAIT_S = 60


@dataclass(eq=False)
class Ticket:
    """One job that was let in."""

    model: str
    client: str
    num_choices: int
    timeout: asyncio.Timeout
    since: float = field(default_factory=time.monotonic)
    began: float = 0.0
    """When its prompt had been read."""
    cut: bool = False
    tokens: dict[int, int] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)
    """Tokens of each choice so far, and when the last of them came."""


class Desk:
    """`queue`: choices that may wait for a slot, for each model."""

    def __init__(self, limits: Limits, metrics: Metrics, *, queue: int) -> None:
        self.limits, self.queue, self.metrics = limits, queue, metrics
        self.draining = False
        self.tickets: set[Ticket] = set()
        self.choices: Counter[str] = Counter()
        """Running and waiting, by model."""
        self.by_client: Counter[tuple[str, str]] = Counter()
        self.choice_s: dict[str, float] = {}
        """What a choice has taken of late, in seconds of a slot, by model."""

    @asynccontextmanager
    async def admitted(self, backend: Backend, job: Job, client: str = "") -> AsyncIterator[AsyncIterator[Event]]:
        """The events of a job within its deadline.  Leaving the block frees its slots.

        Problem (Busy, Deadline, Stopping), Refused or Broken, on entering or while iterating.
        """
        self._let_in(backend.name, backend.state, max(1, backend.load.slots), job.n, client)
        async with self._ticket(backend.name, job.n, client) as ticket, backend.run(job) as events:
            yield self._watched(ticket, events)

    def refusal(self, backends: Iterable[Backend]) -> Problem | None:
        """Why none of them can be asked for anything now, whatever the request says; None if one can."""
        if self.draining:
            return Stopping()
        waits = []
        for backend in backends:
            slots = max(1, backend.load.slots)
            if backend.state != "ready" or self.choices[backend.name] < slots + self.queue:
                return None
            waits.append(self._wait_s(backend.name, 1, slots))
        return Busy(min(waits, default=1))

    def cut(self) -> None:
        """Ends all that is open, each with Stopping."""
        now = asyncio.get_running_loop().time()
        for ticket in self.tickets:
            ticket.cut = True
            if not ticket.timeout.expired():
                ticket.timeout.reschedule(now)

    def _let_in(self, name: str, state: State, slots: int, num_choices: int, client: str) -> None:
        # Nothing here waits: a refusal must cost microseconds.
        if self.draining:
            raise Stopping
        if state != "ready":
            raise Problem(503, "the model is not ready", code="not_ready", headers={"retry-after": "5"})
        room = slots + self.queue
        if num_choices > room:
            asked = f"{num_choices} answers are asked for (n to each prompt)"
            raise Refused(f"{asked}, this server gives {room} at once", param="n")
        share = room if is_loopback(client) or not client else math.ceil(room * self.limits.open_share)
        full = self.choices[name] + num_choices > room
        if full or self.by_client[name, client] + num_choices > max(share, num_choices):
            self.metrics.jobs.labels(name, "busy").inc()
            wait_s = self._wait_s(name, num_choices, slots)
            if full:
                raise Busy(wait_s)
            raise Busy(wait_s, "this client has too many requests open", "too_many_open")

    @asynccontextmanager
    async def _ticket(self, name: str, num_choices: int, client: str) -> AsyncIterator[Ticket]:
        timeout = asyncio.timeout(self.limits.deadline_s)
        ticket = Ticket(name, client, num_choices, timeout)
        self._count(ticket, 1)
        outcome = "failed"
        try:
            async with timeout:
                yield ticket
            outcome = "done"
        except TimeoutError:
            if not timeout.expired():
                raise
            outcome = "cut" if ticket.cut else "deadline"
            raise (Stopping() if ticket.cut else Deadline(self.limits.deadline_s)) from None
        except (Refused, Broken) as fault:
            outcome = "refused" if isinstance(fault, Refused) else "busy" if isinstance(fault, Full) else "broken"
            raise
        except asyncio.CancelledError:
            outcome = "left"
            raise
        finally:
            self._count(ticket, -1)
            self._ended(ticket, outcome)

    def _wait_s(self, name: str, num_choices: int, slots: int) -> int:
        """Until the queue has room, by what answers have taken of late."""
        wait_s = self.choice_s.get(name, 1.0) * num_choices / slots
        return min(LONGEST_WAIT_S, max(1, math.ceil(wait_s)))

    def _count(self, ticket: Ticket, sign: int) -> None:
        (self.tickets.add if sign > 0 else self.tickets.discard)(ticket)
        self.choices[ticket.model] += sign * ticket.num_choices
        key = ticket.model, ticket.client
        self.by_client[key] += sign * ticket.num_choices
        if not self.by_client[key]:
            del self.by_client[key]

    def _ended(self, ticket: Ticket, outcome: str) -> None:
        now = time.monotonic()
        self.metrics.jobs.labels(ticket.model, outcome).inc()
        if outcome == "done":
            self.metrics.duration.labels(ticket.model).observe(now - ticket.since)
            took_s, known = now - (ticket.began or ticket.since), self.choice_s.get(ticket.model, 1.0)
            self.choice_s[ticket.model] = known + 0.1 * (took_s - known)

    async def _watched(self, ticket: Ticket, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
        metrics, model, counted = self.metrics, ticket.model, 0
        first, between = metrics.first_token.labels(model), metrics.token_time.labels(model)
        said = metrics.tokens.labels(model)
        async for event in events:
            now = time.monotonic()
            if isinstance(event, Began):
                if not ticket.began:
                    ticket.began = now
                    metrics.queue_time.labels(model).observe(now - ticket.since)
                metrics.prompt_tokens.labels(model).inc(max(0, event.prompt_tokens - counted))
                counted = max(counted, event.prompt_tokens)
            elif isinstance(event, Piece):
                before = ticket.tokens.get(event.choice, 0)
                if not ticket.tokens:
                    first.observe(now - ticket.since)
                elif before and event.num_tokens > before:
                    between.observe((now - ticket.last[event.choice]) / (event.num_tokens - before))
                said.inc(max(0, event.num_tokens - before))
                ticket.tokens[event.choice] = event.num_tokens
                ticket.last[event.choice] = now
            yield event
