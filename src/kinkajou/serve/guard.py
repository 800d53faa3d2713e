"""In front of every route: who may come in, by what name, with what body.  What is not allowed is refused."""

import asyncio
import logging
import secrets
import sys
import time
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kinkajou.serve.gate import Headers, Visitor, checked
from kinkajou.serve.house import House
from kinkajou.serve.problems import Problem

log = logging.getLogger("kinkajou.access")
WITH_BODY = {"POST", "PUT", "PATCH", "DELETE"}
ANSWERING = {"/v1/chat/completions", "/v1/completions", "/generate", "/generate/stream"}
"""Paths whose every request asks a model for an answer."""
CSP = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY: Headers = [
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
    (b"cache-control", b"no-store"),
]


class Guard:
    def __init__(self, app: ASGIApp, house: House) -> None:
        self.app, self.house = app, house
        self.bodies_bytes = 0
        """Of all requests that are open."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await Visit(self, scope, receive, send).answer()


class Visit:
    """One request on its way through the guard."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.house = guard, guard.house
        self.scope, self.receive, self._send = scope, receive, send
        self.id = secrets.token_hex(8)
        scope["kinkajou.request_id"] = self.id
        self.since = time.monotonic()
        self.status = 0
        self.complete = False
        self.left = asyncio.Event()
        self.kept_bytes = 0
        self.extra: Headers = []

    async def answer(self) -> None:
        try:
            visitor = Visitor(self.scope, self.house)
            self.extra = visitor.shared()
            if checked(visitor):
                await self.send({"type": "http.response.start", "status": 204, "headers": visitor.preflight()})
                await self.send({"type": "http.response.body", "body": b""})
            elif self.scope["method"] in WITH_BODY:
                await self.with_body()
            else:
                # HEAD is GET without the body (RFC 9110, 9.3.2), which uvicorn leaves out.
                head = {"method": "GET"} if self.scope["method"] == "HEAD" else {}
                await self.guard.app({**self.scope, **head}, self.receive, self.send)
        except Problem as problem:
            await problem.response(self.id)(self.scope, self.receive, self.send)
        finally:
            self.guard.bodies_bytes -= self.kept_bytes
            self.note(sys.exception())

    async def with_body(self) -> None:
        """Reads the body, then runs the app until it has answered or the client has gone."""
        if self.scope["path"] in ANSWERING and (shut := self.house.desk.refusal(self.house.backends.values())):
            raise shut  # before a byte of the body is read: under load a refusal has to cost little
        body = await self.body()
        if body is None:
            self.left.set()
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if waiting:
                return waiting.pop()
            await self.left.wait()
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self.guard.app(self.scope, receive, self.send))
        watch = asyncio.ensure_future(self.watch())
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work.done() or self.complete:
                await work
        finally:
            watch.cancel()
            if not work.done():
                work.cancel()
            with suppress(asyncio.CancelledError):
                await work

    async def watch(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.left.set()

    async def body(self) -> bytes | None:
        """None if the client left before its end; Problem if it is too long or too slow."""
        limits, pieces = self.house.limits, []
        try:
            async with asyncio.timeout(limits.body_s):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        return None
                    piece = message.get("body", b"")
                    pieces.append(piece)
                    self.kept_bytes += len(piece)
                    self.guard.bodies_bytes += len(piece)
                    if self.kept_bytes > limits.body_bytes:
                        raise Problem(413, f"the body is longer than {limits.body_bytes:,} bytes", headers=CLOSE)
                    if self.guard.bodies_bytes > limits.bodies_bytes:
                        raise Problem(503, "too many bodies at once", headers=CLOSE | {"retry-after": "1"})
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise Problem(408, f"the body was not there after {limits.body_s:g} s", headers=CLOSE) from None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers: Headers = list(message.get("headers", ()))
            given = {name for name, _ in headers}
            headers += [pair for pair in SECURITY if pair[0] not in given]
            message = {**message, "headers": [*headers, (b"x-request-id", self.id.encode()), *self.extra]}
        elif not message.get("more_body", False):
            self.complete = True
        await self._send(message)

    def note(self, fault: BaseException | None) -> None:
        """One line of the log and one count: no query, no body, no key."""
        scope, route = self.scope, getattr(self.scope.get("route"), "path", "none")
        if self.left.is_set() and not self.complete:
            self.house.metrics.disconnects.inc()
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        self.house.metrics.requests.labels(route, method, str(self.status or 499)).inc()
        if log.isEnabledFor(logging.INFO):
            took_ms = (time.monotonic() - self.since) * 1e3
            client = (scope.get("client") or ("-", 0))[0]
            log.info("%s %s %s %d %.1f ms %s", client, method, printable(scope["path"]), self.status, took_ms, self.id)
        if isinstance(fault, Exception):
            logging.getLogger("kinkajou.serve").error("request %s failed: %s", self.id, type(fault).__name__)


METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}
CLOSE = {"connection": "close"}


def printable(path: str) -> str:
    """In one line of ASCII, at most 200 characters."""
    return path[:200].encode("unicode_escape").decode("ascii")
