"""`python -m benchmarks.faults NAME`: what a run survives, measured; docs/reliability.md has the tables.

`--write` keeps the figures in benchmarks/results/faults-NAME.json.  `--seconds` begins nothing new after so many, and
the same command with `--write` goes on from there.  `--quick` makes 25 kills, five a stage.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.trials import kills, mutants, on_ranks, seeds, stall, stops, storage
from benchmarks.trials.kills import Bench
from kinkajou.train.console import git_commit

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


@dataclass(frozen=True)
class Campaign:
    """Trials that follow one another, each a row; what is right of a row, and the figures of all."""

    jobs: Callable[[Path, argparse.Namespace], list[Callable[[], Row]]]
    right: Callable[[Row], bool]
    summary: Callable[[list[Row]], Row]
    help: str


CAMPAIGNS = {
    "kills": Campaign(
        lambda folder, given: kills.jobs(Bench.make(folder), given.each, given.seed, most=2 if given.quick else 99),
        kills.right,
        kills.summary,
        "kill -9 at every named point, 50 a stage",
    ),
    "mutants": Campaign(
        lambda folder, given: mutants.jobs(Bench.make(folder)),
        mutants.right,
        mutants.summary,
        "runs that go on with one part of their state dropped",
    ),
    "stops": Campaign(
        lambda folder, given: stops.jobs(Bench.make(folder), given.each),
        stops.right,
        stops.summary,
        "SIGTERM and SIGINT at random moments",
    ),
    "storage": Campaign(
        lambda folder, given: storage.jobs(Bench.make(folder)),
        storage.right,
        storage.summary,
        "full disks, read-only folders",
    ),
    "seeds": Campaign(
        lambda folder, given: seeds.jobs(Bench.make(folder)), seeds.right, seeds.summary, "the same seed twice"
    ),
    "ranks": Campaign(
        lambda folder, given: on_ranks.jobs(Bench.make(folder), 20, given.seed),
        on_ranks.right,
        on_ranks.summary,
        "kill -9 of one of two ranks under torchrun",
    ),
    "stall": Campaign(
        lambda folder, given: stall.jobs(folder, rounds=3), stall.right, stall.summary, "what checkpoints cost"
    ),
}


def run(name: str, folder: Path, given: argparse.Namespace) -> bool:
    """Whether all trials so far are right."""
    campaign, path = CAMPAIGNS[name], RESULTS / f"faults-{name}.json"
    until = time.monotonic() + given.seconds
    before = path.is_file() and given.write and not given.again
    rows: list[Row] = json.loads(path.read_text())["trials"] if before else []
    jobs = campaign.jobs(folder, given)
    for number in range(len(rows), len(jobs)):
        if time.monotonic() > until:
            break
        rows.append(jobs[number]())
        if not campaign.right(rows[-1]):
            print(number, json.dumps(rows[-1], indent=1), file=sys.stderr, flush=True)
        if given.write:
            found = {"planned": len(jobs), "commit": git_commit(), "summary": campaign.summary(rows), "trials": rows}
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"planned": len(jobs), **campaign.summary(rows)}))
    return all(map(campaign.right, rows))


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = "; ".join(f"{name}: {campaign.help}" for name, campaign in CAMPAIGNS.items())
    flags.add_argument("name", nargs="?", default="kills", choices=[*CAMPAIGNS], help=told)
    flags.add_argument("--quick", action="store_true", help="25 kills for the tests")
    flags.add_argument("--each", type=int, default=50, help="kills a stage, or signals")
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
        return 0 if run(given.name, given.folder, given) else 1
    with tempfile.TemporaryDirectory(prefix="kinkajou-faults-") as name:
        return 0 if run(given.name, Path(name), given) else 1


if __name__ == "__main__":
    sys.exit(main())
