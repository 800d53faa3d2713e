"""A lean HTTP/1.1 client on asyncio: it shares the machine with the server that it measures.

One connection, one request at a time; chunked bodies are decoded, nothing else is read into an answer.
"""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

HOST = "127.0.0.1"
DONE = b"[DONE]"


class Cut(Exception):
    """The connection ended before the answer did."""


class Mangled(Exception):
    """Bytes that are no HTTP answer."""


@dataclass
class Answer:
    """What came back, and when."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    first_s: float = 0.0
    """Seconds from sending to the first byte of the body."""
    seconds: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[bytes]:
        """Data of each event of a stream, the last being `[DONE]` where it ended as it should."""
        blocks = self.body.split(b"\n\n")
        lines = (line for block in blocks for line in block.split(b"\n"))
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


@dataclass
class Decoder:
    """One answer out of bytes as they come."""

    pending: bytearray = field(default_factory=bytearray)
    answer: Answer | None = None
    left: int = -1
    """Bytes of the body, or of the chunk at hand, that are still to come; -1: its length is not read yet."""
    chunked: bool = False
    pieces: list[bytes] = field(default_factory=list)
    done: bool = False
    started: float = 0.0

    def feed(self, data: bytes) -> bool:
        """Whether the answer is whole."""
        self.pending += data
        if self.answer is None and not self.head():
            return False
        assert self.answer is not None
        if not self.pieces and self.pending:
            self.started = self.started or time.perf_counter()
        while not self.done and (self.chunk() if self.chunked else self.plain()):
            pass
        if self.done:
            self.answer.body = b"".join(self.pieces)
        return self.done

    def head(self) -> bool:
        end = self.pending.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = self.pending[:end].decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            raise Mangled(first[:80])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.answer = Answer(int(words[1]), headers)
        del self.pending[: end + 4]
        self.chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        if not self.chunked:
            bodiless = self.answer.status in (204, 304) or self.answer.status < 200
            self.left = 0 if bodiless else int(headers.get("content-length", "-1"))
        return True

    def plain(self) -> bool:
        """A body of known length, or up to the end of the connection."""
        taken = bytes(self.pending if self.left < 0 else self.pending[: self.left])
        del self.pending[: len(taken)]
        if taken:
            self.pieces.append(taken)
        if self.left >= 0:
            self.left -= len(taken)
            self.done = self.left == 0
        return False

    def chunk(self) -> bool:
        """One more chunk; whether there may be another in what has come."""
        if self.left < 0:
            end = self.pending.find(b"\r\n")
            if end < 0:
                return False
            self.left = int(self.pending[:end].split(b";")[0], 16)
            del self.pending[: end + 2]
        if len(self.pending) < self.left + 2:
            return False
        if self.pending[self.left : self.left + 2] != b"\r\n":
            raise Mangled("a chunk without its end")
        if self.left:
            self.pieces.append(bytes(self.pending[: self.left]))
        self.done = self.left == 0
        del self.pending[: self.left + 2]
        self.left = -1
        return not self.done


class Line(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.decoder = Decoder()
        self.waiting: asyncio.Future[Answer] | None = None
        self.closed = False
        self.extra = 0
        self.read = 0
        self.stop_after: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self.read += len(data)
        if self.waiting is None or self.waiting.done():
            self.extra += len(data)
            return
        if self.stop_after is not None and self.read >= self.stop_after:
            self.reset()
            self.waiting.set_exception(Cut("as planned"))
            return
        try:
            if self.decoder.feed(data):
                self.extra += len(self.decoder.pending)
                self.waiting.set_result(cast(Answer, self.decoder.answer))
        except (Mangled, ValueError) as fault:
            self.waiting.set_exception(Mangled(str(fault)))

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self.waiting is None or self.waiting.done():
            return
        answer = self.decoder.answer
        if answer is not None and not self.decoder.chunked and self.decoder.left < 0:
            answer.body = b"".join(self.decoder.pieces)
            self.waiting.set_result(answer)
        else:
            said = b"".join(self.decoder.pieces)[-300:]
            self.waiting.set_exception(Cut(f"{exc or 'closed'} after {self.read} bytes, last {said!r}"))

    def reset(self) -> None:
        """Ends the connection by RST."""
        assert self.transport is not None
        raw = self.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def ask(self, request: bytes, *, stop_after: int | None = None) -> Answer:
        """Cut if the connection ends; `stop_after`: it is reset once so many bytes have come."""
        assert self.transport is not None
        self.decoder, self.read, self.stop_after = Decoder(), 0, stop_after
        self.waiting = asyncio.get_running_loop().create_future()
        if self.closed:
            raise Cut("the connection was closed before")
        began = time.perf_counter()
        self.transport.write(request)
        answer = await self.waiting
        answer.seconds = time.perf_counter() - began
        answer.first_s = (self.decoder.started or time.perf_counter()) - began
        if answer.headers.get("connection", "").lower() == "close":
            self.closed = True
            self.transport.close()
        return answer

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


async def connect(port: int) -> Line:
    _, line = await asyncio.get_running_loop().create_connection(Line, HOST, port)
    return line


@dataclass
class Caller:
    """Asks one request after the other, over one connection as long as the server keeps it."""

    port: int
    line: Line | None = None

    async def ask(self, request: bytes, *, stop_after: int | None = None) -> Answer:
        if self.line is None or self.line.closed:
            self.line = await connect(self.port)
        return await self.line.ask(request, stop_after=stop_after)

    def close(self) -> None:
        if self.line is not None:
            self.line.close()


def request(
    method: str, path: str, body: Any = None, *, headers: Sequence[tuple[str, str]] = (), host: str = HOST
) -> bytes:
    """The bytes of a request; `body` is JSON unless it is bytes."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers)]
    data = b""
    if body is not None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


async def once(port: int, data: bytes) -> Answer:
    """One request over a connection of its own."""
    line = await connect(port)
    try:
        return await line.ask(data)
    finally:
        line.close()
