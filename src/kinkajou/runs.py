"""`kinkajou runs`: the runs of a folder, what each is doing and how far it is.

A folder that is broken has gaps in its line; it is no fault of this command.
"""

import json
import math
import os
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kinkajou.checkpoint.lock import holder
from kinkajou.checkpoint.manifest import shown
from kinkajou.checkpoint.place import Place
from kinkajou.checkpoint.shelf import Shelf
from kinkajou.data.strict_json import JSONFault, parse
from kinkajou.errors import UserError

TELLING: dict[str, tuple[str, ...]] = {
    "sft": ("loss", "eval_loss", "lr"),
    "reward": ("loss", "accuracy", "eval_accuracy"),
    "prefer": ("loss", "accuracy", "margin", "eval_accuracy"),
    "ppo": ("score", "kl_ref", "eval_gold", "response_length"),
    "grpo": ("score", "kl_ref", "eval_gold", "response_length"),
}
"""Metrics that are shown, by stage."""
SHOWN, LOOKED_AT = 4, 10_000
TAIL = 1 << 16
MAX_FILE = 1 << 22


@dataclass(frozen=True)
class Told:
    """What is known of a run; empty or None where its folder does not say."""

    name: str
    path: str
    stage: str
    state: str
    """running, done, failed, stopped (it has ended in order), killed, or unknown."""
    owner: str
    """Of a run that is going, or that was killed."""
    step: int | None
    total: int | None
    checkpoint: str
    """The newest with all its files at their lengths; `kinkajou verify` reads them."""
    damaged: int
    best: dict[str, Any]
    metrics: dict[str, float | None]
    age_s: float


def runs(folder: Path, *, as_json: bool = False) -> None:
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}", fix="name a folder with runs in it")
    found = sorted((told(path, folder) for path in find_runs(folder)), key=lambda run: run.age_s)
    if not found:
        raise UserError(f"no run in {folder}", fix="name a run's folder, or one with runs in it or one level below")
    if as_json:
        print(json.dumps([asdict(run) for run in found], indent=1))
    else:
        show(found)


def find_runs(folder: Path) -> Iterator[Path]:
    """The folder, those in it, and those in these; nothing below a run."""
    level = [folder]
    for _ in range(3):
        inside: list[Path] = []
        for path in level:
            if is_run(path):
                yield path
            else:
                inside += folders_in(path)
        level = inside[:LOOKED_AT]


def folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(e.path) for e in entries if not e.name.startswith(".") and e.is_dir())
    except OSError:  # not for this user to see
        return []


def is_run(folder: Path) -> bool:
    names = ("config.toml", "metrics.jsonl", "checkpoints")
    return sum(os.path.lexists(folder / name) for name in names) >= 2


def told(folder: Path, below: Path) -> Told:
    settings = read_settings(folder / "config.toml")
    stage = next((name for name in TELLING if isinstance(settings.get(name), dict)), "")
    row, done = last_row(folder / "metrics.jsonl"), read_object(folder / "done.json")
    owner, here = holder(folder)
    place, damaged = newest(folder / "checkpoints")
    step = number(row.get("step"))
    state = state_of(here=here, done=bool(done), gone=owner is not None, failed=has_failed(folder, step))
    return Told(
        name=shown(str(folder.relative_to(below)) if folder != below else folder.resolve().name),
        path=str(folder),
        stage=stage,
        state=state,
        owner=str(owner) if owner else "",
        step=None if step is None else int(step),
        total=total_of(folder, settings.get(stage), done, place),
        checkpoint=place.name if place else "",
        damaged=damaged,
        best=read_object(folder / "best.json"),
        metrics=telling(stage, row),
        age_s=age(folder),
    )


def state_of(*, here: bool, done: bool, gone: bool, failed: bool) -> str:
    if here:
        return "running"
    if done:
        return "done"
    return "failed" if failed else "killed" if gone else "stopped"


