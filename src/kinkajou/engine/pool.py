"""Workers fed from one queue: who gets which prompts with which weights, and what happens when one dies.

A chunk of prompts names the version of the weights that it must be sampled with.  Each worker has a thread of the
trainer that takes the next chunk, hands the worker that version where it holds another, and asks for the answers.  A
lost worker's chunk goes back to the front of the queue.  So no order of events changes what is sampled.
"""

import threading
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Protocol, cast

from torch import Tensor

from kinkajou.batch import Sampling
from kinkajou.engine.engine import Answered, Prompts
from kinkajou.engine.worker import FROZEN, NONE, Block, Chunk, Plan, Reply, as_array, packages
from kinkajou.errors import UserError

CHUNKS = 4
"""Chunks of a batch for each worker: the faster ones take more of them."""
BLOCK_BYTES = 64 * 2**20
"""Weights that are handed over at once, one parameter at least."""
TRIES = 5
"""Workers that may be lost over the same prompts."""
Held = Any
"""A block of weights where all workers can read it."""


class WorkerLost(Exception):
    """The worker's process, or the machine it ran on, is gone."""


class Hand(Protocol):
    """A worker as the trainer reaches it; each call waits for its end, or raises WorkerLost."""

    def about(self) -> dict[str, str]: ...

    def build(self, plan: Plan) -> None: ...

    def take(self, version: int, index: int, last: bool, block: Held) -> int: ...

    def sample(self, chunk: Chunk) -> Reply: ...

    def end(self) -> None:
        """Ends the process at once, whatever it does."""
        ...


class Crew(Protocol):
    """Where workers come from."""

    def hire(self) -> Hand: ...

    def hold(self, block: Block) -> Held:
        """Copies weights to where all workers can read them, until nobody holds what this returns."""
        ...

    def close(self) -> None: ...


@dataclass(eq=False)
class Batch:
    """Prompts on their way."""

    version: int
    answers: list[Answered | None]
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.answers)


