"""What the server itself takes: a stand-in for the model whose time is known, 32 clients, half of them streaming.

Paced: an answer of 16 tokens takes the stand-in 160 ms, as a model would take; 32 clients ask one request after the
other; the overhead is latency less 160 ms.  Saturated: answers of one token that take no time, 32 clients without a
pause: requests a second, and latencies that are queueing alone.  Open: such requests at random moments, half as many a
second as saturation, which come whether others are answered or not.  Bare: the same client and requests against a
server that only counts bytes and sends a fixed answer, which is what the client itself can do.
"""

import argparse
import asyncio
import json
import multiprocessing
from multiprocessing.connection import Connection

from benchmarks.serving import servers
from benchmarks.serving.client import HOST, request
from benchmarks.serving.figures import Row, spread, table
from benchmarks.serving.traffic import Crowd, Draw, Sent, good, lost

CLIENTS, TOKENS, PAUSE_S = 32, 16, 0.010
AIM_P50_MS, AIM_P99_MS = 5.0, 25.0
SECONDS, ROUNDS = 8.0, 3


def draw(words: int) -> Draw:
    """Chats whose answer has so many words; every other one streams."""

    def one(number: int) -> bytes:
        text = " ".join(f"w{number}-{i}" for i in range(words))
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 64, "stream": number % 2 == 0}
        return request("POST", "/v1/chat/completions", body)

    return one


async def paced(port: int, seconds: float) -> list[Sent]:
    crowd = Crowd(port)
    await crowd.closed(CLIENTS, draw(TOKENS), seconds=1.0)
    sent = await crowd.closed(CLIENTS, draw(TOKENS), seconds=seconds)
    crowd.close()
    return sent


async def empty(port: int, seconds: float) -> tuple[list[Sent], float, list[Sent]]:
    """Saturated, its rate, and half of it in the open."""
    crowd = Crowd(port)
    await crowd.closed(CLIENTS, draw(1), seconds=1.0)
    full = await crowd.closed(CLIENTS, draw(1), seconds=seconds)
    rate = len(good(full)) / (max(s.ended for s in full) - min(s.due for s in full))
    half = await crowd.opened(rate / 2, draw(1), seconds=seconds)
    crowd.close()
    return full, rate, half


FIXED = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": "w0-0"}}]}).encode()


class Counting(asyncio.Protocol):
    """Answers each request by its length alone."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.pending = transport, b""

    def data_received(self, data: bytes) -> None:
        self.pending += data
        head, end, body = self.pending.partition(b"\r\n\r\n")
        if end and len(body) >= int(head.rpartition(b"Content-Length: ")[2].split(b"\r\n")[0]):
            self.pending = b""
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(FIXED), FIXED))


def counting_server(told: Connection) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Counting, HOST, 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def bare(seconds: float) -> list[Sent]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=counting_server, args=(there,), daemon=True)
    process.start()
    try:
        return asyncio.run(Crowd(here.recv()).closed(CLIENTS, draw(1), seconds=seconds))
    finally:
        process.kill()
        process.join()


def streamed(sent: list[Sent]) -> dict[str, list[float]]:
    """Seconds by way of answering."""
    return {
        "plain": [one.seconds for one in good(sent) if one.number % 2],
        "stream": [one.seconds for one in good(sent) if not one.number % 2],
    }


def run(given: argparse.Namespace) -> tuple[Row, bool]:
    seconds, rounds = max(1.0, SECONDS * given.scale), ROUNDS if given.scale >= 1 else 1
    rows: list[Row] = []
    pause = ("--pause", str(PAUSE_S))
    with servers.stub("--slots", "64", *pause) as slow, servers.stub("--slots", "64") as quick:
        for _ in range(rounds):
            at_pace = asyncio.run(paced(slow.port, seconds))
            full, rate, half = asyncio.run(empty(quick.port, seconds))
            at_most = bare(min(3.0, seconds))
            over = {name: [s - TOKENS * PAUSE_S for s in times] for name, times in streamed(at_pace).items()}
            rows.append(
                {
                    "paced": {name: spread(times) for name, times in over.items()}
                    | {"all": spread([*over["plain"], *over["stream"]])},
                    "saturated": {"requests_per_s": round(rate, 1), "all": spread([s.seconds for s in good(full)])},
                    "open": {"requests_per_s": round(rate / 2, 1), "all": spread([s.seconds for s in good(half)])},
                    "bare": {"requests_per_s": round(len(at_most) / min(3.0, seconds), 1)},
                    "lost": lost(at_pace) + lost(full) + lost(half),
                }
            )
    middle = sorted(rows, key=lambda row: row["paced"]["all"]["p99_ms"])[len(rows) // 2]
    within = {kind: aims(middle[kind]["all"]) for kind in ("paced", "open", "saturated")}
    fine = within["paced"] and within["open"] and not any(row["lost"] for row in rows)
    return {"summary": middle | {"within": within}, "rounds": rows}, fine


def aims(found: Row) -> bool:
    return bool(found["p50_ms"] <= AIM_P50_MS and found["p99_ms"] <= AIM_P99_MS)


def page(figures: Row) -> str:
    found = figures["summary"]
    half, most = (found[kind]["requests_per_s"] for kind in ("open", "saturated"))
    told = {
        "paced": f"32 clients one after the other, answers of {TOKENS} tokens at {PAUSE_S * 1000:.0f} ms",
        "open": f"answers without time, {half:.0f} requests a second at random (half of saturation)",
        "saturated": f"answers without time, 32 clients without pause: {most:.0f} requests a second",
    }
    rows = []
    for kind, text in told.items():
        x = found[kind]["all"]
        rows.append([text, f"{x['p50_ms']:.1f} ms", f"{x['p99_ms']:.1f} ms", "yes" if found["within"][kind] else "no"])
    bare = f"{found['bare']['requests_per_s']:,.0f} requests a second"
    client = f"\nThe client alone, against a server that counts bytes: {bare}.\n"
    return table(["overhead of the server", "p50", "p99", "within 5 and 25 ms"], rows) + client