def has_failed(folder: Path, step: float | None) -> bool:
    """Whether its last finding is what ended it."""
    finding = last_row(folder / "findings.jsonl")
    at = number(finding.get("step"))
    return finding.get("level") == "error" and at is not None and at >= (step or 0)


def newest(folder: Path) -> tuple[Place | None, int]:
    try:
        place, damaged = Shelf(folder).newest(content=False)
    except UserError:  # a folder that cannot be listed
        return None, 0
    return place, len(damaged)


def total_of(folder: Path, settings: object, done: dict[str, Any], place: Place | None) -> int | None:
    """Steps of the whole run: a checkpoint knows them, and the settings of some stages."""
    kept = read_object(folder / "checkpoints" / place.name / "state" / "run.json") if place else {}
    wanted = settings.get("steps") if isinstance(settings, dict) else None
    found = next((x for x in map(number, (kept.get("total"), wanted, done.get("step"))) if x), None)
    return None if found is None else int(found)


def telling(stage: str, row: dict[str, Any]) -> dict[str, float | None]:
    names: Sequence[str] = [name for name in TELLING.get(stage, ()) if name in row]
    names = names or [name for name in row if name != "step"]
    return {shown(name): number(row[name]) for name in names[:SHOWN]}


def number(value: object) -> float | None:
    """A finite number as JSON has it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
        return None
    return value if math.isfinite(value) else None


def age(folder: Path) -> float:
    """Seconds since the run has last written."""
    times = []
    for name in ("metrics.jsonl", "config.toml", "done.json", "checkpoints"):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:  # not there
            continue
    return max(0.0, time.time() - max(times, default=0.0))


def read_settings(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(head(path))
    except (OSError, ValueError, RecursionError):
        return {}


def read_object(path: Path) -> dict[str, Any]:
    try:
        value = parse(head(path))
    except (OSError, ValueError):  # a fault of JSON is one of value
        return {}
    return value if isinstance(value, dict) else {}


def head(path: Path) -> str:
    """Of a plain file; others could block."""
    if not path.is_file():
        raise FileNotFoundError(path)
    with path.open("rb") as file:
        return file.read(MAX_FILE).decode("utf-8")


def last_row(path: Path) -> dict[str, Any]:
    """The last line that is an object: the one after may be half written."""
    try:
        if not path.is_file():
            return {}
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read(TAIL).decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = parse(line)
        except JSONFault:
            continue
        if isinstance(row, dict):
            return row
    return {}


def show(found: Sequence[Told]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for title in ("run", "stage", "state", "step", "checkpoint", "best", "last", "age"):
        right = title in ("step", "age")
        wraps = title in ("run", "best", "last")
        table.add_column(title, justify="right" if right else "left", no_wrap=not wraps, overflow="fold")
    colours = {"running": "green", "done": "bold", "failed": "red", "killed": "red"}
    for run in found:
        words = (run.stage, Text(run.state, colours.get(run.state, "")), steps(run), kept(run), best(run), last(run))
        table.add_row(
            Text(run.name), *(word if isinstance(word, Text) else Text(word) for word in words), ago(run.age_s)
        )
    Console(highlight=False).print(table)


def steps(run: Told) -> str:
    step = "-" if run.step is None else f"{run.step:,}"
    return step if run.total is None else f"{step} of {run.total:,}"


def kept(run: Told) -> str:
    damaged = f"{run.damaged} damaged" if run.damaged else ""
    return ", ".join(filter(None, (run.checkpoint.removeprefix("step-").lstrip("0") or run.checkpoint, damaged)))


def best(run: Told) -> str:
    value, step = number(run.best.get("value")), number(run.best.get("step"))
    if value is None or step is None:
        return ""
    return f"{shown(str(run.best.get('metric')))} {value:.4g} at {step:,.0f}"


def last(run: Told) -> str:
    return ", ".join(f"{name} {'-' if value is None else format(value, '.4g')}" for name, value in run.metrics.items())


def ago(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
