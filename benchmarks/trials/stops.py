"""Signals at random moments: how soon the run is gone, by which code, and how the next one ends."""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.trials import forked
from benchmarks.trials.compare import differing, digests
from benchmarks.trials.kills import Bench
from benchmarks.trials.world import RUN, VARIANTS

CODES = {"term": 75, "int": 130, "kill": -9}
SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT, "kill": signal.SIGKILL}
KINDS = (("term", False), ("int", False), ("term", True), ("kill", False))
SLACK_S = 1.0
DRAWS = 20
BEFORE = (-signal.SIGTERM, -signal.SIGINT, 130)
"""Codes of a run that has not begun to train, so that there is nothing to save."""


def stopped(bench: Bench, variant: str, kind: str, twice: bool, seed: int) -> dict[str, Any]:
    """One run, a signal at a moment of its training, and the run that goes on.

    `twice`: another signal follows at once, and nothing is saved.  A moment that comes after the end is drawn again.
    """
    wanted = bench.left_alone(variant)
    dice = random.Random(f"{variant}/{kind}/{seed}")
    for _ in range(DRAWS):
        home = bench.home("stopped")
        moment, arguments, log = dice.uniform(0.0, 1.0) * bench.lasted[variant], bench.recipe(variant), home / "log"
        ended = signalled(forked.command(home, *arguments, begun=home / "begun"), home, SIGNALS[kind], moment, twice)
        if ended.code:
            break
    again = forked.run(forked.command(home, *arguments), log) if ended.code else ended
    different = differing(last_files(wanted), last_files(digests(home / RUN, last_only=True)))
    row = {
        "variant": variant,
        "signal": kind,
        "twice": twice,
        "moment_s": round(moment, 3),
        "code": ended.code,
        "seconds": round(ended.seconds, 3),
        "limit_s": round(bench.step_s(variant) + SLACK_S, 3),
        "then": again.code,
        "different": different,
    }
    return row if right(row) else row | {"said": [ended.said[-1500:], again.said[-1500:]]}


def signalled(work: Callable[[], int], home: Path, number: int, moment: float, twice: bool) -> forked.Ended:
    """How a run ends that gets a signal so many seconds after its first step has begun; seconds since the signal."""
    log = home / "log"
    pid = forked.start(work, log)
    forked.until((home / "begun").exists, pid, log)
    time.sleep(moment)
    began = time.monotonic()
    os.kill(pid, number)
    if twice:
        time.sleep(0.002)
        os.kill(pid, signal.SIGINT)  # another one: the same twice within half a second is one
    return forked.wait(pid, log, began=began)


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
    for kind, twice in KINDS:
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
    """`number` of SIGTERM and of SIGKILL, a fifth as many of the others, over all variants in turn."""
    shares = (number, number // 5, number // 5, number)
    kinds = [kind for kind, share in zip(KINDS, shares, strict=True) for _ in range(share)]
    names = list(VARIANTS)
    return [partial(stopped, bench, names[i % len(names)], *kind, i) for i, kind in enumerate(kinds)]
