"""SIGTERM and SIGINT at random moments: how soon the run is gone, by which code, and how the next one ends."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.trials import forked
from benchmarks.trials.compare import differing, digests
from benchmarks.trials.kills import Bench
from benchmarks.trials.world import RUN, VARIANTS

CODES = {"term": 75, "int": 130}
SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT}
SLACK_S = 1.0
BEFORE = (-signal.SIGTERM, -signal.SIGINT, 130)
"""Codes of a run that has not begun to train, so that there is nothing to save."""


def stopped(bench: Bench, variant: str, kind: str, twice: bool, seed: int) -> dict[str, Any]:
    """One run, a signal at a moment of its life, and the run that goes on.

    `twice`: a second signal follows at once, and nothing is saved.
    """
    wanted, whole = bench.left_alone(variant), bench.lasted[variant]
    dice = random.Random(f"{variant}/{kind}/{seed}")
    home = bench.home(f"stopped-{seed}-{twice}")
    arguments, log, marker = bench.recipe(variant), home / "log", home / "begun"
    pid = forked.start(forked.command(home, *arguments, begun=marker), log)
    forked.until(marker.exists, pid, log)
    moment = dice.uniform(0.0, 0.95) * whole
    time.sleep(moment)
    began = time.monotonic()
    os.kill(pid, SIGNALS[kind])
    if twice:
        time.sleep(0.002)
        os.kill(pid, SIGNALS[kind])
    ended = forked.wait(pid, log, began=began)
    first = log.read_text(errors="replace")[-600:]
    again = forked.run(forked.command(home, *arguments), log) if ended.code else ended
    different = differing(last_files(wanted), last_files(digests(home / RUN, last_only=True)))
    shutil.rmtree(home)
    return {
        "variant": variant,
        "signal": kind,
        "twice": twice,
        "moment_s": round(moment, 3),
        "code": ended.code,
        "seconds": round(ended.seconds, 3),
        "limit_s": round(bench.step_s(variant) + SLACK_S, 3),
        "then": again.code,
        "different": different,
        **({} if not again.code and not different else {"said": [first, again.said[-1500:]]}),
    }


def last_files(files: dict[str, str]) -> dict[str, str]:
    """Of the last checkpoint and the logs: the stop itself leaves a checkpoint more than a run left alone."""
    last = max(name.split("/")[1] for name in files if name.startswith("checkpoints/"))
    return {n: x for n, x in files.items() if not n.startswith("checkpoints/") or n.split("/")[1] == last}


def right(row: dict[str, Any]) -> bool:
    """Gone in time, by the code of its signal, and the next run ends as if nothing had happened.

    A run that was over before the signal came ends by 0.
    """
    allowed = (0, CODES[row["signal"]]) if not row["twice"] else (0, 75, 130, 143, *BEFORE)
    return row["code"] in allowed and row["seconds"] <= row["limit_s"] and row["then"] == 0 and not row["different"]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for kind, twice in (("term", False), ("int", False), ("term", True)):
        mine = [row for row in rows if row["signal"] == kind and row["twice"] is twice]
        found[kind + " twice" * twice] = {
            "trials": len(mine),
            "right": sum(map(right, mine)),
            "codes": {
                str(code): sum(row["code"] == code for row in mine) for code in sorted({r["code"] for r in mine})
            },
            "slowest_s": max((row["seconds"] for row in mine), default=0.0),
        }
    return found


def jobs(bench: Bench, number: int) -> list[Callable[[], dict[str, Any]]]:
    """`number` of SIGTERM, a fifth as many of SIGINT and of a second signal, over all variants in turn."""
    kinds = [("term", False)] * number + [("int", False), ("term", True)] * (number // 5)
    names = list(VARIANTS)
    return [partial(stopped, bench, names[i % len(names)], *kind, i) for i, kind in enumerate(kinds)]
