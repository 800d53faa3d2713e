"""What is saved of a measurement, and whether another one is worse."""

import datetime
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.speed.contests import MEMORY, Contest
from benchmarks.speed.driver import ROOT, Played
from kinkajou.errors import UserError

MEMORY_MORE, RATIO_LESS = 0.02, 0.10
"""What counts as a regression: so much more peak memory, so much less of a ratio."""
KIND = "compare"


def header(rounds: int) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    settings = {"rounds": rounds, "threads": os.cpu_count(), "priority": priority()}
    return {"kind": KIND, "when": now, "commit": commit(), "machine": machine(), "settings": settings}


def commit() -> str:
    """The commit that was measured, with a + if files that git knows were changed after it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def machine() -> dict[str, Any]:
    """Processor, cores and memory; nothing that says whose machine it is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    vector = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return {"cpu": model, "cores": os.cpu_count(), "memory_gb": round(memory, 1), "vector": vector}


def priority() -> str:
    """Of this process, and of its scheduling group where the kernel has such groups."""
    path = Path("/proc/self/autogroup")
    # A session of its own may have no group: the file is then empty.
    words = path.read_text().split() if path.is_file() else []
    group = words[-1] if words else "none"
    nice = os.nice(0)
    raised = "raised" if nice < 0 or (group.lstrip("-").isdigit() and int(group) < 0) else "not raised"
    return f"{raised} (nice {nice}, group {group})"


def read_figures(path: Path) -> dict[str, Any]:
    """What an earlier `--out` wrote.  UserError if it is not there or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found["rows"]
    except (OSError, ValueError, LookupError, TypeError) as fault:
        raise UserError(
            f"{path} holds no saved figures", evidence=str(fault), fix="give a file that --out has written"
        ) from None
    if not isinstance(rows, dict):
        raise UserError(f"{path} holds no saved figures", evidence="its rows have no names")
    return dict(found)


def contest(here: Contest, played: Played) -> dict[str, Any]:
    """Every side as it was asked, and every figure of every round."""
    sides = {}
    for name, rounds in played.rounds.items():
        told = asdict(here.sides[name]) | {"versions": played.versions.get(name, {})}
        sides[name] = told | {"warm": played.warm[name], "rounds": rounds, "peak_mb": played.peak_mb(name)}
    return {"work": here.work, "sides": sides, "failed": played.failed}


def regressions(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Rows whose ratio has become worse, and sides of ours that need more memory; only what both have."""
    found = []
    for name, row in now["rows"].items():
        old = before["rows"].get(name, {"failed": ""})
        if "failed" in old:
            continue
        if "failed" in row:
            found.append(f"{name}: could not be run: {row['failed']}")
            continue
        if old["measure"] != MEMORY:
            share = row["ratio"] / old["ratio"]
            share = share if row["higher_is_better"] else 1 / share
            if share < 1 - RATIO_LESS:
                found.append(f"{name}: ratio {row['ratio']:.3g}, was {old['ratio']:.3g}")
        more = row["ours"]["peak_mb"] / old["ours"]["peak_mb"] - 1
        if more > MEMORY_MORE:
            peaks = f"{row['ours']['peak_mb']:.0f} MB, was {old['ours']['peak_mb']:.0f} MB"
            found.append(f"{name}: peak memory {peaks} (+{more:.1%})")
    return found
