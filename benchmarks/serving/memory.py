"""Memory, file handles, threads, tasks and slots over 10,000 requests after 1,000 to warm up.

Requests are those of `load` in small: plain and streamed, some refused, some cut off by their client.  After each
250 there is a pause without any, and a look at the server's and the worker's processes.  The slope is that of least
squares over the looks, with its 95 % interval.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Sequence

from benchmarks.serving import servers
from benchmarks.serving.client import Caller, Cut, Mangled, request
from benchmarks.serving.figures import Row, slope, table
from benchmarks.serving.load import Wanted, material

WARM, REQUESTS, BLOCK, CLIENTS = 1000, 10_000, 250, 16
DRIFT_MB, REST_S = 2.0, 0.3
BAD = request("POST", "/v1/completions", {"prompt": "x", "temperature": -1})


async def block(port: int, wanted: Sequence[Wanted], requests: int, dice: random.Random) -> dict[str, int]:
    """So many requests over fresh connections, which are closed; answers by status, `cut` and `lost`."""
    found: dict[str, int] = {}
    numbers = iter(range(requests))

    async def client() -> None:
        caller = Caller(port)
        for number in numbers:
            data = BAD if number % 25 == 0 else dice.choice(wanted).bytes(stream=number % 2 == 0)
            stop = dice.randrange(1, 900) if number % 25 == 1 else None
            try:
                status = str((await caller.ask(data, stop_after=stop)).status)
            except (Cut, Mangled, OSError):
                status = "cut" if stop else "lost"
            found[status] = found.get(status, 0) + 1
        caller.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return found


def look(server: servers.Server, pids: Sequence[int]) -> Row:
    """Of each process; of the server's own gauges."""
    metrics = server.metrics()
    time.sleep(REST_S)  # the connections of before, this look's own too, are gone by then
    busy = metrics[servers.RUNNING] + metrics[servers.WAITING] + metrics.get("kinkajou_cache_used_tokens", 0.0)
    found: Row = {"busy": busy, "tasks": metrics.get(servers.TASKS)}
    for name, pid in zip(("server", "worker"), pids, strict=False):
        found[name] = {
            "rss_mb": round(servers.rss_mb(pid), 3),
            "handles": servers.handles(pid),
            "threads": servers.threads(pid),
        }
    return found


def drift(looks: Sequence[Row], name: str) -> Row:
    """Of one process: MB a thousand requests with its interval, and what the line rises from end to end."""
    x, y = [row["requests"] / 1000 for row in looks], [row[name]["rss_mb"] for row in looks]
    rise, half = slope(x, y)
    handles, threads = ([row[name][key] for row in looks] for key in ("handles", "threads"))
    return {
        "rss_first_mb": y[0],
        "rss_last_mb": y[-1],
        "slope_mb_per_1000": round(rise, 4),
        "interval_half": round(half, 4),
        "covers_zero": abs(rise) <= half,
        "drift_mb": round(rise * (x[-1] - x[0]), 3),
        "handles": [handles[0], handles[-1]],
        "threads": [threads[0], threads[-1]],
    }


def run(given: argparse.Namespace) -> tuple[Row, bool]:
    warm, requests = (max(least, round(n * given.scale)) for n, least in ((WARM, BLOCK), (REQUESTS, 4 * BLOCK)))
    wanted, dice = material(100, given.seed), random.Random(given.seed)
    total: dict[str, int] = {}
    with servers.kinkajou(given.model) as server:
        pids = server.pids
        asyncio.run(block(server.port, wanted, warm, dice))
        looks = [look(server, pids) | {"requests": 0}]
        for done in range(BLOCK, requests + 1, BLOCK):
            for key, count in asyncio.run(block(server.port, wanted, BLOCK, dice)).items():
                total[key] = total.get(key, 0) + count
            looks.append(look(server, pids) | {"requests": done})
        processes = len(pids)
    names = [name for name in ("server", "worker") if name in looks[0]]
    found: Row = {
        "requests": sum(total.values()),
        "processes": processes,
        "answers": dict(sorted(total.items())),
        **{name: drift(looks, name) for name in names},
        "tasks": [looks[0]["tasks"], looks[-1]["tasks"]],
        "busy": [looks[0]["busy"], looks[-1]["busy"]],
    }
    fine = total.get("lost", 0) == 0 and set(total) <= {"200", "400", "422", "cut"}
    fine &= found["tasks"][0] == found["tasks"][1] and found["busy"][1] == 0
    for name in names:
        x = found[name]
        steady = x["covers_zero"] or x["slope_mb_per_1000"] < 0
        fine &= steady and x["drift_mb"] <= DRIFT_MB and x["handles"][0] == x["handles"][1]
        fine &= x["threads"][0] == x["threads"][1]
    return {"summary": found, "looks": looks}, bool(fine)


def page(figures: Row) -> str:
    found = figures["summary"]
    rows = []
    for name in (name for name in ("server", "worker") if name in found):
        x = found[name]
        rows.append(
            [
                name,
                f"{x['rss_first_mb']:.1f}, {x['rss_last_mb']:.1f} MB",
                f"{x['slope_mb_per_1000']:+.3f} ± {x['interval_half']:.3f} MB",
                f"{x['drift_mb']:+.2f} MB",
                "{}, {}".format(*x["handles"]),
                "{}, {}".format(*x["threads"]),
            ]
        )
    heads = [f"{found['requests']:,} requests", "RSS first, last", "slope per 1,000", "drift", "handles", "threads"]
    told = "\nTasks before and after: {}, {}".format(*found["tasks"])
    return table(heads, rows) + told + "; tokens, slots and queue in use: {:.0f}, {:.0f}.\n".format(*found["busy"])
