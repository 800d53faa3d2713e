"""Rollout workers in this process instead of Ray's, which die and dawdle as a test wants."""

import threading
import time
from collections.abc import Callable
from typing import Any

from kinkajou.engine.pool import WorkerLost
from kinkajou.engine.worker import Block, Chunk, Plan, Reply, Worker

Event = tuple[int, str, Any]
BUILDING = threading.Lock()


class Hand:
    """A worker in this process; `fails(event)` says when it dies."""

    def __init__(self, number: int, crew: "Crew") -> None:
        self.number, self.crew, self.worker, self.dead = number, crew, Worker(), False

    def _do(self, what: str, detail: Any, work: Callable[..., Any], *given: Any) -> Any:
        event = (self.number, what, detail)
        with self.crew.lock:
            self.crew.events.append(event)
        if self.dead or self.crew.fails(event):
            self.dead = True
            raise WorkerLost(f"worker {self.number} died")
        if what == "sample":
            time.sleep(self.crew.slow.get(self.number, 0.0))
        return work(*given)

    def about(self) -> dict[str, str]:
        return {**self.worker.about(), **self.crew.differ}

    def build(self, plan: Plan) -> None:
        with BUILDING:  # filters of warnings are not made for threads; real workers are processes
            self._do("build", None, self.worker.build, plan)

    def take(self, version: int, index: int, last: bool, block: Block) -> int:
        found: int = self._do("take", (version, index), self.worker.take, version, index, last, block)
        return found

    def sample(self, chunk: Chunk) -> Reply:
        found: Reply = self._do("sample", chunk.seeds, self.worker.sample, chunk)
        return found

    def end(self) -> None:
        self.dead = True


class Crew:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.events: list[Event] = []
        self.hands: list[Hand] = []
        self.fails: Callable[[Event], bool] = lambda event: False
        self.slow: dict[int, float] = {}
        self.differ: dict[str, str] = {}
        self.closed = False

    def hire(self) -> Hand:
        with self.lock:
            self.hands.append(Hand(len(self.hands), self))
            return self.hands[-1]

    def hold(self, block: Block) -> Block:
        return {name: array.copy() for name, array in block.items()}

    def close(self) -> None:
        self.closed = True

    def asked(self) -> list[int]:
        """Seeds in the order in which workers were asked for them."""
        return [seed for _, what, seeds in self.events if what == "sample" for seed in seeds]
