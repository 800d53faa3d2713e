"""SIGTERM with 16 streams open: how each of them ends, when and how the processes are gone.

Each trial starts a server, opens 16 streams and sends the signal at a random moment.  Streams whose rest fits into the
drain time have to end by themselves; longer ones by an error event at the deadline.  `queued`: half of them wait for a
slot.  Meanwhile /ready and new requests are asked: 503, or a closed port.
"""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial

from benchmarks.serving import servers
from benchmarks.serving.client import DONE, Answer, Cut, Mangled, connect, once, request
from benchmarks.serving.figures import Row, table

TRIALS, REAL, STREAMS = 100, 20, 16
DRAIN_S, SLACK_S = 1.5, 1.0
AT_ONCE = 2
KINDS = ("short", "long", "queued")
PAUSE_S = 0.05


def stub_request(kind: str, number: int) -> bytes:
    """`short` ends within the drain time, `long` does not."""
    words = {"short": 24, "long": 400, "queued": 16}[kind]
    text = " ".join(f"s{number}w{i}" for i in range(words))
    return request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "stream": True})


def model_request(kind: str, number: int) -> bytes:
    """The tiny model says some thousand tokens a second."""
    body = {"prompt": f"Once upon a time there were {number} birds.", "temperature": 0, "stream": True}
    return request("POST", "/v1/completions", body | {"max_tokens": 40 if kind == "short" else 450})


def end_of(answer: Answer | BaseException) -> str:
    """How a stream ended: `done`, `error event`, `refused` (a status of 503), else what was wrong."""
    if isinstance(answer, BaseException):
        return f"cut: {answer}"[:200]
    if answer.status != 200:
        return "refused" if answer.status == 503 else f"status {answer.status}"
    events = answer.events
    told = [json.loads(event) for event in events if event != DONE]
    if any("error" in event for event in told):
        return "error event"
    finished = any(choice.get("finish_reason") for event in told for choice in event.get("choices", ()))
    return "done" if finished and events[-1] == DONE else f"cut: ends with {events[-2:]!r}"[:200]


async def streams(server: servers.Server, requests: Sequence[bytes], moment: float, began: Sequence[int]) -> Row:
    """Opens the streams, signals, and waits for all ends."""
    lines = [await connect(server.port) for _ in requests]
    tasks = [asyncio.create_task(line.ask(data)) for line, data in zip(lines, requests, strict=True)]
    until = time.monotonic() + 10
    while sum(line.read > 0 for line in lines) < began[0] and time.monotonic() < until:
        await asyncio.sleep(0.005)
    await asyncio.sleep(moment)
    still = sum(not task.done() for task in tasks)
    server.process.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    await asyncio.sleep(0.1)
    new = []
    for data in (request("GET", "/ready"), requests[0]):
        try:
            new.append(str((await asyncio.wait_for(once(server.port, data), 5)).status))
        except (Cut, Mangled, OSError):
            new.append("closed")
        except TimeoutError:
            new.append("hung")
    done, waiting = await asyncio.wait(tasks, timeout=DRAIN_S + 10)
    for task in waiting:
        task.cancel()
    ends = [end_of(task.exception() or task.result()) if task in done else "hung" for task in tasks]
    return {"open": still, "ends": ends, "new": new, "signalled": signalled}


def trial(kind: str, real: bool, seed: int, start: AbstractContextManager[servers.Server]) -> Row:
    dice = random.Random(f"{kind}/{real}/{seed}")
    moment = dice.uniform(0, 0.05 if real else 0.4)
    make = model_request if real else stub_request
    with start as server:
        pids = server.pids
        began = [STREAMS // 2 if kind == "queued" else STREAMS]
        row = asyncio.run(streams(server, [make(kind, i) for i in range(STREAMS)], moment, began))
        left = row.pop("signalled") + DRAIN_S + SLACK_S
        try:
            code: int | None = server.process.wait(max(0.1, left + 5 - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        late = time.monotonic() - left
        orphans = sum(map(servers.alive, pids))
        said = server.said() if "Traceback" in server.said(20_000) else ""
    every = row.pop("ends")
    ends = {end: every.count(end) for end in sorted(set(every))}
    told = {"kind": kind, "real": real, "moment_s": round(moment, 3), **row, "ends": ends}
    return told | {"code": code, "after_limit_s": round(late, 3), "orphans": orphans, "traceback": said}


def right(row: Row) -> bool:
    """Nothing cut, exit 0 in time, nothing left behind, nobody new let in."""
    allowed = {"done", "error event"} | ({"refused"} if row["kind"] == "queued" else set())
    fine = set(row["ends"]) <= allowed and row["code"] == 0 and row["after_limit_s"] <= 0 and not row["orphans"]
    return fine and set(row["new"]) <= {"503", "closed"} and not row["traceback"] and row["open"] > 0


def plan(given: argparse.Namespace) -> list[tuple[str, bool]]:
    trials = given.trials or max(5, round(TRIALS * given.scale))
    real = max(1, trials * REAL // TRIALS)
    return [(KINDS[i % 3], False) for i in range(trials - real)] + [
        (("short", "long")[i % 2], True) for i in range(real)
    ]


def one(given: argparse.Namespace, number: int, kind: str, real: bool) -> Row:
    slots = ("--slots", str(STREAMS // 2 if kind == "queued" else STREAMS), "--drain_s", str(DRAIN_S))
    if real:
        return trial(kind, True, number, servers.kinkajou(given.model, *slots))
    return trial(kind, False, number, servers.stub(*slots, "--pause", str(PAUSE_S)))


def run(given: argparse.Namespace) -> tuple[Row, bool]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [partial(one, given, number, kind, real) for number, (kind, real) in enumerate(plan(given))]
        rows = list(pool.map(lambda job: job(), jobs))
    for row in rows:
        if not right(row):
            print("WRONG", row)
    kinds = [(kind, real) for real in (False, True) for kind in KINDS]
    parts = {}
    for kind, real in kinds:
        if mine := [row for row in rows if (row["kind"], row["real"]) == (kind, real)]:
            parts[f"{'real model' if real else 'stand-in'}, {kind}"] = part(mine)
    found = {"trials": len(rows), "right": sum(map(right, rows)), "parts": parts}
    return {"summary": found, "trials": rows}, found["right"] == len(rows)


def part(rows: Sequence[Row]) -> Row:
    ends: dict[str, int] = {}
    for row in rows:
        for name, count in row["ends"].items():
            known = name.partition(":")[0]
            ends[known] = ends.get(known, 0) + count
    return {
        "trials": len(rows),
        "right": sum(map(right, rows)),
        "ends": ends,
        "exit_0": sum(row["code"] == 0 for row in rows),
        "slowest_s": round(max(row["after_limit_s"] for row in rows) + DRAIN_S + SLACK_S, 2),
        "orphans": sum(row["orphans"] for row in rows),
    }


def page(figures: Row) -> str:
    rows = []
    for name, x in figures["summary"]["parts"].items():
        ends = x["ends"]
        cut = sum(count for end, count in ends.items() if end not in ("done", "error event", "refused"))
        told = [ends.get(key, 0) for key in ("done", "error event", "refused")]
        rows.append([name, x["trials"], *told, cut, x["exit_0"], f"{x['slowest_s']:.2f} s", x["orphans"]])
    heads = ["SIGTERM", "trials", "ended", "error event", "503", "cut", "exit 0", "slowest", "orphans"]
    return table(heads, rows)
