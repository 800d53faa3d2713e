"""uvicorn with bounds of time on every connection, and an end that is no cut: signals start a drain."""

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from kinkajou.serve.bind import BACKLOG, opened
from kinkajou.serve.guard import SECURITY
from kinkajou.serve.house import House
from kinkajou.serve.limits import Limits
from kinkajou.serve.problems import Problem

log = logging.getLogger("kinkajou.serve")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
TICK_S = 0.1
"""Of uvicorn's main loop."""
GRACE_S = 1.0
"""For answers to say that they are cut, and for their last bytes to leave."""
LINGER_S = 1.0
LOST = 5
"""Exit code where a model's process cannot be kept alive."""


class Lingering:
    """A transport that is not closed over bytes that nobody has read: the kernel would take back the answer.

    What still comes is thrown away for a moment.  What is written in one turn of the loop leaves in one piece.
    """

    def __init__(self, transport: asyncio.Transport, unread: Callable[[], bool]) -> None:
        self._transport, self._unread = transport, unread
        self._loop = asyncio.get_running_loop()
        self._pieces: list[bytes] = []
        self.lingers = False

    def write(self, data: bytes) -> None:
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces.append(data)

    def _flush(self) -> None:
        if self._pieces and not self._transport.is_closing():
            self._transport.write(b"".join(self._pieces))
        self._pieces.clear()

    def close(self) -> None:
        if self.is_closing():
            return
        self._flush()
        if not self._unread():
            self._transport.close()
            return
        self.lingers = True
        self._transport.write_eof()
        self._transport.resume_reading()
        self._loop.call_later(LINGER_S, self._transport.close)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(H11Protocol):
    """Ends connections that wait for nothing: `overdue` is asked every second."""

    limits: Limits

    def __init__(self, *arguments: Any, **words: Any) -> None:
        super().__init__(*arguments, **words)
        self.quiet_since = time.monotonic()
        """When the part of an exchange that is going on began: an idle time, a head."""
        self.begun = True
        """Whether a head is awaited that has begun; a new connection owes one at once."""
        self.stuck_since: float | None = None
        """Since when the client takes nothing of what is to be sent."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, Lingering(transport, self.unread)))
        if len(self.connections) > self.limits.connections:
            self.refuse(Problem(503, "too many connections", code="too_many_connections", headers={"retry-after": "1"}))

    def unread(self) -> bool:
        """Whether the client may still be sending a request that will not be read."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if not self.begun and not self.working:
            self.begun, self.quiet_since = True, time.monotonic()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # after a reset uvicorn's timer would hold the connection until it fires

    def pause_writing(self) -> None:
        self.stuck_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.stuck_since = None
        super().resume_writing()

    def on_response_complete(self) -> None:
        self.begun, self.quiet_since = False, time.monotonic()
        super().on_response_complete()

    @property
    def working(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def overdue(self, now: float) -> bool:
        if self.transport.is_closing():  # what is left is not taken
            self.stuck_since = self.stuck_since or now
        if self.stuck_since is not None:
            return now - self.stuck_since > self.limits.send_s
        if self.working:
            return False
        return now - self.quiet_since > (self.limits.head_s if self.begun else self.limits.idle_s)

    def end(self) -> None:
        """With an answer where a head has not come to its end, else at once."""
        if self.stuck_since is None and self.begun and self.conn.their_state is h11.IDLE:
            self.refuse(Problem(408, f"the request was not there after {self.limits.head_s:g} s"))
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        # The head that broke h11's own rules; a body that does, after an answer has begun, only ends the connection.
        if self.conn.our_state is not h11.IDLE and self.conn.our_state is not h11.SEND_RESPONSE:
            self.transport.close()
            return
        if self.working:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        long = len(self.conn.trailing_data[0]) > self.limits.head_bytes
        self.refuse(Problem(431, "the head is too long") if long else Problem(400, "this is no HTTP request"))

    def refuse(self, problem: Problem) -> None:
        body = json.dumps(problem.body()).encode()
        lines = [f"HTTP/1.1 {problem.status_code} ".encode() + STATUS_PHRASES[problem.status_code]]
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *SECURITY]
        headers += [(name.encode(), value.encode()) for name, value in (problem.headers or {}).items()]
        lines += [name + b": " + value for name, value in (*headers, (b"connection", b"close"))]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        self.transport.close()


class Server(uvicorn.Server):
    """`vital`: events of which none may come to pass: models whose processes cannot be kept alive."""

    def __init__(
        self, config: uvicorn.Config, house: House, *, drain_s: float, vital: dict[str, asyncio.Event]
    ) -> None:
        super().__init__(config)
        self.house, self.drain_s, self.vital = house, drain_s, vital
        self.exit_code = 0
        self.drain: asyncio.Task[None] | None = None
        self.ticked = 0.0
        self.words = ""

    async def announced(self, place: socket.socket, words: str) -> None:
        """Opens the port, says so, serves until the end; UserError if another was quicker to open it."""
        self.words = words
        opened(place)
        await self.serve(sockets=[place])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.words:
            print(self.words, flush=True)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        for sign in SIGNALS:
            loop.add_signal_handler(sign, self.told, sign)
        try:
            yield
        finally:
            for sign in SIGNALS:
                loop.remove_signal_handler(sign)

    def told(self, sign: signal.Signals) -> None:
        """The first signal drains, the second one cuts."""
        if self.drain is None:
            print(f"{sign.name}: open answers may end within {self.drain_s:g} s; once more: at once", file=sys.stderr)
            self.stop(0)
        else:
            self.exit_code = self.exit_code or 128 + sign
            self.house.desk.cut()

    def stop(self, exit_code: int) -> None:
        if self.drain is None:
            self.exit_code, self.house.desk.draining = exit_code, True
            self.drain = asyncio.ensure_future(self.drained())

    async def drained(self) -> None:
        """Waits for open answers, then for those that were cut, then lets uvicorn end."""
        desk, loop = self.house.desk, asyncio.get_running_loop()
        until = loop.time() + self.drain_s
        while desk.tickets and loop.time() < until:
            await asyncio.sleep(min(0.05, max(0.0, until - loop.time())))
        if desk.tickets:
            print(f"note: {len(desk.tickets)} answers are cut", file=sys.stderr)
            desk.cut()
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        if self.ticked:
            self.house.metrics.lag.observe(max(0.0, now - self.ticked - TICK_S))
        if counter % 10 == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection) and connection.overdue(now):
                    connection.end()
        for name, lost in self.vital.items():
            if lost.is_set() and self.drain is None:
                print(f"error: the process of {name} cannot be kept alive; the server ends", file=sys.stderr)
                self.stop(LOST)
        over = await super().on_tick(counter)
        self.ticked = time.monotonic()
        return over


def make_server(app: Any, house: House, *, drain_s: float, vital: dict[str, asyncio.Event] | None = None) -> Server:
    limits = house.limits
    kind = type("Connection", (Connection,), {"limits": limits})
    config = uvicorn.Config(
        app,
        http=kind,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=limits.head_bytes,
        timeout_keep_alive=int(limits.idle_s) + 5,
        timeout_graceful_shutdown=int(GRACE_S + 0.5),
        backlog=BACKLOG,
    )
    return Server(config, house, drain_s=drain_s, vital=vital or {})