class Pool:
    """N workers with the same model.  `lost` counts those that were replaced."""

    def __init__(self, crew: Crew, plan: Plan, *, workers: int, say: Callable[[str], None] = print) -> None:
        self.crew, self.plan, self.workers, self.say = crew, plan, workers, say
        self.newest = 0
        self.lost = 0
        self._changed = threading.Condition()
        self._queue: deque[tuple[Chunk, Batch]] = deque()
        self._under_way: list[Chunk] = []
        self._frozen: list[Held] = []
        self._weights: dict[int, list[Held]] = {}
        self._hands: list[Hand | None] = [None] * workers
        self._held: list[int] = [NONE] * workers
        self._fault: UserError | None = None
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def start(self, params: Iterable[tuple[str, Tensor]], trained: Container[str]) -> None:
        """Brings all workers up with all weights; those that are trained come again with each `load`."""
        self._weights[0] = []
        for is_trained, block in blocks(params, trained):
            (self._weights[0] if is_trained else self._frozen).append(self.crew.hold(block))
        self._threads = [
            threading.Thread(target=self._serve, args=(seat,), name=f"worker {seat}", daemon=True)
            for seat in range(self.workers)
        ]
        for thread in self._threads:
            thread.start()
        with self._changed:
            self._wait(lambda: all(version == 0 for version in self._held))

    def load(self, params: Iterable[tuple[str, Tensor]], trained: Container[str]) -> None:
        """New values of the trained weights, in blocks.

        Where nothing is being sampled each block is handed round before the next one is made, and the old one let
        go, so that there is no second copy; else workers get them when they come to need them.
        """
        version = self.newest + 1
        with self._changed:
            self._check()
            idle = not self._queue and not self._under_way
        old, fresh = self._weights[self.newest], list[Held]()
        mine = ((name, param) for name, param in params if name in trained)
        for index, (block, last) in enumerate(marked_last(block for _, block in blocks(mine, trained))):
            fresh.append(self.crew.hold(block))
            if idle:
                old[index : index + 1] = [None]
                self._hand_round(version, index, last, fresh[-1])
        with self._changed:
            self.newest = version
            self._weights[version] = fresh
            self._forget()

    def submit(self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, seeds: Sequence[int]) -> Batch:
        """Queues prompts, to be sampled with the weights of now."""
        batch = Batch(self.newest, [None] * len(prompts))
        size = max(1, ceil(len(prompts) / (self.workers * CHUNKS)))
        with self._changed:
            for start in range(0, len(prompts), size):
                rows = list(range(start, min(start + size, len(prompts))))
                asked = [list(prompts[i]) for i in rows]
                chunk = Chunk(rows, asked, [seeds[i] for i in rows], sampling, max_new_tokens, self.newest)
                self._queue.append((chunk, batch))
            self._changed.notify_all()
        return batch

    def collect(self, batch: Batch) -> list[Answered]:
        """The answers in the order of the prompts, once all are there."""
        with self._changed:
            self._wait(lambda: not batch.left)
        return cast(list[Answered], batch.answers)

    def close(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for hand in self._hands:
            if hand:
                hand.end()
        for thread in self._threads:
            thread.join()
        self.crew.close()

    def _wait(self, done: Callable[[], bool]) -> None:
        """Until it is done, or cannot come to be any more."""
        while not done():
            self._check()
            self._changed.wait(1.0)

    def _check(self) -> None:
        if self._fault:
            raise self._fault
        if self._threads and not all(thread.is_alive() for thread in self._threads):
            raise RuntimeError("a thread that feeds a worker has failed; its traceback is above")

    def _serve(self, seat: int) -> None:
        """A worker's life, and that of those who replace it."""
        try:
            self._hire(seat)
            while (found := self._next()) is not None:
                self._handle(seat, *found)
        except WorkerLost:  # while the pool was closed
            return
        except UserError as fault:
            with self._changed:
                self._fault = self._fault or fault
                self._changed.notify_all()

    def _next(self) -> tuple[Chunk, Batch] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopped or self._fault)
            if self._stopped or self._fault:
                return None
            found = self._queue.popleft()
            self._under_way.append(found[0])
            return found

    def _handle(self, seat: int, chunk: Chunk, batch: Batch) -> None:
        """One chunk, from the queue into its batch, or back to the front if the worker dies over it."""
        reply = None
        try:
            hand = self._hands[seat] or self._hire(seat)
            if self._held[seat] != chunk.version:
                self._give(seat, hand, chunk.version, self._weights[chunk.version])
            reply = hand.sample(chunk)
        except WorkerLost as lost:
            self._gone(seat, chunk, str(lost))
        with self._changed:
            self._under_way.remove(chunk)
            if reply is None:
                self._queue.appendleft((chunk, batch))
            else:
                check_reply(reply, chunk)
                for row, answer in zip(chunk.rows, reply.answers, strict=True):
                    batch.answers[row] = answer
                batch.left -= len(chunk.rows)
            self._forget()
            self._changed.notify_all()

    def _gone(self, seat: int, chunk: Chunk, why: str) -> None:
        """Ends what may be left of a lost worker; its place is filled when the next chunk comes to it."""
        hand, self._hands[seat], self._held[seat] = self._hands[seat], None, NONE
        if hand:
            hand.end()
        if self._stopped:
            return
        chunk.tries += 1
        with self._changed:
            self.lost += 1
        self.say(f"note: rollout worker {seat} is lost and is replaced; {len(chunk.rows)} prompts are asked again")
        if chunk.tries >= TRIES:
            raise UserError(
                f"{TRIES} rollout workers were lost over the same prompts",
                evidence=why,
                fix="a worker may have too little memory: lower --max_new_tokens or --tokens_per_microbatch",
            )

    def _hire(self, seat: int) -> Hand:
        """A new worker, with the newest weights."""
        why = ""
        for _ in range(TRIES):
            if self._stopped:
                raise WorkerLost("the pool is closed")
            hand = self.crew.hire()
            try:
                self._make_ready(seat, hand)
                return hand
            except WorkerLost as lost:
                hand.end()
                why = str(lost)
        raise UserError(
            f"rollout worker {seat} does not come up",
            evidence=f"{TRIES} tries; the last one: {why}",
            fix="is there memory for another copy of the model?",
        )

    def _make_ready(self, seat: int, hand: Hand) -> None:
        self._hands[seat] = hand
        check_versions(hand.about())
        hand.build(self.plan)
        for index, block in enumerate(self._frozen):
            hand.take(FROZEN, index, index == len(self._frozen) - 1, block)
        with self._changed:
            version = self.newest
            weights = list(self._weights[version])
        self._give(seat, hand, version, weights)

    def _give(self, seat: int, hand: Hand, version: int, weights: Sequence[Held]) -> None:
        held = NONE
        for index, block in enumerate(weights):
            held = hand.take(version, index, index == len(weights) - 1, block)
        if held != version:
            raise RuntimeError(f"worker {seat} holds version {held} of the weights after it was given {version}")
        with self._changed:
            self._held[seat] = version
            self._changed.notify_all()

    def _hand_round(self, version: int, index: int, last: bool, block: Held) -> None:
        """One block to every worker at the same time, while none of them samples."""

        def give(seat: int, hand: Hand) -> None:
            try:
                self._held[seat] = hand.take(version, index, last, block)
            except WorkerLost:  # noticed again, and mended, when its next chunk comes
                self._held[seat] = NONE

        threads = [threading.Thread(target=give, args=(i, hand)) for i, hand in enumerate(self._hands) if hand]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _forget(self) -> None:
        """Lets go of weights that no chunk asks for any more."""
        wanted = {self.newest, *(chunk.version for chunk, _ in self._queue), *(c.version for c in self._under_way)}
        for version in self._weights.keys() - wanted:
            del self._weights[version]


