"""How time per token and memory of ours grow: with sequence length, vocabulary, batch, group size and slots.

    python -m benchmarks.growth                    # measures (about 5 minutes), prints every point
    python -m benchmarks.growth --out FILE         # and saves all figures as JSON
    python -m benchmarks.growth --write            # and renders docs/growth.md with its pictures
    python -m benchmarks.growth --from FILE --write    # renders saved figures

The model is the LLaMA of 4 layers of 256, on a CPU; every point runs in a process of its own.
"""

import argparse
import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import growth_page
from benchmarks.growth_points import Measured, Point, as_row, measure_all
from benchmarks.speed.line import versions
from benchmarks.speed.record import commit, machine, priority

REPETITIONS, BUDGET_S = 3, 5.0
"""A point's repetitions, fewer where they take longer than so many seconds together."""


def points(*, quick: bool) -> list[Point]:
    """Every point of every curve; `quick` keeps a few small ones, to try the program."""
    step = 2048 if quick else 8192
    found = []
    for dtype in ("fp32", "bf16"):
        for length in (128, 512, 2048) if quick else (128, 256, 512, 1024, 2048, 4096, 8192):
            found.append(Point(curve="length", x=length, dtype=dtype, rows=step // length, length=length))
        for vocabulary in (8192, 50257) if quick else (8192, 32000, 50257, 128256, 250880):
            sizes = {"rows": 2, "length": 128 if quick else 512}
            found.append(Point(curve="vocabulary", x=vocabulary, dtype=dtype, vocabulary=vocabulary, **sizes))
    for microbatch in (512, 2048) if quick else (512, 1024, 2048, 4096, 8192):
        found.append(Point(curve="batch", x=microbatch, rows=step // 512, length=512, microbatch=microbatch))
    samples, prompt, new = (8, 64, 8) if quick else (32, 256, 32)
    for group in (1, 8) if quick else (1, 2, 4, 8, 16, 32):
        sizes = {"rows": samples, "length": prompt, "new": new, "slots": samples}
        found.append(Point(curve="group", x=group, group=group, **sizes))
    for slots in (1, 8) if quick else (1, 2, 4, 8, 16, 32, 64):
        found.append(Point(curve="slots", x=slots, slots=slots, rows=2 * slots, length=16, new=16 if quick else 64))
    return found


def told(point: Point, measured: Measured) -> str:
    spread = f"{min(measured.seconds):.2f} .. {max(measured.seconds):.2f} s"
    memory = f"{measured.own_bytes / 2**20:,.0f} MB"
    return (
        f"{point.curve:10} {point.x:>7,} {point.dtype}  {measured.us_per_token:>8,.1f} us/token  {memory:>8}  {spread}"
    )


def header(repetitions: int) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    settings = {"repetitions": repetitions, "threads": os.cpu_count(), "priority": priority()}
    about = {"kind": "growth", "when": now, "commit": commit(), "machine": machine(), "versions": versions()}
    return about | {"settings": settings}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--out", type=Path, metavar="FILE", help="write all figures here, as JSON")
    made.add_argument("--from", dest="saved", type=Path, metavar="FILE", help="read figures instead of measuring")
    made.add_argument("--write", action="store_true", help="render docs/growth.md and docs/images/growth-*.svg")
    made.add_argument("--quick", action="store_true", help="a few small points, once each: to try the program")
    return made


def main(arguments: Sequence[str]) -> int:
    chosen = parser().parse_args(arguments)
    if chosen.saved:
        found = json.loads(chosen.saved.read_text(encoding="utf-8"))
    else:
        repetitions = 1 if chosen.quick else REPETITIONS
        found = header(repetitions)
        measured = measure_all(
            points(quick=chosen.quick),
            repetitions=repetitions,
            budget_s=BUDGET_S,
            say=lambda point, measured: print(told(point, measured), flush=True),
        )
        found["points"] = [as_row(*pair) for pair in measured]
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if chosen.write:
        growth_page.write(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
