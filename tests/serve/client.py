"""The official client beside a server, and a backend that says what it is told to."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import openai
from benchmarks.serving.stub import Stub
from place import make_house, served

from kinkajou.serve.backend import Began, Event, Finish, Job, Piece
from kinkajou.serve.house import House
from kinkajou.serve.words import Words

T = TypeVar("T")


def talk(work: Callable[[openai.OpenAI], T], house: House | None = None, key: str = "no key") -> T:
    """What the client does in a thread, the server beside it."""

    async def beside() -> T:
        async with served(house) as place:
            base = f"http://127.0.0.1:{place.port}/v1"
            with openai.OpenAI(base_url=base, api_key=key, max_retries=0, timeout=10) as client:
                return await asyncio.to_thread(work, client)

    return asyncio.run(beside())


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


class Script(Stub):
    """Says what it is told to, piece by piece; an exception among the pieces is raised."""

    def __init__(self, *pieces: str | Exception, finish: Finish = "stop") -> None:
        super().__init__("script")
        self.pieces, self.finish, self.jobs = pieces, finish, list[Job]()

    async def events(self, job: Job, words: Sequence[str]) -> AsyncIterator[Event]:
        self.jobs.append(job)
        yield Began(7)
        for i, piece in enumerate(self.pieces):
            if isinstance(piece, Exception):
                raise piece
            last = i + 1 == len(self.pieces)
            for choice in range(job.n):
                yield Piece(choice, piece, i + 1, self.finish if last else "")


def told_to(*pieces: str | Exception, finish: Finish = "stop", words: list[str] | None = None, **more: Any) -> House:
    backends = {"script": Script(*pieces, finish=finish)}
    return make_house(backends, words=Words(words, "no comment") if words else None, **more)


def job_of(house: House) -> Job:
    (backend,) = house.backends.values()
    assert isinstance(backend, Script)
    return backend.jobs[-1]
