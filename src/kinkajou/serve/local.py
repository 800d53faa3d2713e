"""A model in a process of its own (`worker.py`) as a backend.  Nothing here imports torch."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, Literal

from kinkajou.serve.backend import Alternative, Began, Broken, Event, Job, Load, Piece, Refused, Token
from kinkajou.serve.child import GONE, Child, Line, Owner


@dataclass(frozen=True)
class Hosting:
    """How a worker loads its model."""

    bits: Literal[16, 8, 4] = 16
    dtype: Literal["fp32", "bf16"] = "fp32"
    slots: int = 16
    context: int | None = None
    max_tokens: int | None = None
    """Longest answer; None: as long as the context."""
    template: str = "auto"
    threads: int | None = None
    """Of the worker; None: torch's own choice."""


class Answers:
    """The events of one job, as they come in."""

    def __init__(self, choices: int) -> None:
        self.queue: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self.left = choices
        self.over = False
        """Whether the worker has nothing of it any more."""

    def put(self, event: Event | Exception) -> None:
        if isinstance(event, Piece) and event.finish:
            self.left -= 1
        self.over = self.over or not self.left or isinstance(event, Exception)
        self.queue.put_nowait(event)

    def __aiter__(self) -> "Answers":
        return self

    async def __anext__(self) -> Event:
        if self.over and self.queue.empty():
            raise StopAsyncIteration
        event = await self.queue.get()
        if isinstance(event, Exception):
            raise event
        return event


class LocalBackend(Owner):
    """`source` is a folder, a run's folder or a hub id."""

    def __init__(self, name: str, source: str, hosting: Hosting | None = None) -> None:
        self.name, self.created = name, int(time.time())
        self.hosting = hosting or Hosting()
        self.child = Child(
            {"kind": "language", "source": source, **asdict(self.hosting)}, take=self._take, die=self._die
        )
        self.open: dict[int, Answers] = {}
        self.numbers = count()
        self.now = Load(slots=self.hosting.slots)

    @property
    def load(self) -> Load:
        return self.now

    @property
    def context(self) -> int | None:
        return self.child.facts.get("context", self.hosting.context)

    @property
    def facts(self) -> dict[str, Any]:
        """What the worker says of its model: context, slots, vocabulary, template, dtype, bits, device."""
        return self.child.facts

    @asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[AsyncIterator[Event]]:
        number = next(self.numbers)
        self.child.send({"ask": number, "job": asdict(job)})
        answers = self.open[number] = Answers(job.n)
        try:
            yield answers
        finally:
            self.open.pop(number, None)
            if not answers.over:
                self.child.drop(number)

    def _take(self, line: Line) -> None:
        for number, tokens, dropped in line.get("began", ()):
            self._put(number, Began(tokens, dropped))
        for number, choice, text, told, finish, *tokens in line.get("pieces", ()):
            words = tuple(map(token, tokens[0])) if tokens else ()
            self._put(number, Piece(choice, text, told, finish, words))
        for number, problem, param, code in line.get("refused", ()):
            self._put(number, Refused(problem, param=param, code=code))
        for number, problem in line.get("broken", ()):
            self._put(number, Broken(problem))
        if "load" in line:
            self.now = Load(*line["load"])

    def _put(self, number: int, event: Event | Exception) -> None:
        if (answers := self.open.get(number)) is not None:  # else its reader has left
            answers.put(event)

    def _die(self) -> None:
        for answers in self.open.values():
            if not answers.over:
                answers.put(Broken(GONE))
        self.now = Load(slots=self.hosting.slots)


def token(told: list[Any]) -> Token:
    said, likeliest = told
    return Token(alternative(said), tuple(map(alternative, likeliest)))


def alternative(told: list[Any]) -> Alternative:
    text, raw, logprob = told
    return Alternative(text, bytes.fromhex(raw), logprob)
