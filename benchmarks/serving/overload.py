"""Ten times what the server can do: refusals at once, and as much work done as at its best.

Just full: clients that fill every slot and wait for no other (16 slots, 20 clients), one request after the other; its
answers a second are the peak.  Overload: ten times as many requests a second, at random moments, no client waiting for
another.  Both alternate; goodput counts whole answers with status 200 that end within the measured seconds.  Once in
front of the stand-in (answers of 20 tokens in 400 ms), once in front of a real model, which shares the processor with
the server and the client.
"""

import argparse
import asyncio
import statistics
import time

from benchmarks.serving import servers
from benchmarks.serving.client import request
from benchmarks.serving.figures import Row, quantile, spread, table
from benchmarks.serving.traffic import Crowd, Draw, Sent, good, lost, statuses

SLOTS, CLIENTS, TIMES = 16, 20, 10
TOKENS, PAUSE_S = 20, 0.020
REAL_TOKENS = 256
AIM_REFUSED_S, AIM_GOODPUT = 0.050, 0.90
WARM_S, SECONDS, ROUNDS = 3.0, 8.0, 3


def of_stub(number: int) -> bytes:
    text = " ".join(f"w{i}" for i in range(TOKENS))
    body = {"messages": [{"role": "user", "content": text}], "stream": number % 2 == 0}
    return request("POST", "/v1/chat/completions", body)


def of_model(number: int) -> bytes:
    told = f"Once upon a time, there was a boy named Tom who had {number} birds."
    body = {"prompt": told, "max_tokens": REAL_TOKENS, "temperature": 0, "stream": number % 2 == 0}
    return request("POST", "/v1/completions", body)


def goodput(sent: list[Sent], began: float, seconds: float) -> float:
    """Whole answers a second whose end lies within the measured seconds."""
    return sum(began <= one.ended < began + seconds for one in good(sent)) / seconds


async def round_of(port: int, draw: Draw, peak: float | None, seconds: float, seed: int) -> Row:
    """One time just full, one time ten times as much."""
    crowd = Crowd(port)
    began = time.perf_counter() + WARM_S
    full = await crowd.closed(CLIENTS, draw, seconds=WARM_S + seconds)
    found = {"peak": goodput(full, began, seconds), "full_statuses": statuses(full)}
    rate = TIMES * (peak or found["peak"])
    began = time.perf_counter() + WARM_S
    over = await crowd.opened(rate, draw, seconds=WARM_S + seconds, seed=seed)
    crowd.close()
    refused = good(over, 429)
    return found | {
        "offered": round(len(over) / (WARM_S + seconds), 1),
        "goodput": goodput(over, began, seconds),
        "statuses": statuses(over),
        "lost": lost(full) + lost(over),
        "refused_s": [one.seconds for one in refused],
        "refused_sent_s": [one.answer.seconds for one in refused if one.answer],
        "without_retry_after": sum("retry-after" not in one.answer.headers for one in refused if one.answer),
        "accepted": spread([one.seconds for one in good(over)]),
    }


def measured(server: servers.Server, draw: Draw, seconds: float, rounds: int) -> Row:
    rows: list[Row] = []
    for number in range(rounds):
        rows.append(asyncio.run(round_of(server.port, draw, rows[0]["peak"] if rows else None, seconds, number)))
    peak, under = (statistics.median(row[key] for row in rows) for key in ("peak", "goodput"))
    refused = [x for row in rows for x in row.pop("refused_s")]
    sent = [x for row in rows for x in row.pop("refused_sent_s")]
    return {
        "peak_per_s": round(peak, 2),
        "goodput_per_s": round(under, 2),
        "share": round(under / peak, 3),
        "offered_per_s": statistics.median(row["offered"] for row in rows),
        "refused": spread(sent),
        "refused_from_due": spread(refused),
        "lost": sum(row["lost"] for row in rows),
        "without_retry_after": sum(row["without_retry_after"] for row in rows),
        "others": {k: n for row in rows for k, n in row["statuses"].items() if k not in ("200", "429")},
        "rounds": rows,
        "fine": under >= AIM_GOODPUT * peak
        and quantile(sent, 0.99) <= AIM_REFUSED_S
        and not any(row["lost"] or row["without_retry_after"] for row in rows),
    }


def run(given: argparse.Namespace) -> tuple[Row, bool]:
    seconds, rounds = max(3.0, SECONDS * given.scale), ROUNDS if given.scale >= 1 else 1
    found = {}
    with servers.stub("--slots", str(SLOTS), "--pause", str(PAUSE_S)) as server:
        found["stub"] = measured(server, of_stub, seconds, rounds)
    with servers.kinkajou(given.model, "--slots", str(SLOTS)) as server:
        found["model"] = measured(server, of_model, seconds, rounds)
    return {"summary": found}, all(part["fine"] and not part["others"] for part in found.values())


def page(figures: Row) -> str:
    rows = []
    for name, told in (("stub", "stand-in, 400 ms an answer"), ("model", f"real model, up to {REAL_TOKENS} tokens")):
        x = figures["summary"][name]
        refused = x["refused"]
        rows.append(
            [
                told,
                f"{x['peak_per_s']:.1f}",
                f"{x['offered_per_s']:.0f}",
                f"{x['goodput_per_s']:.1f} ({x['share']:.0%})",
                f"{refused['count']:,}",
                f"{refused['p50_ms']:.1f}, {refused['p99_ms']:.1f} ms",
                x["lost"],
            ]
        )
    heads = ["ten times overload", "peak, answers/s", "asked for/s", "answered/s", "429", "p50, p99 of a 429", "lost"]
    return table(heads, rows)
