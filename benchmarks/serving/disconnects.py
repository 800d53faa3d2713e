"""Clients that vanish: how soon their slots are free; and clients that are slow: what others notice of them.

A disconnect is a RST after so many bytes, a FIN, or a half-close; of streams, of plain requests, while waiting for a
slot, several at once.  The time is from the disconnect to the first look at /metrics that shows nothing running and
nothing waiting; looks are about 5 ms apart.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.serving import servers
from benchmarks.serving.client import Caller, Line, connect, request
from benchmarks.serving.figures import Row, quantile, spread, table
from benchmarks.serving.traffic import Crowd, good

TRIALS, PAUSE_S, SLACK_S = 500, 0.030, 0.100
SLOTS, SLOW_SOCKETS, SLOW_TIMES = 4, 100, 1.5
WAYS = ("stream, RST", "stream, FIN", "plain, RST", "plain, FIN", "queued, RST", "several, RST", "half-close")
PATIENCE_S = 5.0


@dataclass
class Bench:
    """A server, its gauges, and requests that would take seconds."""

    port: int
    token_s: float
    request: Callable[[bool], bytes]
    watcher: Caller
    dice: random.Random

    async def busy(self) -> tuple[int, int]:
        """Answers that run and that wait."""
        answer = await self.watcher.ask(request("GET", "/metrics"))
        found = servers.samples(answer.body.decode())
        return round(found[servers.RUNNING]), round(found[servers.WAITING])

    async def until(self, right: Callable[[int, int], bool], patience_s: float = PATIENCE_S) -> float:
        """Seconds until the gauges are so; infinite if they do not become so."""
        began = time.perf_counter()
        while time.perf_counter() < began + patience_s:
            if right(*await self.busy()):
                return time.perf_counter() - began
            await asyncio.sleep(0.004)
        return float("inf")

    async def asking(self, stream: bool) -> tuple[Line, "asyncio.Task[Any]"]:
        line = await connect(self.port)
        return line, asyncio.create_task(line.ask(self.request(stream)))


async def gone(*tasks: "asyncio.Task[Any]") -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def trial(bench: Bench, way: str) -> Row:
    """One way of vanishing; seconds until all slots are free."""
    kind, _, how = way.partition(", ")
    count = {"several": bench.dice.randint(2, SLOTS), "queued": SLOTS + bench.dice.randint(1, 3)}.get(kind, 1)
    asked = [await bench.asking(kind not in ("plain", "half-close") or bench.dice.random() < 0.3) for _ in range(count)]
    lines, tasks = [line for line, _ in asked], [task for _, task in asked]
    seen = await bench.until(lambda running, waiting: running + waiting >= count)
    row: Row = {"way": way, "clients": count, "seen_s": round(seen, 4)}
    if kind == "queued":
        waited = []
        for line in lines[SLOTS:]:  # those that wait go first
            line.reset()
        waited.append(await bench.until(lambda _, waiting: waiting == 0))
        row["queue_free_s"] = round(max(waited), 4)
        lines = lines[:SLOTS]
    else:
        await asyncio.sleep(bench.dice.uniform(0, 6 * bench.token_s))
    for line in lines:
        if how == "RST":
            line.reset()
        elif how == "FIN":
            line.close()
        else:
            assert line.transport is not None
            line.transport.write_eof()
    if kind == "half-close":
        began = time.perf_counter()
        await asyncio.wait(tasks, timeout=2 * PATIENCE_S)
        row["answered"] = tasks[0].done() and not tasks[0].exception() and tasks[0].result().status == 200
        row["waited_s"] = round(time.perf_counter() - began, 3)
    row["free_s"] = round(await bench.until(lambda running, waiting: running + waiting == 0), 4)
    for line in lines:
        line.close()
    await gone(*tasks)
    return row


async def vanish(bench: Bench, trials: int) -> list[Row]:
    await bench.until(lambda running, waiting: running + waiting == 0)
    rows = [await trial(bench, WAYS[i % len(WAYS)]) for i in range(trials)]
    bench.watcher.close()
    return rows


def stub_request(stream: bool) -> bytes:
    text = " ".join(["word"] * 100)
    return request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "stream": stream})


def model_request(stream: bool) -> bytes:
    body = {"prompt": "Once upon a time", "max_tokens": 450, "temperature": 0, "n": 1, "stream": stream}
    return request("POST", "/v1/completions", body)


async def slow_client(port: int, number: int) -> None:
    """Sends a byte of a head, or of a body, each second; comes back when it is thrown out."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    whole = head + b"Content-Type: application/json\r\nContent-Length: 500\r\n\r\n" if number % 2 else head + b"X: "
    await asyncio.sleep(number / SLOW_SOCKETS)
    while True:
        try:
            _, writer = await asyncio.open_connection(servers.HOST, port)
            writer.write(whole)
            for _ in range(400):
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(1.0)
        except OSError:
            await asyncio.sleep(0.1)


