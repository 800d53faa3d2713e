"""Server-sent events, as text alone: written for /generate/stream, read from another server."""

import re
from collections.abc import AsyncIterator

LINE_ENDS = re.compile("\r\n|\r|\n")
MAX_EVENT_BYTES = 1_000_000


class BadStream(Exception):
    """What comes is no stream of events, or one of them has no end."""


def event(name: str, data: str) -> bytes:
    """One event; every kind of line end in the data is read as a line feed."""
    lines = "".join(f"data: {line}\n" for line in LINE_ENDS.split(data))
    return f"event: {name}\n{lines}\n".encode()


async def data_of(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each event; BadStream for one that is longer than a million bytes.

    Comments, names and ids are passed over.  An event that is cut off by the end of the stream does not count.
    """
    rest, data, size = b"", list[bytes](), 0
    async for chunk in chunks:
        *lines, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line and data:
                yield b"\n".join(data)
                data, size = [], 0
            elif line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
                size += len(line)
        if size + len(rest) > MAX_EVENT_BYTES:
            raise BadStream(f"an event of more than {MAX_EVENT_BYTES:,} bytes")
