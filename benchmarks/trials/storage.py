"""Disks that are full, folders that take no file: the exit code, the sentence, the older checkpoint, the way back."""

import resource
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.trials import forked
from benchmarks.trials.compare import differing, digests
from benchmarks.trials.kills import Bench
from benchmarks.trials.world import RUN
from kinkajou import faults
from kinkajou.checkpoint.manifest import damages
from kinkajou.checkpoint.shelf import Shelf

STORAGE = 4
READ_ONLY_S = 2.0
POINTS = tuple(point for point in faults.POINTS if point.startswith("save.") and point != "save.snapshot")
"""Where something is written: a snapshot lies in memory."""
UNSEEN = "full disk, in the middle of a write"
READ_ONLY, NO_MOUNT = "read-only folder", "this machine lets nobody mount"


def no_space_at(bench: Bench, variant: str, point: str) -> dict[str, Any]:
    """ENOSPC at the middle one of a run's visits to a point."""
    wanted = bench.left_alone(variant)
    if not (times := bench.counts[variant].get(point)):
        return {"variant": variant, "fault": f"ENOSPC at {point}", "skipped": "the run does not come to it"}
    home, log = bench.home(f"full-{variant}"), bench.folder / "full.log"
    work = forked.command(home, *bench.recipe(variant), fault=f"{point}:{(times + 1) // 2}:enospc")
    row = told(variant, f"ENOSPC at {point}", forked.run(work, log), home / RUN)
    again = forked.run(forked.command(home, *bench.recipe(variant)), log)
    row |= {"then": again.code, "different": differing(wanted, digests(home / RUN))}
    if again.code:
        row["said_then"] = again.said[-1500:]
    return row


def told(variant: str, kind: str, ended: forked.Ended, output: Path) -> dict[str, Any]:
    """What the run said as it stopped, and whether what it had kept before is whole."""
    lines = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    shelf = Shelf(output / "checkpoints")
    places = shelf.places() if output.is_dir() else []
    return {
        "variant": variant,
        "fault": kind,
        "code": ended.code,
        "seconds": round(ended.seconds, 2),
        "line": lines[0] if lines else "",
        "traceback": "Traceback" in ended.said,
        "kept": len(places),
        "damaged": sum(bool(damages(shelf.path(place))) for place in places),
        **({"said": ended.said[-3000:]} if "Traceback" in ended.said else {}),
    }


def mounted(folder: Path, options: str, *, again: bool = False) -> bool:
    """A tmpfs at the folder, or other options of the one that is there; False where this machine lets nobody mount."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ("remount," if again else "") + options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def full_disk(bench: Bench, variant: str, part: float, *, unseen: bool = False) -> dict[str, Any]:
    """A tmpfs with room for a part of the run: it must stop by exit 4 and go on once there is more.

    `unseen`: the run finds room before it writes, as if another program took it while a file is being written.
    """
    wanted = bench.left_alone(variant)
    disk = bench.folder / "disk"
    need = sum(path.stat().st_size for path in (bench.folder / f"{variant}-alone" / RUN).rglob("*") if path.is_file())
    if not mounted(disk, f"size={int(part * need) // 1024}k"):
        return {"variant": variant, "fault": "full tmpfs", "skipped": NO_MOUNT}
    try:
        arguments, log = bench.recipe(variant), bench.folder / "full.log"
        first = forked.run(forked.command(disk, *arguments, before=blind if unseen else None), log)
        row = told(variant, UNSEEN if unseen else "full disk (tmpfs)", first, disk / RUN)
        mounted(disk, f"size={4 * need // 1024}k", again=True)
        again = forked.run(forked.command(disk, *arguments), log)
        row |= {"then": again.code, "different": differing(wanted, digests(disk / RUN))}
        return row if not again.code else row | {"said_then": again.said[-1500:]}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def read_only(bench: Bench, variant: str) -> dict[str, Any]:
    disk = bench.folder / "read-only"
    if not mounted(disk, "ro,size=64k"):
        return {"variant": variant, "fault": READ_ONLY, "skipped": NO_MOUNT}
    try:
        work = forked.command(disk, *bench.recipe(variant))
        return told(variant, READ_ONLY, forked.run(work, bench.folder / "read-only.log"), disk / RUN)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def short_files(bench: Bench, variant: str) -> dict[str, Any]:
    """A run that has a checkpoint goes on where no file may be longer than 24 KiB: the model's is."""
    home, log = bench.home(f"short-{variant}"), bench.folder / "short.log"
    forked.run(forked.command(home, *bench.recipe(variant), fault="step.logged:4:kill"), log)
    work = forked.command(home, *bench.recipe(variant), before=limit)
    row = told(variant, "file-size limit", forked.run(work, log), home / RUN)
    again = forked.run(forked.command(home, *bench.recipe(variant)), log)
    return row | {"then": again.code, "different": differing(bench.left_alone(variant), digests(home / RUN))}


def blind() -> None:
    from kinkajou.train import checkpoints

    checkpoints.check_room = lambda *rest, **more: None


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (24 * 1024, resource.RLIM_INFINITY))


def jobs(bench: Bench) -> list[Callable[[], dict[str, Any]]]:
    found: list[Callable[[], dict[str, Any]]] = []
    for variant in ("sft-adapter", "ppo"):  # they delete older checkpoints, so that they come to every point
        found += [partial(no_space_at, bench, variant, point) for point in POINTS]
    for variant in ("sft", "reward-bf16", "prefer", "ppo", "grpo-best"):
        found += [partial(full_disk, bench, variant, part) for part in (0.45, 0.7, 0.95)]
        found += [partial(full_disk, bench, variant, part, unseen=True) for part in (0.35, 0.6, 0.75, 0.9)]
        found += [partial(read_only, bench, variant), partial(short_files, bench, variant)]
    return found


def right(row: dict[str, Any]) -> bool:
    if "skipped" in row:
        return True
    said = row["code"] == STORAGE and bool(row["line"]) and not row["traceback"] and not row["damaged"]
    if row["fault"] == READ_ONLY:
        return said and row["seconds"] < READ_ONLY_S
    return said and row["then"] == 0 and not row["different"]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "trials": sum("skipped" not in row for row in rows),
        "skipped": sum("skipped" in row for row in rows),
        "wrong": sum(not right(row) for row in rows),
        "slowest_read_only_s": max(
            (row["seconds"] for row in rows if row["fault"] == READ_ONLY and "seconds" in row), default=0.0
        ),
    }
