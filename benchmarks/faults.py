"""`python -m benchmarks.faults kills|...`: what a run survives, measured; docs/reliability.md has the tables.

`--write` keeps the figures in benchmarks/results/faults-NAME.json; `--seconds` stops a campaign in time, and the same
command goes on with it.  `--quick` makes 25 kills, five a stage, and prints their summary as JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.trials import kills

RESULTS = Path(__file__).parent / "results"


def result_file(name: str) -> Path:
    return RESULTS / f"faults-{name}.json"


def kept(name: str, again: bool) -> dict[str, Any]:
    path = result_file(name)
    return json.loads(path.read_text()) if path.is_file() and not again else {}


def keep(name: str, found: dict[str, Any]) -> None:
    result_file(name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def run_kills(folder: Path, given: argparse.Namespace) -> int:
    bench = kills.Bench.make(folder)
    planned = kills.plan(bench, given.each, given.seed)
    rows: list[dict[str, Any]] = [] if given.quick else kept("kills", given.again).get("trials", [])
    until = time.monotonic() + given.seconds
    for number in range(len(rows), len(planned)):
        if time.monotonic() > until:
            break
        row = kills.as_row(kills.tried(bench, planned[number], number))
        rows.append(row)
        if row["code"] or row["different"]:
            print(number, json.dumps(row, indent=1), file=sys.stderr, flush=True)
        if given.write:
            keep("kills", {"summary": kills.summary(rows), "trials": rows})
    told = kills.summary(rows)
    print(json.dumps(told))
    return 1 if told["lost"] or told["different"] else 0


COMMANDS = {"kills": run_kills}


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("what", nargs="?", default="kills", choices=[*COMMANDS])
    flags.add_argument("--quick", action="store_true", help="25 kills for the tests")
    flags.add_argument("--each", type=int, default=50, help="kills a stage")
    flags.add_argument("--seed", type=int, default=0, help="decides the moments")
    flags.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many seconds")
    flags.add_argument("--write", action="store_true", help="keep the figures")
    flags.add_argument("--again", action="store_true", help="forget the figures that are there")
    flags.add_argument("--folder", type=Path, help="where runs lie; a folder that is deleted if omitted")
    given = flags.parse_args()
    if given.quick:
        given.each = 5
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
        return COMMANDS[given.what](given.folder, given)
    with tempfile.TemporaryDirectory(prefix="kinkajou-faults-") as name:
        return COMMANDS[given.what](Path(name), given)


if __name__ == "__main__":
    sys.exit(main())
