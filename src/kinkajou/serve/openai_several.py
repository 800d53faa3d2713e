"""Several jobs of one request as one: their answers are numbered on, prompt after prompt."""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from kinkajou.serve.backend import Backend, Began, Event, Job, Load, State

Waiting = asyncio.Queue[tuple[int, Event | Exception | None]]
ROOM = 64
"""Events that may wait to be read; a job waits then."""


class Several:
    """A backend that does the jobs side by side; the job it is given stands for all of them.

    `same_prompt`: it is counted once.
    """

    def __init__(self, backend: Backend, jobs: Sequence[Job], *, same_prompt: bool = False) -> None:
        self.backend, self.jobs, self.together = backend, jobs, max if same_prompt else sum
        self.name, self.created = backend.name, backend.created

    @property
    def state(self) -> State:
        return self.backend.state

    @property
    def load(self) -> Load:
        return self.backend.load

    @property
    def context(self) -> int | None:
        return self.backend.context

    async def start(self) -> None:
        """Begun already."""

    async def close(self) -> None:
        """Not ours to end."""

    def as_one(self) -> Job:
        return replace(self.jobs[0], n=sum(job.n for job in self.jobs))

    @asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[AsyncIterator[Event]]:
        waiting: Waiting = asyncio.Queue(ROOM)
        tasks = [asyncio.ensure_future(self._one(i, waiting)) for i in range(len(self.jobs))]
        try:
            yield self._events(waiting)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, i: int, waiting: Waiting) -> None:
        try:
            async with self.backend.run(self.jobs[i]) as events:
                async for event in events:
                    await waiting.put((i, event))
        finally:
            fault = sys.exception()
            if fault is None or isinstance(fault, Exception):  # raised again where the events are read
                await waiting.put((i, fault))
            # else the reader has left: a full queue would be waited for without end

    async def _events(self, waiting: Waiting) -> AsyncIterator[Event]:
        firsts = [sum(job.n for job in self.jobs[:i]) for i in range(len(self.jobs))]
        prompts, open_jobs = dict[int, Began](), len(self.jobs)
        while open_jobs:
            i, event = await waiting.get()
            if event is None:
                open_jobs -= 1
            elif isinstance(event, Exception):
                raise event
            elif isinstance(event, Began):
                # The number of tokens is told anew with every prompt that has been read.
                prompts[i] = event
                dropped = max(found.dropped_turns for found in prompts.values())
                yield Began(self.together(found.prompt_tokens for found in prompts.values()), dropped)
            else:
                yield replace(event, choice=event.choice + firsts[i])
