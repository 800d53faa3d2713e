"""Raw-socket abuse: what each case gets back, how soon, and whether the server answers others as before."""

import argparse
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.serving import servers
from benchmarks.serving.abuse_cases import CHAT, GOOD, Case, cases, post
from benchmarks.serving.client import HOST, Decoder, Mangled
from benchmarks.serving.figures import Row, table

QUICK_S, SLOW_S = 5.0, 30.0
"""A case must have ended by then: one that the server can judge at once, one that it ends by a time limit."""
PROBE_S = 2.0


def send(case: Case, port: int, limit_s: float) -> Row:
    """Status codes of the answers (0: closed without one; -1: nothing within the limit), seconds."""
    began = time.monotonic()
    statuses: list[int] = []
    broken = ""
    with socket.create_connection((HOST, port), timeout=limit_s) as line:
        try:
            push(line, case, began + limit_s)
        except (ConnectionError, TimeoutError) as fault:
            broken = type(fault).__name__
        try:
            statuses = receive(line, case.answers, began + limit_s)
        except Mangled as fault:
            return {"statuses": [-2], "seconds": time.monotonic() - began, "said": str(fault)}
    return {"statuses": statuses, "seconds": round(time.monotonic() - began, 3), "broken": broken}


def push(line: socket.socket, case: Case, deadline: float) -> None:
    """Sends the parts.  A pause ends early where the server has something to say."""
    for part in case.parts:
        if isinstance(part, bytes):
            line.settimeout(max(0.1, deadline - time.monotonic()))
            line.sendall(part)
            continue
        line.settimeout(part)
        try:
            if len(case.parts) > 9:
                line.recv(1, socket.MSG_PEEK)
                return
            time.sleep(part)
        except TimeoutError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError
    if case.half_close:
        line.shutdown(socket.SHUT_WR)


def receive(line: socket.socket, wanted: int, deadline: float) -> list[int]:
    """Up to so many answers; 0 ends the list where the connection closed, -1 where time was up."""
    decoder, found = Decoder(), []
    while len(found) < wanted:
        line.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            data = line.recv(1 << 16)
        except TimeoutError:
            return [*found, -1]
        except ConnectionError:
            data = b""
        if not data:
            if decoder.answer is not None and not decoder.chunked and decoder.left < 0:
                return [*found, decoder.answer.status]
            return [*found, 0]
        while decoder.feed(data):
            assert decoder.answer is not None
            if decoder.answer.status >= 200:
                found.append(decoder.answer.status)
            data, decoder = bytes(decoder.pending), Decoder()
            if not data:
                break
    return found


def right(case: Case, row: Row) -> bool:
    """Every answer is one that is allowed, and none is missing but by a close."""
    limit = SLOW_S if case.slow else QUICK_S
    pause = sum(part for part in case.parts if isinstance(part, float))
    return set(row["statuses"]) <= case.allowed and row["seconds"] <= limit + (0 if case.slow else pause)


def probe(port: int) -> bool:
    """Whether a plain request is answered with what it should be."""
    case = Case("probe", (post(GOOD),), frozenset({200}))
    row = send(case, port, PROBE_S)
    return bool(row["statuses"] == [200])


def campaign(port: int, chosen: Sequence[Case]) -> list[Row]:
    """Each quick case followed by a plain request; the slow ones side by side, with plain requests meanwhile."""
    rows: list[Row] = []

    def keep(case: Case, row: Row, after: bool) -> None:
        told = {"name": case.name, "allowed": sorted(case.allowed), **row, "after": after}
        rows.append(told | {"right": right(case, row) and after})

    for case in chosen:
        if not case.slow:
            keep(case, send(case, port, QUICK_S + 5.0), probe(port))
    waiting = [case for case in chosen if case.slow]
    with ThreadPoolExecutor(max(1, len(waiting))) as pool:
        jobs = [pool.submit(send, case, port, SLOW_S) for case in waiting]
        beside = [probe(port) for _ in range(20)]
        for case, job in zip(waiting, jobs, strict=True):
            row = job.result()
            keep(case, row, all(beside) and probe(port))
    return rows


def summary(rows: Sequence[Row]) -> Row:
    every = [status for row in rows for status in row["statuses"]]
    quick = [row["seconds"] for row in rows if 0 not in row["statuses"] and not row["name"].startswith("a byte")]
    return {
        "cases": len(rows),
        "right": sum(row["right"] for row in rows),
        "answers_5xx": sum(status >= 500 for status in every),
        "hung": every.count(-1),
        "mangled": every.count(-2),
        "dead_afterwards": sum(not row["after"] for row in rows),
        "statuses": {str(status): every.count(status) for status in sorted(set(every))},
        "slowest_s": max(row["seconds"] for row in rows),
        "slowest_answer_s": max(quick, default=0.0),
    }


def run(given: argparse.Namespace) -> tuple[Row, bool]:
    with servers.stub() as server:
        before = servers.handles(server.process.pid)
        rows = campaign(server.port, cases())
        time.sleep(1.0)
        handles = servers.handles(server.process.pid) - before
        tracebacks = server.log.read_text(errors="replace").count("Traceback")
    found: dict[str, Any] = summary(rows) | {"handles_left": handles, "tracebacks_logged": tracebacks}
    for row in rows:
        if not row["right"]:
            print("WRONG", row)
    fine = found["right"] == len(rows) and handles <= 1 and not tracebacks
    return {"summary": found, "trials": rows}, fine


def page(figures: Row) -> str:
    found = figures["summary"]
    codes = ", ".join(f"{'closed' if code == '0' else code}: {n}" for code, n in found["statuses"].items())
    rows = [
        ["cases", found["cases"]],
        ["right", found["right"]],
        ["answers 5xx", found["answers_5xx"]],
        ["hung", found["hung"]],
        ["server did not answer the next plain request", found["dead_afterwards"]],
        ["answers", codes],
        [
            "slowest answer; slowest end by a time limit",
            f"{found['slowest_answer_s']:.2f} s; {found['slowest_s']:.1f} s",
        ],
        ["file handles left, tracebacks in the log", f"{found['handles_left']}, {found['tracebacks_logged']}"],
    ]
    return table(["raw-socket abuse", ""], rows)


__all__ = ["CHAT", "campaign", "cases", "page", "run", "summary"]
