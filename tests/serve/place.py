"""The server in front of the stand-in backend, in the test's own event loop, spoken to over real sockets."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from benchmarks.serving.stub import Stub
from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel

from kinkajou.serve.app import make_app
from kinkajou.serve.backend import Backend, Event, Job, Piece
from kinkajou.serve.bind import taken
from kinkajou.serve.bodies import StrictRoute
from kinkajou.serve.desk import Desk
from kinkajou.serve.house import House
from kinkajou.serve.limits import Limits
from kinkajou.serve.metrics import Metrics
from kinkajou.serve.server import Server, make_server
from kinkajou.serve.stream import EventStream

KEY = b"correct horse battery staple".replace(b" ", b"-")


class Asked(BaseModel):
    """The body of the routes below."""

    text: str
    n: int = 1
    stream: bool = False


def make_house(
    backends: Mapping[str, Backend] | None = None, *, queue: int = 64, limits: Limits | None = None, **words: Any
) -> House:
    made = backends or {"stub": Stub()}
    return House(backends=made, desk=Desk(limits or Limits(), Metrics(made), queue=queue), **words)


def told_app(house: House) -> FastAPI:
    """The house's app with routes that show the core alone: POST /echo, and /burst, which fails as nobody foresaw."""
    app, routes = make_app(house), APIRouter(route_class=StrictRoute)

    async def frames(events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        async for event in events:
            if isinstance(event, Piece):
                yield f"data: {event.text}\n\n".encode()
        yield b"data: [DONE]\n\n"

    @routes.post("/echo")
    async def echo(body: Asked, request: Request) -> Any:
        job, backend = Job(text=body.text, n=body.n), house.backend(None)
        if body.stream:
            return EventStream(house.desk, backend, job, frames)
        assert request.client
        async with house.desk.admitted(backend, job, request.client.host) as events:
            return {"text": "".join([event.text async for event in events if isinstance(event, Piece)])}

    @routes.post("/burst")
    async def burst(body: Asked) -> Any:
        async def bursting(events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
            async for event in events:
                if isinstance(event, Piece):
                    yield b"data: first\n\n"
                    raise ZeroDivisionError("secret 0x7fff")

        if body.stream:
            return EventStream(house.desk, house.backend(None), Job(text="a b c"), bursting)
        raise ZeroDivisionError("secret 0x7fff")

    app.include_router(routes)
    return app


@dataclass
class Place:
    """A server that runs."""

    house: House
    server: Server
    port: int
    client: httpx.AsyncClient
    running: "asyncio.Task[None]"

    async def line(self, *parts: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of its own, with bytes sent over it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for part in parts:
            writer.write(part)
        await writer.drain()
        return reader, writer

    async def raw(self, *parts: bytes) -> bytes:
        """What the server says to these bytes until it closes."""
        reader, writer = await self.line(*parts)
        try:
            return await asyncio.wait_for(reader.read(), 10)
        finally:
            writer.close()


@asynccontextmanager
async def served(house: House | None = None, *, drain_s: float = 5.0, **words: Any) -> AsyncIterator[Place]:
    """Ended by the way a signal ends it, if the test has not."""
    house = house or make_house()
    for backend in house.backends.values():
        await backend.start()
    socket = taken("127.0.0.1", 0, has_key=False, send_buffer_bytes=house.limits.send_buffer_bytes)
    port = socket.getsockname()[1]
    server = make_server(told_app(house), house, drain_s=drain_s, **words)
    running = asyncio.create_task(server.announced(socket, ""))
    while not server.started:
        await asyncio.sleep(0.005)
    headers = {"authorization": f"Bearer {house.key.decode()}"} if house.key else {}
    base = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=base, headers=headers, trust_env=False, timeout=10) as client:
        try:
            yield Place(house, server, port, client, running)
        finally:
            await client.aclose()
            house.desk.cut()
            server.stop(0)
            await asyncio.wait_for(running, 10)
            socket.close()


async def until(true: Any) -> None:
    """Waits, at most five seconds, for what a callable says."""
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.005)


def head(path: str, *lines: str, method: str = "POST", host: str = "127.0.0.1") -> bytes:
    """A request's head; its body is to follow."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode("latin-1")
