"""Which samples run: a queue in front of the slots, refilled as samples finish."""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kinkajou.batch import PLAIN, Sampling

Decoder = Callable[[list[int]], str]
"""Tokens of an answer -> its text."""
PREFILL_TOKENS = 8192
"""Prompt tokens that go through the model at once, one prompt at least."""


@dataclass(eq=False)
class Sample:
    """One answer in the making."""

    number: int
    prompt: tuple[int, ...]
    seed: int
    max_new_tokens: int
    sampling: Sampling = PLAIN
    stops: tuple[str, ...] = ()
    """Texts at which the answer ends; needs a decoder."""
    likeliest: int | None = None
    """How many other tokens are told with each one, under the model's own distribution; None: not even its own."""
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finished: Literal["", "end", "stop", "length", "dropped"] = ""
    dice: NDArray[np.float64] = field(init=False)
    """The uniform number of each of its tokens: they depend on its own seed alone."""

    def __post_init__(self) -> None:
        self.dice = np.random.Generator(np.random.Philox(key=self.seed)).random(self.max_new_tokens)

    @property
    def length(self) -> int:
        """Tokens whose keys and values are kept: all but the last one drawn."""
        return len(self.prompt) + max(0, len(self.tokens) - 1)

    def take(self, token: int, logp: float, ends: set[int], decode: Decoder | None) -> None:
        """One more token, and whether it is the last: an end token, a stop text, or all that may be said."""
        self.tokens.append(token)
        self.logps.append(logp)
        if token in ends:
            self.finished = "end"
        elif self.stops and decode is not None and any(stop in decode(self.tokens) for stop in self.stops):
            self.finished = "stop"
        elif len(self.tokens) == self.max_new_tokens:
            self.finished = "length"


@dataclass
class Scheduler:
    """Samples wait in the order they came; running ones hold slots 0 .. n - 1 in the order of `running`."""

    rows: int
    waiting: deque[Sample] = field(default_factory=deque)
    running: list[Sample] = field(default_factory=list)
    wanted: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Waiting samples of each prompt, one at least."""

    def add(self, sample: Sample) -> None:
        self.waiting.append(sample)
        self.wanted[sample.prompt] += 1

    def leave(self, sample: Sample) -> None:
        """Takes a sample out of the queue."""
        self.waiting.remove(sample)
        self._unwanted(sample.prompt)

    def _unwanted(self, prompt: tuple[int, ...]) -> None:
        self.wanted[prompt] -= 1
        if not self.wanted[prompt]:
            del self.wanted[prompt]

    @property
    def due(self) -> bool:
        """Whether to fill slots now: a pass over few prompts costs as much as one over more, so some free ones wait."""
        free = self.rows - len(self.running)
        return bool(self.waiting) and free >= min(len(self.waiting), max(1, self.rows // 8))

    def admit(self) -> list[Sample]:
        """Samples that start now; those of one prompt need it once."""
        admitted: list[Sample] = []
        prompts: set[tuple[int, ...]] = set()
        filled = 0
        while self.waiting and len(self.running) + len(admitted) < self.rows:
            cost = 0 if self.waiting[0].prompt in prompts else len(self.waiting[0].prompt)
            if admitted and filled + cost > PREFILL_TOKENS:
                break
            filled += cost
            sample = self.waiting.popleft()
            prompts.add(sample.prompt)
            self._unwanted(sample.prompt)
            admitted.append(sample)
        return admitted

    def drop_finished(self, move: Callable[[int, int, int], None], release: Callable[[int], None]) -> None:
        """Frees the slots of finished samples; the last running sample moves into each hole."""
        for slot in reversed(range(len(self.running))):
            if not self.running[slot].finished:
                continue
            last = self.running.pop()
            if slot < len(self.running):
                release(slot)
                move(len(self.running), slot, last.length)
                self.running[slot] = last
            else:
                release(slot)
