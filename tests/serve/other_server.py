"""Another server, in the test's own event loop, that says the bytes it is told to."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

Answer = Callable[[str, dict[str, Any]], bytes]


@asynccontextmanager
async def wire(answer: Answer) -> AsyncIterator[str]:
    """A server that says the bytes it is told to, to whatever is asked."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((int(x.split(":")[1]) for x in head.split("\r\n") if x.lower().startswith("content-length")), 0)
        asked = json.loads(await reader.readexactly(length) or b"{}")
        writer.write(answer(head, asked))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def reply(status: int, content: bytes, kind: str = "application/json", extra: str = "") -> bytes:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(content)}\r\n{extra}\r\n"
    return head.encode() + content


def stream(*chunks: object, end: bytes = b"data: [DONE]\n\n") -> bytes:
    parts = [chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode() for chunk in chunks]
    return reply(200, b"".join(b"data: " + part + b"\n\n" for part in parts) + end, "text/event-stream")


def delta(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}