async def beside_slow(port: int, seconds: float, rounds: int) -> Row:
    """Normal requests with and without slow sockets, in turn."""

    def draw(number: int) -> bytes:
        body = {"messages": [{"role": "user", "content": "one two three"}], "stream": number % 2 == 0}
        return request("POST", "/v1/chat/completions", body)

    times: dict[str, list[list[float]]] = {"without": [], "with": []}
    failed = 0
    for _ in range(rounds):
        for name in times:
            slow = [asyncio.create_task(slow_client(port, i)) for i in range(SLOW_SOCKETS * (name == "with"))]
            await asyncio.sleep(1.5)
            crowd = Crowd(port)
            sent = await crowd.closed(8, draw, seconds=seconds)
            failed += len(sent) - len(good(sent))
            times[name].append([one.seconds for one in good(sent)])
            crowd.close()
            for task in slow:
                task.cancel()
            await gone(*slow)
    ends = {name: sorted(quantile(part, 0.99) for part in parts)[rounds // 2] for name, parts in times.items()}
    told = {name: spread([x for part in parts for x in part]) for name, parts in times.items()}
    return {**told, "p99_ratio": round(ends["with"] / ends["without"], 3), "failed": failed, "sockets": SLOW_SOCKETS}


def campaign(server: servers.Server, bench: Bench, trials: int) -> Row:
    pid = server.process.pid
    before = servers.handles(pid)
    rows = asyncio.run(vanish(bench, trials))
    time.sleep(1.0)
    limit = bench.token_s + SLACK_S
    free = [row["free_s"] for row in rows] + [row["queue_free_s"] for row in rows if "queue_free_s" in row]
    metrics = server.metrics()
    return {
        "trials": len(rows),
        "clients": sum(row["clients"] for row in rows),
        "by_way": {way: sum(row["way"] == way for row in rows) for way in WAYS},
        "free": spread(free),
        "limit_ms": round(1000 * limit, 1),
        "late": sum(x > limit for x in free),
        "unseen": sum(row["seen_s"] == float("inf") for row in rows),
        "leaked": round(metrics[servers.RUNNING] + metrics[servers.WAITING]),
        "handles_left": servers.handles(pid) - before,
        "half_closed_answered": sum(row.get("answered", False) for row in rows),
        "tracebacks_logged": server.log.read_text(errors="replace").count("Traceback"),
        "slowest": sorted(rows, key=lambda row: -row["free_s"])[:5],
    }


def run(given: argparse.Namespace) -> tuple[Row, bool]:
    trials = given.trials or max(14, round(TRIALS * given.scale))
    found: Row = {}
    dice = random.Random(given.seed)
    with servers.stub("--slots", str(SLOTS), "--pause", str(PAUSE_S)) as server:
        bench = Bench(server.port, PAUSE_S, stub_request, Caller(server.port), dice)
        found["stub"] = campaign(server, bench, trials - trials // 4)
    with servers.kinkajou(given.model, "--slots", str(SLOTS)) as server:
        began = time.monotonic()
        used = server.call("POST", "/v1/completions", {"prompt": "Once", "max_tokens": 200, "temperature": 0})
        assert used[0] == 200, used
        token_s = (time.monotonic() - began) / 200
        bench = Bench(server.port, token_s, model_request, Caller(server.port), dice)
        found["model"] = campaign(server, bench, trials // 4) | {"token_ms": round(1000 * token_s, 2)}
    with servers.stub("--slots", "16") as server:
        rounds = 3 if given.scale >= 1 else 1
        found["slow"] = asyncio.run(beside_slow(server.port, max(2.0, 8.0 * given.scale), rounds))
    fine = all(
        not found[part][key] for part in ("stub", "model") for key in ("late", "unseen", "leaked", "tracebacks_logged")
    )
    fine &= found["slow"]["p99_ratio"] <= SLOW_TIMES and not found["slow"]["failed"]
    return {"summary": found}, fine


def page(figures: Row) -> str:
    rows = []
    for part, told in (("stub", "stand-in, 30 ms a token"), ("model", "real model")):
        x = figures["summary"][part]
        free = x["free"]
        times = f"{free['p50_ms']:.0f}, {free['p99_ms']:.0f}, {free['max_ms']:.0f} ms"
        rows.append([told, x["trials"], x["clients"], times, f"{x['limit_ms']:.0f} ms", x["late"], x["leaked"]])
    heads = ["disconnects", "trials", "clients", "slots free: p50, p99, longest", "limit", "late", "leaked"]
    slow = figures["summary"]["slow"]
    beside = [
        [name, x["count"], f"{x['p50_ms']:.1f} ms", f"{x['p99_ms']:.1f} ms"]
        for name, x in (("without", slow["without"]), ("with", slow["with"]))
    ]
    second = table([f"{slow['sockets']} slow sockets", "requests", "p50", "p99"], beside)
    return (
        f"{table(heads, rows)}\n{second}\nRatio of p99, median of rounds: {slow['p99_ratio']:.2f} (aim: at most 1.5).\n"
    )
