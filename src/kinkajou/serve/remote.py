"""A model behind another server that speaks OpenAI's API: vLLM, `transformers serve`, another kinkajou."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import islice

import httpx

from kinkajou.data.records import listed as escaped
from kinkajou.data.records import shown
from kinkajou.data.strict_json import JSONFault
from kinkajou.errors import UserError
from kinkajou.serve.backend import Began, Broken, Event, Job, Load, Piece, Refused, State, Turn
from kinkajou.serve.limits import Limits
from kinkajou.serve.openai_several import Several
from kinkajou.serve.remote_address import KEY, SLOTS, client_for, reason_of, root_of
from kinkajou.serve.remote_wire import (
    MAX_TOLD,
    REFUSES_KEY,
    Denied,
    Said,
    Unreachable,
    body_of,
    bounded,
    count,
    fault_of,
    object_of,
    shorter,
    too_long,
)
from kinkajou.serve.sse import BadStream, data_of

MAX_MODELS = 64
NAME_CHARS = Limits.model_chars
LIST_S = 30.0
"""For its list of models, in all."""
KEY_FIX = f"the environment's {KEY} must hold the other server's key"
UNREACHABLE = "does it run, and is --backend its address?"
AWAY_S = 5.0
"""After a connection that failed nobody is sent there for that long; then the next request tries."""
SHORTENINGS = 10
"""Times that a chat is asked again with half of its oldest turns."""


class RemoteBackend:
    """`name` is the model's at the other server.  Each choice is a request of its own, with a seed of its own."""

    def __init__(
        self,
        name: str,
        url: str,
        key: str = "",
        *,
        context: int | None = None,
        max_tokens: int | None = None,
        deadline_s: float = Limits.deadline_s,
    ) -> None:
        """`max_tokens`: asked for where a request says nothing; None leaves it to the other server."""
        self.name, self.url, self.created, self.context = name, root_of(url), int(time.time()), context
        self.max_tokens, self.deadline_s = max_tokens, deadline_s
        self.phase: State = "starting"
        self.away_until = 0.0
        # The desk ends what takes too long: nothing shorter may stand before it.
        self.client = client_for(self.url, key, deadline_s)
        self.open = 0

    @property
    def state(self) -> State:
        away = self.phase == "ready" and time.monotonic() < self.away_until
        return "broken" if away else self.phase

    @property
    def load(self) -> Load:
        return Load(running=self.open, slots=SLOTS)

    async def start(self) -> None:
        """UserError (exit code 5) if no token comes within the time that a request has."""
        try:
            # A stream of comments alone would go on for ever: no single read takes too long.
            async with (
                asyncio.timeout(self.deadline_s),
                self.run(Job(turns=(Turn("user", "1"),), max_tokens=1)) as events,
            ):
                async for _ in events:
                    continue
        except (Refused, Broken, TimeoutError) as fault:
            await self.close()
            late = isinstance(fault, TimeoutError)
            fixes = {Denied: KEY_FIX, Unreachable: UNREACHABLE, TimeoutError: "a longer --deadline-s"}
            raise UserError(
                f"the model {self.name} at {self.url} gives no token",
                evidence=f"none within {self.deadline_s:g} s" if late else str(fault),
                fix=fixes.get(type(fault), "does it speak OpenAI's API, and does it call the model so?"),
                exit_code=5,
            ) from None
        self.phase = "ready"

    async def close(self) -> None:
        self.phase = "closed"
        await self.client.aclose()

    @asynccontextmanager
    async def run(self, job: Job) -> AsyncIterator[AsyncIterator[Event]]:
        if job.n > 1:
            seeds = [None if job.seed is None else job.seed + i for i in range(job.n)]
            several = Several(self, [replace(job, n=1, seed=seed) for seed in seeds], same_prompt=True)
            async with several.run(job) as events:
                yield events
            return
        self.open += 1
        try:
            async with self._asked(job) as (reply, dropped):
                yield self._events(reply, job, dropped)
        except httpx.HTTPError as fault:
            if isinstance(fault, httpx.ConnectError | httpx.ConnectTimeout):
                self.away_until = time.monotonic() + AWAY_S
                raise Unreachable("the model's server cannot be reached") from None
            raise Broken(f"the model's server failed: {type(fault).__name__}") from None
        except BadStream as fault:
            raise Broken(f"the model's server failed: {fault}") from None
        finally:
            self.open -= 1

    @asynccontextmanager
    async def _asked(self, job: Job) -> AsyncIterator[tuple[httpx.Response, int]]:
        """A reply that has begun well, and the turns that were dropped for it."""
        path = "completions" if job.text is not None else "chat/completions"
        turns, max_tokens = list(job.turns), job.max_tokens or self.max_tokens
        for _ in range(SHORTENINGS):
            body = body_of(replace(job, turns=tuple(turns), max_tokens=max_tokens), self.name)
            async with self.client.stream("POST", path, content=body) as reply:
                if reply.status_code == 200:
                    yield reply, len(job.turns) - len(turns)
                    return
                fault = fault_of(reply.status_code, await bounded(reply), reply.headers.get("retry-after", ""))
            if too_long(fault) and max_tokens != job.max_tokens:
                max_tokens = job.max_tokens  # ours does not fit behind the prompt: then its context is the nearer bound
                continue
            fewer = shorter(turns) if job.drop_oldest and too_long(fault) else turns
            if len(fewer) == len(turns):
                raise fault
            turns = fewer
        raise Refused("the chat is too long for the model's server", param="messages")

    async def _events(self, reply: httpx.Response, job: Job, dropped: int) -> AsyncIterator[Event]:
        said = Said(chat=job.text is None, logprobs=job.logprobs is not None)
        yield Began(0, dropped)
        try:
            async for data in data_of(reply.aiter_bytes()):
                if data == b"[DONE]":
                    break
                if piece := said.take(object_of(data)):
                    yield piece
        except (BadStream, JSONFault, UnicodeDecodeError) as fault:
            raise Broken(f"the model's server sends no sound stream: {shown(str(fault), MAX_TOLD)}") from None
        except httpx.HTTPError as fault:
            raise Broken(f"the model's server broke off: {type(fault).__name__}") from None
        if not said.finish:
            raise Broken("the model's server stopped before its answer was finished")
        if said.told:
            yield Began(said.prompt_tokens, dropped)
        yield Piece(0, "", said.num_tokens, said.finish)


