"""Reads run folders: settings, metrics, samples and the summary that joins several runs."""

import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kinkajou.errors import UserError

# (step, value); None where the run wrote null, that is: not a number.
Points = list[tuple[int, float | None]]

KINDS = ("sft", "reward", "prefer", "preference", "dpo", "kto", "grpo", "ppo")
SAMPLES_KEPT_PER_STEP = 64
FINDINGS_KEPT = 50
NORMAL_95 = 1.96
"""Standard errors on each side of a mean that hold it 95 times in 100."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the run's diagnosis says under one name: as it was first seen, and how often since."""

    name: str
    step: int
    cause: str
    evidence: dict[str, Any]
    action: str
    metrics: tuple[str, ...]
    seen: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run folder, as far as it could be read; `notes` says what could not."""

    name: str
    kind: str
    config: dict[str, Any]
    series: dict[str, Points]
    first_step: int
    last_step: int
    num_steps: int
    time_s: float
    samples: dict[int, list[dict[str, Any]]]
    best: dict[str, Any]
    findings: list[Found] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def planned_steps(self) -> int | None:
        """The number of steps the settings asked for, where they say so."""
        table = self.config.get(self.kind)
        for key in ("steps", "num_steps", "max_steps"):
            value = table.get(key) if isinstance(table, dict) else None
            if isinstance(value, int) and value > 0:
                return value
        return None

    @property
    def best_step(self) -> int | None:
        """The step whose weights were kept."""
        step = number(self.best.get("step"))
        return None if step is None else int(step)


def number(value: object) -> float | None:
    """A finite float, or None for anything else (null, NaN, infinities, text).

    Beyond 1e100 a value has overflowed in all but name, and axes could not hold it.
    """
    if not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if math.isfinite(converted) and abs(converted) < 1e100 else None


def read_stages(folder: Path) -> tuple[list[Stage], dict[str, Any], list[str]]:
    """The stages in order, the summary ({} without one) and notes on what is missing.

    Raises UserError where there is no metrics.jsonl in the folder or one level below.
    """
    summary, notes = _read_json(folder / "summary.json")
    if (folder / "metrics.jsonl").is_file():
        return [read_stage(folder)], summary, notes
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}", fix="name the folder that a training run wrote")
    found = {path.name: path for path in folder.iterdir() if (path / "metrics.jsonl").is_file()}
    if not found:
        inside = sorted(path.name for path in folder.iterdir())[:8]
        raise UserError(
            f"nothing to report in {folder}: it has no metrics.jsonl, nor has a folder in it",
            evidence=", ".join(inside) or "an empty folder",
            fix="name a run folder (it holds metrics.jsonl), or a folder with run folders directly inside",
        )
    listed = summary.get("stages")
    wanted = [str(name) for name in listed] if isinstance(listed, list) else []
    notes += [f"Stage “{name}” has no metrics.jsonl yet." for name in wanted if name not in found]
    first = [name for name in dict.fromkeys(wanted) if name in found]
    rest = sorted((path for name, path in found.items() if name not in first), key=_age)
    return [read_stage(path) for path in [found[name] for name in first] + rest], summary, notes


def read_stage(folder: Path) -> Stage:
    """One run folder. Only metrics.jsonl must be there."""
    config, notes = _read_config(folder / "config.toml")
    best, best_notes = _read_json(folder / "best.json")
    rows, row_notes = _read_rows(folder / "metrics.jsonl")
    timing, timing_notes = _read_rows(folder / "timing.jsonl", repeats=True)
    for step in rows.keys() & timing.keys():
        rows[step].update(timing[step])
    samples, sample_notes = _read_samples(folder / "samples.jsonl")
    findings, finding_notes = _read_findings(folder / "findings.jsonl")
    series: dict[str, Points] = {}
    for step in sorted(rows):
        for key, value in rows[step].items():
            series.setdefault(key, []).append((step, value))
    times = [value for _, value in series.pop("time_s", []) if value is not None]
    series = _with_bands(series)
    name = folder.resolve().name
    return Stage(
        name=name,
        kind=_kind(name, config),
        config=config,
        series=series,
        first_step=min(rows, default=0),
        last_step=max(rows, default=0),
        num_steps=len(rows.keys() - {0}),
        time_s=max(times, default=0.0),
        samples=samples,
        best=best,
        findings=findings,
        notes=notes + best_notes + row_notes + timing_notes + sample_notes + finding_notes,
    )


def _age(path: Path) -> tuple[int, int, str]:
    # Whole seconds: the files of a copied folder share one, and then the usual order is the better guess.
    config = path / "config.toml"
    written = int((config if config.is_file() else path / "metrics.jsonl").stat().st_mtime)
    return written, KINDS.index(path.name) if path.name in KINDS else len(KINDS), path.name


def _kind(name: str, config: dict[str, Any]) -> str:
    tables = [key for key, value in config.items() if isinstance(value, dict)]
    return next((kind for kind in [name, *tables] if kind in KINDS), name)


def _objects(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line's JSON object, or None for a line that is none."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            usable = isinstance(value, dict) and number(value.get("step")) is not None
            yield value if usable else None


def _skipped(count: int, file: str) -> list[str]:
    if not count:
        return []
    lines = "1 line" if count == 1 else f"{count} lines"
    return [f"{lines} of {file} could not be read and {'was' if count == 1 else 'were'} skipped."]


def _read_rows(path: Path, *, repeats: bool = False) -> tuple[dict[int, dict[str, float | None]], list[str]]:
    """The numbers of each step.  Where the clock starts again, `time_s` goes on from the last step that counts.

    `repeats` says that a step further back is always one that is done again; otherwise the clock must say so too.
    """
    rows: dict[int, dict[str, float | None]] = {}
    skipped, last_step, clock, elapsed, before, rewound = 0, 0, 0.0, 0.0, 0.0, 0
    for line in _objects(path) if path.is_file() else []:
        if line is None:
            skipped += 1
            continue
        step, time_s = int(line.pop("step")), number(line.pop("time_s", None))
        back = time_s is not None and time_s < clock
        if step < last_step and (back or repeats):
            # A run resumed from a checkpoint: what came after the checkpoint is being done again.
            rewound += 1
            rows = {old: row for old, row in rows.items() if old < step}
            elapsed = max((row.get("time_s") or 0.0 for row in rows.values()), default=0.0)
        values = {key: number(value) for key, value in line.items() if _plottable(value)}
        if time_s is not None:
            if back and before + time_s < elapsed:
                before = elapsed
            clock, elapsed = time_s, before + time_s
            values["time_s"] = elapsed
        last_step = step
        rows.setdefault(step, {}).update(values)
    notes = _skipped(skipped, path.name)
    if rewound:
        times = "once" if rewound == 1 else f"{rewound} times"
        notes.append(f"Resumed {times}: steps that were run again show their last numbers.")
    return rows, notes


def _plottable(value: object) -> bool:
    return value is None or isinstance(value, int | float)


def _read_samples(path: Path) -> tuple[dict[int, list[dict[str, Any]]], list[str]]:
    samples: dict[int, list[dict[str, Any]]] = {}
    skipped = 0
    for line in _objects(path) if path.is_file() else []:
        if line is None:
            skipped += 1
            continue
        kept = samples.setdefault(int(line["step"]), [])
        # An exact resume writes the same samples a second time.
        if len(kept) < SAMPLES_KEPT_PER_STEP and line not in kept:
            kept.append(line)
    return samples, _skipped(skipped, "samples.jsonl")


def _read_findings(path: Path) -> tuple[list[Found], list[str]]:
    """One for each name, in the order of their first steps."""
    found: dict[str, Found] = {}
    skipped = 0
    for line in _objects(path) if path.is_file() else []:
        if line is None or not isinstance(line.get("name"), str):
            skipped += 1
            continue
        name, seen = line["name"], int(number(line.get("seen")) or 1)
        if known := found.get(name):
            found[name] = replace(known, seen=max(known.seen, seen))
        elif len(found) < FINDINGS_KEPT:
            evidence, metrics = line.get("evidence"), line.get("metrics")
            found[name] = Found(
                name=name,
                step=int(line["step"]),
                cause=str(line.get("cause", "")),
                evidence=evidence if isinstance(evidence, dict) else {},
                action=str(line.get("action", "")),
                metrics=tuple(map(str, metrics)) if isinstance(metrics, list) else (),
                seen=seen,
            )
    return sorted(found.values(), key=lambda one: one.step), _skipped(skipped, "findings.jsonl")


def _with_bands(series: dict[str, Points]) -> dict[str, Points]:
    """`x_se`, the standard error of `x`, becomes the band `x_low` to `x_high` around it."""
    out = dict(series)
    for key in [key for key in series if key.endswith("_se")]:
        base = key.removesuffix("_se")
        if base not in series or f"{base}_low" in series:
            continue
        means = dict(series[base])
        for name, side in (("low", -NORMAL_95), ("high", NORMAL_95)):
            out[f"{base}_{name}"] = [
                (step, None if error is None or (mean := means.get(step)) is None else mean + side * error)
                for step, error in series[key]
            ]
        del out[key]
    return out


def _read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    if not path.is_file():
        return {}, ["config.toml is missing: the settings of this run are unknown."]
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), []
    except (ValueError, RecursionError) as error:
        return {}, [f"config.toml could not be read: {error}."]


def _read_json(path: Path) -> tuple[dict[str, Any], list[str]]:
    if not path.is_file():
        return {}, []
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return {}, [f"{path.name} could not be read: {error}."]
    return (value, []) if isinstance(value, dict) else ({}, [f"{path.name} holds no JSON object."])
