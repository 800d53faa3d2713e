"""A backend without a model: it repeats the last message word by word, as fast or as slowly as asked."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from kinkajou.serve.backend import Alternative, Began, Event, Job, Load, Piece, Refused, State, Token, Turn


class Stub:
    """One token for each word of the last message; `pause_s` before each; at most `slots` at once."""

    def __init__(self, name: str = "stub", *, pause_s: float = 0.0, slots: int = 16, context: int = 4096) -> None:
        self.name, self.created, self.pause_s, self.context = name, 1, pause_s, context
        self.state: State = "starting"
        self.free = asyncio.Semaphore(slots)
        self.slots, self.running, self.waiting = slots, 0, 0

    @property
    def load(self) -> Load:
        return Load(self.running, self.waiting, self.slots, self.running, self.slots * self.context)

    async def start(self) -> None:
        self.state = "ready"

    async def close(self) -> None:
        self.state = "closed"

    @asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[AsyncIterator[Event]]:
        words = (job.text if job.text is not None else job.turns[-1].content).split(" ")
        if len(words) > self.context:
            raise Refused(f"the prompt has {len(words)} tokens, the context {self.context}", param="messages")
        self.waiting += 1
        try:
            await self.free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield self.events(job, words)
        finally:
            self.running -= 1
            self.free.release()

    async def events(self, job: Job, words: list[str]) -> AsyncIterator[Event]:
        yield Began(len(words))
        limit = job.max_tokens or self.context
        clock = asyncio.get_running_loop().time
        began = clock()
        for i, word in enumerate(words[:limit]):
            # By the clock from the beginning on, so that late wake-ups do not add up.
            await asyncio.sleep(max(0.0, began + (i + 1) * self.pause_s - clock()))
            text = word if i == 0 else f" {word}"
            said = Alternative(text, text.encode(), -0.5)
            tokens = (Token(said, (said,) * min(1, job.logprobs)),) if job.logprobs is not None else ()
            last = i + 1 == len(words)
            for choice in range(job.n):
                finish = "stop" if last else "length" if i + 1 == limit else ""
                yield Piece(choice, text, i + 1, finish, tokens)


class StubScorer:
    """A chat's score is the number of words of its last turn."""

    name = "stub-reward"

    def __init__(self) -> None:
        self.state: State = "starting"

    async def start(self) -> None:
        self.state = "ready"

    async def close(self) -> None:
        self.state = "closed"

    async def score(self, chats: Sequence[tuple[Turn, ...]]) -> list[float]:
        return [float(len(chat[-1].content.split(" "))) for chat in chats]
