"""A reward model in a process of its own as a scorer."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count

from kinkajou.serve.backend import Broken, Refused, Turn
from kinkajou.serve.child import GONE, Child, Line, Owner
from kinkajou.serve.local import Hosting


class LocalScorer(Owner):
    """Scores chats one after the other; of `hosting` dtype, template and threads count."""

    def __init__(self, name: str, source: str, hosting: Hosting | None = None) -> None:
        self.name = name
        arguments = {"kind": "reward", "source": source, **asdict(hosting or Hosting())}
        self.child = Child(arguments, take=self._take, die=self._die)
        self.open: dict[int, asyncio.Future[list[float]]] = {}
        self.numbers = count()

    async def score(self, chats: Sequence[tuple[Turn, ...]]) -> list[float]:
        number = next(self.numbers)
        self.child.send({"score": number, "chats": [[asdict(turn) for turn in chat] for chat in chats]})
        future = self.open[number] = asyncio.get_running_loop().create_future()
        try:
            scores: list[float] = await future
            return scores
        finally:
            self.open.pop(number, None)
            if not future.done() or future.cancelled():
                self.child.drop(number)

    def _take(self, line: Line) -> None:
        for number, scores in line.get("scores", ()):
            self._open(number).set_result(scores)
        for number, problem, param, code in line.get("refused", ()):
            self._open(number).set_exception(Refused(problem, param=param, code=code))
        for number, problem in line.get("broken", ()):
            self._open(number).set_exception(Broken(problem))

    def _open(self, number: int) -> "asyncio.Future[list[float]]":
        """One that nobody waits for any more takes what it gets."""
        future = self.open.get(number)
        if future is None or future.done():
            future = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda done: done.exception())
        return future

    def _die(self) -> None:
        for future in self.open.values():
            if not future.done():
                future.set_exception(Broken(GONE))
