"""Traffic of a kind: clients that ask one request after the other, and requests that come by themselves."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.serving.client import Answer, Caller, Cut, Mangled

Draw = Callable[[int], bytes]
"""The request of a number."""


@dataclass(frozen=True)
class Sent:
    """A request that was sent: when it was due, and what came (None: lost)."""

    number: int
    due: float
    ended: float
    answer: Answer | None

    @property
    def seconds(self) -> float:
        """From the moment when it was due, so that waiting for a free connection counts."""
        return self.ended - self.due


@dataclass
class Crowd:
    """Clients of one server; connections are kept and used again."""

    port: int
    idle: list[Caller] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    async def one(self, number: int, data: bytes, due: float) -> None:
        caller = self.idle.pop() if self.idle else Caller(self.port)
        answer = None
        try:
            answer = await caller.ask(data)
        except (Cut, Mangled, OSError) as fault:
            self.faults.append(repr(fault)[:300])
        self.sent.append(Sent(number, due, time.perf_counter(), answer))
        self.idle.append(caller)

    async def closed(self, clients: int, draw: Draw, *, seconds: float = 0.0, requests: int = 0) -> list[Sent]:
        """So many clients, each one request after the other, for so long or so many requests in all."""
        self.sent = []
        until = time.perf_counter() + seconds
        number = iter(range(requests or 1 << 60))

        async def client() -> None:
            for i in number:
                if seconds and time.perf_counter() >= until:
                    return
                await self.one(i, draw(i), time.perf_counter())

        await asyncio.gather(*(client() for _ in range(clients)))
        return self.sent

    async def opened(self, rate: float, draw: Draw, *, seconds: float, seed: int = 0) -> list[Sent]:
        """Requests at random moments, `rate` a second on average, whether earlier ones are answered or not."""
        self.sent = []
        dice, began, due, number = random.Random(seed), time.perf_counter(), 0.0, 0
        going: set[asyncio.Task[None]] = set()
        while (due := due + dice.expovariate(rate)) < seconds:
            # Those that are due already are sent together; a sleep is no finer than a millisecond.
            if (ahead := began + due - time.perf_counter()) > 0.0005:
                await asyncio.sleep(ahead)
            going.add(asyncio.create_task(self.one(number, draw(number), began + due)))
            number += 1
            if number % 64 == 0:
                going = {task for task in going if not task.done()}
        await asyncio.gather(*going)
        return self.sent

    def close(self) -> None:
        for caller in self.idle:
            caller.close()


def good(sent: Sequence[Sent], status: int = 200) -> list[Sent]:
    return [one for one in sent if one.answer is not None and one.answer.status == status]


def lost(sent: Sequence[Sent]) -> int:
    return sum(one.answer is None for one in sent)


def statuses(sent: Sequence[Sent]) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in sent:
        key = str(one.answer.status) if one.answer else "lost"
        found[key] = found.get(key, 0) + 1
    return dict(sorted(found.items()))
