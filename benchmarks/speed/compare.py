"""`python -m benchmarks compare`: measures rows, prints and saves them, or holds them against saved ones."""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.speed import record
from benchmarks.speed.contests import CONTESTS, ROWS, Side
from benchmarks.speed.driver import Child, Failed, one_line, play, read_row, sides_of, write_material

Figures = dict[str, Any]
RAISED = "BENCHMARKS_RAISED"
"""Set in the process that has the raised priority, so that it is not raised again."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    made.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows, or all whose names begin so")
    made.add_argument("--rounds", type=int, default=3, help="how often each side does the work (3)")
    made.add_argument("--out", type=Path, metavar="FILE", help="write all figures here, as JSON")
    made.add_argument("--against", type=Path, metavar="FILE", help="compare with these figures; exit code 1 if worse")
    made.add_argument("--list", action="store_true", help="name the rows and stop")
    made.add_argument("--plain", action="store_true", help="leave the scheduling priority as it is")
    return made


def chosen_rows(names: Sequence[str] | None, complain: argparse.ArgumentParser) -> list[str]:
    if not names:
        return list(ROWS)
    found = [row for row in ROWS if any(row == name or row.startswith(f"{name}-") for name in names)]
    unknown = [name for name in names if not any(row == name or row.startswith(f"{name}-") for row in ROWS)]
    if unknown:
        complain.error(f"no row is named {', '.join(unknown)}; `compare --list` shows them")
    return found


def raise_priority(arguments: Sequence[str]) -> None:
    """Goes on as a process session of its own with the highest priority, which works for an administrator alone."""
    if shutil.which("setsid") and os.environ.get(RAISED) is None:
        os.environ[RAISED] = "1"
        again = [sys.executable, "-m", "benchmarks", "compare", *arguments]
        script = 'echo -20 > /proc/self/autogroup; exec nice -n -20 "$@"'
        os.execvp("setsid", ["setsid", "--wait", "bash", "-c", script, "_", *again])


def measure(names: Sequence[str], rounds: int, folder: Path, save: Callable[[Figures], None]) -> Figures:
    """All rows of a contest are read from the same rounds; what is there is saved after each."""
    found: Figures = record.header(rounds) | {"rows": {}, "contests": {}}
    for contest in dict.fromkeys(ROWS[name].contest for name in names):
        here = CONTESTS[contest]
        mine = [name for name in names if ROWS[name].contest == contest]
        print(f"{contest}: {here.work}", flush=True)

        def start(name: str, side: Side, contest: str = contest) -> Child:
            if side.peer and not peers.installed(side.peer):
                raise Failed(f"{side.peer} is not there; python -m benchmarks.peers install")
            return Child(side, folder, folder / f"{contest}-{name}.log")

        sides = sides_of([ROWS[name] for name in mine], here)
        played = play(sides, start, rounds, lambda text: print(text, flush=True))
        found["contests"][contest] = record.contest(here, played)
        for name in mine:
            found["rows"][name] = read_row(ROWS[name], here, played)
            print(f"  {one_line(name, found['rows'][name])}", flush=True)
        save(found)
    return found


def write(path: Path, found: Figures) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    reader = parser()
    chosen = reader.parse_args(arguments)
    if chosen.list:
        width = max(map(len, ROWS))
        print("\n".join(f"{name:{width}}  {row.work}" for name, row in ROWS.items()))
        return 0
    names = chosen_rows(chosen.rows, reader)
    before = record.read_figures(chosen.against) if chosen.against else None
    if before and not chosen.rows:
        names = [name for name in names if name in before["rows"]]
    if not chosen.plain:
        raise_priority(arguments)
    print(f"priority: {record.priority()}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_material(folder)
        save = partial(write, chosen.out) if chosen.out else lambda found: None
        found = measure(names, chosen.rounds, folder, save)
    if before is None:
        return 0
    worse = record.regressions(found, before)
    print("\n".join(f"worse: {text}" for text in worse) or "nothing is worse")
    return 1 if worse else 0