async def remote_backends(
    url: str,
    key: str = "",
    names: Sequence[str] = (),
    *,
    max_tokens: int | None = None,
    deadline_s: float = Limits.deadline_s,
) -> dict[str, RemoteBackend]:
    """The named models of another server; those that it lists where none is named.  UserError (exit code 5)."""
    root, lengths = root_of(url), dict[str, int | None]()
    for name in names:
        if not is_name(name):
            raise UserError(f"{shown(name)} is no name of a model", fix=f"1 to {NAME_CHARS} printable characters")
    limit_s = min(LIST_S, deadline_s)
    fault: Broken | None = None
    try:
        async with asyncio.timeout(limit_s), client_for(root, key, deadline_s) as client:
            lengths = await listed(client)
    except TimeoutError:
        fault = Broken(f"no list within {limit_s:g} s")
    except Broken as found:
        fault = found
    if isinstance(fault, Unreachable):
        raise UserError(f"{root} cannot be reached", evidence=str(fault), fix=UNREACHABLE, exit_code=5)
    if not names and not lengths:
        raise UserError(
            f"{root} does not list its models",
            evidence=str(fault) if fault else "the list has no name of a model",
            fix=KEY_FIX if isinstance(fault, Denied) else "name the one to ask: kinkajou serve NAME --backend URL",
            exit_code=5,
        )
    return {
        name: RemoteBackend(name, url, key, context=lengths.get(name), max_tokens=max_tokens, deadline_s=deadline_s)
        for name in names or lengths
    }


def is_name(name: str) -> bool:
    """Whether a terminal, a log and UTF-8 can take it."""
    return 0 < len(name) <= NAME_CHARS and name.isprintable()


async def listed(client: httpx.AsyncClient) -> dict[str, int | None]:
    """Names of models, each with its context if that is told; Broken if there is no such list."""
    try:
        async with client.stream("GET", "models") as reply:
            if reply.status_code in REFUSES_KEY:
                raise Denied(f"HTTP {reply.status_code}: it refuses the key")
            if reply.status_code != 200:
                raise Broken(f"HTTP {reply.status_code}")
            rows = object_of(await bounded(reply)).get("data")
    except (httpx.ConnectError, httpx.ConnectTimeout) as fault:
        raise Unreachable(reason_of(fault)) from None
    except (httpx.HTTPError, JSONFault, UnicodeDecodeError, BadStream) as fault:
        raise Broken(f"{type(fault).__name__}: {shown(str(fault), MAX_TOLD)}") from None
    if not isinstance(rows, list):
        raise Broken("JSON without `data`, a list of models")
    found = [row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]
    names = {row["id"]: count(row.get("max_model_len")) or None for row in found if is_name(row["id"])}
    if strange := [row["id"] for row in found if not is_name(row["id"])]:
        told(f"{len(strange)} models have no printable name and are left out: {escaped(strange)}")
    if len(names) > MAX_MODELS:
        told(f"of {len(names)} models that are listed the first {MAX_MODELS} are taken")
    return dict(islice(names.items(), MAX_MODELS))


def told(note: str) -> None:
    print(f"note: --backend: {note}", file=sys.stderr, flush=True)
