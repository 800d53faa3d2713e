"""A model behind another server that speaks OpenAI's API: vLLM, `transformers serve`, another kinkajou."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from urllib.parse import urlsplit

import httpx

from kinkajou.data.records import shown
from kinkajou.data.strict_json import JSONFault
from kinkajou.errors import UserError
from kinkajou.exchange import is_loopback
from kinkajou.serve.backend import Began, Broken, Event, Job, Load, Piece, Refused, State, Turn
from kinkajou.serve.openai_several import Several
from kinkajou.serve.remote_wire import MAX_TOLD, Said, body_of, bounded, fault_of, object_of, shorter, too_long
from kinkajou.serve.sse import BadStream, data_of

TIMES = httpx.Timeout(connect=5.0, read=120.0, write=10.0, pool=5.0)
MAX_MODELS = 64
SLOTS = 64
"""Answers that are asked of it at once: its own queue is behind that."""
AWAY_S = 5.0
"""After a connection that failed nobody is sent there for that long; then the next request tries."""
SHORTENINGS = 10
"""Times that a chat is asked again with half of its oldest turns."""


class RemoteBackend:
    """`name` is the model's at the other server.  Each choice is a request of its own, with a seed of its own."""

    def __init__(self, name: str, url: str, key: str = "", *, context: int | None = None) -> None:
        self.name, self.url, self.created, self.context = name, root_of(url), int(time.time()), context
        self.phase: State = "starting"
        self.away_until = 0.0
        self.client = client_for(self.url, key)
        self.open = 0

    @property
    def state(self) -> State:
        away = self.phase == "ready" and time.monotonic() < self.away_until
        return "broken" if away else self.phase

    @property
    def load(self) -> Load:
        return Load(running=self.open, slots=SLOTS)

    async def start(self) -> None:
        """UserError (exit code 5) if no token comes."""
        try:
            async with self.run(Job(turns=(Turn("user", "1"),), max_tokens=1)) as events:
                async for _ in events:
                    continue
        except (Refused, Broken) as fault:
            await self.close()
            raise UserError(
                f"the model {self.name} at {self.url} gives no token",
                evidence=str(fault),
                fix="is it an OpenAI-compatible server, and is the model's name the one it uses?",
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
            raise Broken(f"the model's server failed: {type(fault).__name__}") from None
        finally:
            self.open -= 1

    @asynccontextmanager
    async def _asked(self, job: Job) -> AsyncIterator[tuple[httpx.Response, int]]:
        """A reply that has begun well, and the turns that were dropped for it."""
        path = "completions" if job.text is not None else "chat/completions"
        turns = list(job.turns)
        for _ in range(SHORTENINGS):
            body = body_of(replace(job, turns=tuple(turns)), self.name)
            async with self.client.stream("POST", path, content=body) as reply:
                if reply.status_code == 200:
                    yield reply, len(job.turns) - len(turns)
                    return
                fault = fault_of(reply.status_code, await bounded(reply))
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


def root_of(url: str) -> str:
    """The address below which the API lies, with /v1 and a slash at its end; UserError for what is none."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        sound = False
    if not sound:
        raise UserError(f"--backend {shown(url)} is no address", fix="such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("--backend takes an address alone", fix="its key goes into KINKAJOU_BACKEND_KEY")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else f'{path}/v1'}/"


def client_for(root: str, key: str) -> httpx.AsyncClient:
    """No redirect is followed, no proxy stands between this machine and itself."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    return httpx.AsyncClient(
        base_url=root,
        headers=headers,
        timeout=TIMES,
        follow_redirects=False,
        trust_env=not is_loopback(urlsplit(root).hostname or ""),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=SLOTS),
    )


async def remote_backends(url: str, key: str = "", names: Sequence[str] = ()) -> dict[str, RemoteBackend]:
    """The named models of another server; those that it lists where none is named.  UserError (exit code 5)."""
    root, lengths = root_of(url), dict[str, int | None]()
    with suppress(Broken):
        async with client_for(root, key) as client:
            lengths = await listed(client)
    if not names and not lengths:
        raise UserError(
            f"{root} does not list its models",
            fix="name the one to ask: kinkajou serve NAME --backend URL",
            exit_code=5,
        )
    return {name: RemoteBackend(name, url, key, context=lengths.get(name)) for name in names or lengths}


async def listed(client: httpx.AsyncClient) -> dict[str, int | None]:
    """Names of models, each with its context if that is told; Broken if there is no such list."""
    try:
        async with client.stream("GET", "models") as reply:
            content = await bounded(reply)
            found = object_of(content) if reply.status_code == 200 else {}
    except (httpx.HTTPError, JSONFault, UnicodeDecodeError, BadStream) as fault:
        raise Broken(str(fault)) from None
    rows = found.get("data")
    if not isinstance(rows, list):
        raise Broken("no list of models")
    names = dict[str, int | None]()
    for row in rows[:MAX_MODELS]:
        if isinstance(row, dict) and isinstance(name := row.get("id"), str) and 0 < len(name) <= 200:
            length = row.get("max_model_len")
            names[name] = length if type(length) is int and length > 0 else None
    return names
