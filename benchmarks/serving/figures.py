"""What is kept of a campaign: its figures beside machine, versions and commit; quantiles and slopes."""

import datetime
import json
import math
import os
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.speed import record

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "transformers", "fastapi", "starlette", "uvicorn", "h11", "httptools", "uvloop", "schemathesis")
Row = dict[str, Any]


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(name: str, figures: Row, given: Row) -> Path:
    """Writes benchmarks/results/serving-NAME.json."""
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"when": when, "commit": record.commit(), "machine": record.machine(), "versions": versions()}
    about |= {"priority": record.priority(), "given": given, "omp_threads": os.environ.get("OMP_NUM_THREADS")}
    path = RESULTS / f"serving-{name}.json"
    path.write_text(json.dumps({**about, **figures}, indent=1) + "\n", encoding="utf-8")
    return path


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that at least `share` of the values do not exceed (nearest rank); NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def spread(seconds: Sequence[float]) -> Row:
    """Quantiles in milliseconds."""
    found = {f"p{round(share * 100)}_ms": round(1000 * quantile(seconds, share), 3) for share in (0.5, 0.9, 0.99)}
    return {"count": len(seconds), **found, "max_ms": round(1000 * max(seconds, default=math.nan), 3)}


T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)
"""Student's t, 97.5 %, for 1, 2, ... degrees of freedom; beyond them 2.09 falls to 1.96."""


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares: the slope of y over x and half the width of its 95 % interval (independent errors)."""
    fit = statistics.linear_regression(x, y)
    left = [b - fit.slope * a - fit.intercept for a, b in zip(x, y, strict=True)]
    free = len(x) - 2
    middle = statistics.fmean(x)
    width = math.sqrt(math.fsum(e * e for e in left) / free / math.fsum((a - middle) ** 2 for a in x))
    t = T_975[free - 1] if free <= len(T_975) else 1.96 + 2.4 / free
    return fit.slope, t * width


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