def blocks(params: Iterable[tuple[str, Tensor]], trained: Container[str]) -> Iterator[tuple[bool, Block]]:
    """Parameters in blocks of about BLOCK_BYTES, trained ones (True) apart from those that are not."""
    open_blocks: dict[bool, Block] = {True: {}, False: {}}
    for name, param in params:
        kind, array = name in trained, as_array(param)
        block = open_blocks[kind]
        if block and sum(other.nbytes for other in block.values()) + array.nbytes > BLOCK_BYTES:
            yield kind, block
            block = open_blocks[kind] = {}
        block[name] = array
    yield from ((kind, block) for kind, block in open_blocks.items() if block)


def marked_last(found: Iterator[Block]) -> Iterator[tuple[Block, bool]]:
    """Each block, and whether it is the last."""
    before = next(found, None)
    for block in found:
        assert before is not None
        yield before, False
        before = block
    if before is not None:
        yield before, True


def check_versions(about: dict[str, str]) -> None:
    """Refuses a worker whose packages are not the trainer's: its numbers would be others."""
    differ = {name: (about.get(name, "none"), mine) for name, mine in packages().items() if about.get(name) != mine}
    if differ:
        raise UserError(
            f"the rollout worker on {about.get('host', 'an unknown host')} runs other versions than the trainer",
            evidence="; ".join(f"{name} {theirs} there, {mine} here" for name, (theirs, mine) in differ.items()),
            fix="install the same versions on every machine of the Ray cluster",
        )


def check_reply(reply: Reply, chunk: Chunk) -> None:
    if reply.version != chunk.version:
        raise RuntimeError(f"sampled with version {reply.version} of the weights, wanted was {chunk.version}")
    if len(reply.answers) != len(chunk.rows):
        raise RuntimeError(f"{len(reply.answers)} answers to {len(chunk.rows)} prompts")
    for answer in reply.answers:
        if not len(answer.tokens) == len(answer.logps) <= chunk.max_new_tokens:
            raise RuntimeError(f"an answer of {len(answer.tokens)} tokens and {len(answer.logps)} log-probabilities")
