"""Kills of a rank under torchrun: the job must be gone, and the next one must end as one that was left alone.

Both ranks lie on this machine and speak gloo; each trial starts torchrun twice.
"""

import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.trials.compare import differing, digests
from benchmarks.trials.kills import Bench
from benchmarks.trials.world import RUN
from kinkajou import faults

RANKS = 2
VARIANTS = ("sft", "reward", "prefer", "ppo", "grpo")
TIMEOUT_S = 90


def torchrun(home: Path, arguments: tuple[str, str], fault: str = "") -> tuple[int, float, str]:
    """Exit code, seconds, and what was said."""
    stage, recipe = arguments
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    command += ["-m", "kinkajou", stage, recipe, "--strategy", "ddp"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", faults.VARIABLE: fault}
    began = time.monotonic()
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    return done.returncode, time.monotonic() - began, done.stdout + done.stderr


def left_alone(bench: Bench, variant: str) -> dict[str, str]:
    home = bench.folder / f"ranks-{variant}"
    if not home.is_dir():
        code, _, said = torchrun(bench.home(home.name), bench.recipe(variant))
        if code:
            raise RuntimeError(f"{variant} on {RANKS} ranks: exit {code}\n{said[-3000:]}")
    return digests(home / RUN)


ALONE = {f"save.{name}" for name in ("begin", "files", "manifest", "synced", "renamed", "pruned")} | {"step.logged"}
"""Points that the main process alone comes to."""


def tried(bench: Bench, variant: str, point: str, seed: int) -> dict[str, Any]:
    """One rank dies at a point (rank 0 where rank 1 does not come to it), the job ends, the next one goes on."""
    wanted = left_alone(bench, variant)
    bench.left_alone(variant)
    dice = random.Random(f"{variant}/{point}/{seed}")
    rank = 0 if point in ALONE else dice.randrange(RANKS)
    fault = f"{point}:{dice.randint(1, bench.counts[variant][point])}:kill@{rank}"
    home, arguments = bench.home("ranks-trial"), bench.recipe(variant)
    died, seconds, first = torchrun(home, arguments, fault)
    killed = bool(re.search(r"Signal 9|exitcode\s*: -9", first))
    code, _, said = torchrun(home, arguments)
    row = {
        "variant": variant,
        "fault": fault,
        "killed": killed,
        "died": died,
        "seconds": round(seconds, 1),
        "code": code,
        "different": differing(wanted, digests(home / RUN)),
    }
    return row if not code and not row["different"] else row | {"said": said[-1500:]}


def jobs(bench: Bench, number: int, seed: int) -> list[Callable[[], dict[str, Any]]]:
    """Half of them inside the write of a checkpoint."""
    found: list[Callable[[], dict[str, Any]]] = []
    for i in range(number):
        variant = VARIANTS[i % len(VARIANTS)]
        bench.left_alone(variant)
        inside = [p for p in bench.counts[variant] if p.startswith("save.")]
        others = [p for p in bench.counts[variant] if not p.startswith("save.") and p != "judge.scores"]
        dice = random.Random(f"{seed}/{i}")
        point = dice.choice(inside if i // len(VARIANTS) % 2 else others)
        found.append(partial(tried, bench, variant, point, i))
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "trials": len(rows),
        "killed": sum(row["killed"] for row in rows),
        "lost": sum(row["code"] != 0 for row in rows),
        "different": sum(bool(row["different"]) for row in rows),
        "slowest_s": max((row["seconds"] for row in rows), default=0.0),
        "points": dict(Counter(row["fault"].split(":")[0] for row in rows)),
    }


def right(row: dict[str, Any]) -> bool:
    return row["killed"] and row["died"] != 0 and row["code"] == 0 and not row["different"]
