"""What answers: a model in a process of its own, another server, or a stand-in of a test, behind one protocol.

A route makes a `Job` of a checked request and reads the events of its answers.  Nothing here knows HTTP or torch.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

State = Literal["starting", "ready", "broken", "closed"]
Finish = Literal["", "stop", "length", "content_filter"]
"""How an answer ended; empty while it goes on; `content_filter`: its text was replaced."""


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str
    ended: bool = True
    """False: an answer that was cut off, with no end token after it (a scorer's affair)."""


@dataclass(frozen=True)
class Job:
    """One request: `n` answers to one chat, or `n` continuations of one text."""

    turns: tuple[Turn, ...] = ()
    text: str | None = None
    """Where there are no turns: a text to go on with, as it is."""
    n: int = 1
    max_tokens: int | None = None
    """None: as many as the server allows and the context has room for."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stops: tuple[str, ...] = ()
    seed: int | None = None
    """None: another one each time."""
    logprobs: int | None = None
    """None: no log-probabilities; k: each token's own and those of the k likeliest."""
    drop_oldest: bool = False
    """A chat that is too long loses its oldest turns (the system message stays) instead of being refused."""


@dataclass(frozen=True)
class Alternative:
    """A token that might have been said, under the model's own distribution."""

    text: str
    bytes: bytes
    logprob: float  # nats


@dataclass(frozen=True)
class Token:
    """A token that was said, and what else was likely."""

    said: Alternative
    likeliest: tuple[Alternative, ...]


@dataclass(frozen=True)
class Began:
    """The first event of every job: its prompt has been read.

    A backend that learns the number of tokens only at the end says it once more.
    """

    prompt_tokens: int
    dropped_turns: int = 0


@dataclass(frozen=True)
class Piece:
    """The next whole characters of one answer, possibly none.  A last piece has `finish`."""

    choice: int
    text: str
    num_tokens: int
    """Tokens of the answer so far, end token included."""
    finish: Finish = ""
    tokens: tuple[Token, ...] = ()
    """Those since the last piece, if log-probabilities were asked for."""


Event = Began | Piece


@dataclass(frozen=True)
class Load:
    """What a backend is doing now."""

    running: int = 0
    waiting: int = 0
    slots: int = 0
    used_tokens: int = 0
    """Tokens whose keys and values are kept; `room_tokens` fit."""
    room_tokens: int = 0


class Refused(Exception):
    """The job cannot be done as it is: HTTP 400.  `param` names the field of the request, if one is to blame."""

    def __init__(self, problem: str, *, param: str = "", code: str = "") -> None:
        self.problem, self.param, self.code = problem, param, code
        super().__init__(problem)


class Broken(Exception):
    """The backend failed at this job: HTTP 503, or an error event in a stream.  The text is safe to be shown."""


class Full(Broken):
    """The backend takes no more now: HTTP 429.  `wait_s`: when to come again, where that is known."""

    def __init__(self, problem: str, *, wait_s: int | None = None) -> None:
        self.wait_s = wait_s
        super().__init__(problem)


class Backend(Protocol):
    """One model that answers."""

    name: str
    """How requests call it."""
    created: int
    """Seconds since 1970."""

    @property
    def state(self) -> State: ...

    @property
    def load(self) -> Load: ...

    @property
    def context(self) -> int | None:
        """Longest prompt and answer together in tokens; None if unknown."""
        ...

    async def start(self) -> None:
        """Returns once the first token is proven; UserError if the model cannot be loaded."""
        ...

    def run(self, job: Job) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """The events of a job, `Began` first.  Leaving the context, for whatever reason, frees its slots.

        Raises Refused or Broken on entering or while iterating.  The iterator ends when every choice has finished.
        """
        ...

    async def close(self) -> None:
        """Ends what `start` began."""
        ...


class Scorer(Protocol):
    """A reward model."""

    name: str

    @property
    def state(self) -> State: ...

    async def start(self) -> None: ...

    async def score(self, chats: Sequence[tuple[Turn, ...]]) -> list[float]:
        """One float for each chat, whose last turn is the assistant's; Refused or Broken."""
        ...

    async def close(self) -> None: ...
