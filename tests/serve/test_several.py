"""Several jobs as one: their reader may leave at any time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kinkajou.serve.backend import Began, Event, Job, Load, Piece, State
from kinkajou.serve.openai_several import ROOM, Several


class Talkative:
    """Says more than anybody's queue holds; counts the jobs that are open."""

    name, created, context = "talkative", 0, None
    state: State = "ready"
    open = 0

    @property
    def load(self) -> Load:
        return Load(self.open, 0, 4)

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    @asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[AsyncIterator[Event]]:
        self.open += 1
        try:
            yield self.events()
        finally:
            self.open -= 1

    async def events(self) -> AsyncIterator[Event]:
        yield Began(1)
        for i in range(4 * ROOM):
            yield Piece(0, "x", i + 1)
        yield Piece(0, "", 4 * ROOM + 1, "stop")


class Faulty(Talkative):
    async def events(self) -> AsyncIterator[Event]:
        yield Began(1)
        raise ZeroDivisionError("nobody foresaw it")


def test_what_nobody_foresaw_is_raised_where_it_is_read() -> None:
    async def scene() -> list[Event]:
        several = Several(Faulty(), [Job(text="a"), Job(text="b")])
        async with several.run(several.as_one()) as events:
            return [event async for event in events]

    with pytest.raises(ZeroDivisionError):
        asyncio.run(scene())


def test_a_reader_that_takes_nothing_can_leave() -> None:
    async def scene() -> int:
        backend = Talkative()
        several = Several(backend, [Job(text="a"), Job(text="b")])
        stands = asyncio.Event()

        async def reader() -> None:
            async with several.run(several.as_one()) as events:
                async for _ in events:
                    stands.set()
                    await asyncio.Event().wait()

        task = asyncio.create_task(reader())
        await stands.wait()
        for _ in range(10 * ROOM):  # both jobs have filled the queue by then
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
        return backend.open

    assert asyncio.run(scene()) == 0
