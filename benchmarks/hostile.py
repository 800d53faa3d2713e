"""`python -m benchmarks.hostile --write`: hostile models, tokenizers, adapters and checkpoints; none may do anything.

Each artefact is a good folder with one evil change, given to `kinkajou sft` in a process of its own: as --model, as
--tokenizer, or as the checkpoint to go on from.  It must be refused by a sentence, exit code 2 or 4, within two seconds
of the process that has its imports already, and the file that its payload would write must not be there.  Of good
folders with a payload that nobody is to look at, the run must end well.  docs/reliability.md has the table.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.artefacts.checkpoints import CHECKPOINTS
from benchmarks.artefacts.making import Make, Target
from benchmarks.artefacts.models import ADAPTERS, IGNORED, MODELS, TOKENIZERS
from benchmarks.trials import forked
from benchmarks.trials.kills import Bench
from benchmarks.trials.page import table
from benchmarks.trials.world import RUN
from kinkajou.checkpoint.shelf import Shelf

RESULT = Path(__file__).parent / "results" / "hostile.json"
REFUSED, LONGEST_S, GIVEN_S = (2, 4), 2.0, 12.0
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
KINDS: dict[str, dict[str, Make]] = {
    "model": MODELS,
    "tokenizer": TOKENIZERS,
    "adapter": ADAPTERS,
    "checkpoint": CHECKPOINTS,
    "ignored": IGNORED,
}
Row = dict[str, Any]


class Hostile:
    """The good folders of each kind, and the place for their copies."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.folder = bench, bench.folder / "hostile"
        self.folder.mkdir()
        policy = bench.folder / "policy"
        tokenizer = self.folder / "tokenizer"
        shutil.copytree(policy, tokenizer)
        (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
        adapter = self.trained("sft-adapter")
        shutil.copytree(adapter, self.folder / "adapter", ignore=shutil.ignore_patterns("state", "manifest.json"))
        self.checkpoint = self.trained("sft")
        self.good = {"model": policy, "ignored": policy, "tokenizer": tokenizer, "adapter": self.folder / "adapter"}

    def trained(self, variant: str) -> Path:
        """The newest checkpoint of a run."""
        self.bench.left_alone(variant)
        shelf = Shelf(self.bench.folder / f"{variant}-alone" / RUN / "checkpoints")
        return shelf.path(shelf.places()[-1])

    def copy(self, kind: str, number: int) -> Path:
        place = self.folder / f"{kind}-{number}"
        if kind == "checkpoint":  # with the run that it belongs to
            shutil.copytree(self.checkpoint.parents[1], place)
            return place / "checkpoints" / self.checkpoint.name
        shutil.copytree(self.good[kind], place)
        return place

    def arguments(self, kind: str, folder: Path) -> tuple[str, ...]:
        given = {
            "tokenizer": ("--tokenizer", str(folder), "--template", "tokenizer"),
            "checkpoint": ("--resume", str(folder)),
        }
        return (*self.bench.recipe("sft"), *given.get(kind, ("--model", str(folder))))


def tried(hostile: Hostile, kind: str, name: str, number: int) -> Row:
    folder = hostile.copy(kind, number)
    canary = hostile.folder / f"canary-{kind}-{number}"
    good = hostile.checkpoint if kind == "checkpoint" else hostile.good[kind]
    KINDS[kind][name](Target(folder, canary, good))
    home, log = hostile.bench.home(f"hostile-run-{kind}-{number}"), hostile.folder / "hostile.log"
    work = forked.command(home, *hostile.arguments(kind, folder))
    try:
        ended = forked.run(work, log, timeout_s=GIVEN_S)
    except TimeoutError as fault:
        ended = forked.Ended(124, GIVEN_S, str(fault))
    lines = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    row: Row = {
        "kind": kind,
        "name": name,
        "code": ended.code,
        "seconds": round(ended.seconds, 2),
        "line": lines[0].replace(str(hostile.bench.folder), "") if lines else "",
        "traceback": "Traceback" in ended.said,
        "canary": canary.exists(),
        "trained": any(word in ended.said for word in ("goes on from", "done: ")),
    }
    return row if right(row) else row | {"said": ended.said[-1500:]}


def right(row: Row) -> bool:
    if row["canary"] or row["traceback"]:
        return False
    if row["kind"] == "ignored":
        return row["code"] == 0
    quick = row["seconds"] < LONGEST_S
    return row["code"] in REFUSED and row["line"].startswith("error: ") and quick and not row["trained"]


def jobs(hostile: Hostile) -> Iterator[Callable[[], Row]]:
    for kind, found in KINDS.items():
        for number, name in enumerate(found):
            yield partial(tried, hostile, kind, name, number)


def summary(rows: list[Row]) -> Row:
    evil = [row for row in rows if row["kind"] != "ignored"]
    return {
        "artefacts": len(evil),
        "refused": sum(row["code"] in REFUSED and bool(row["line"]) and not row["traceback"] for row in evil),
        "slowest_s": max((row["seconds"] for row in evil), default=0.0),
        "canaries": sum(row["canary"] for row in rows),
        "ignored": len(rows) - len(evil),
        "wrong": sum(not right(row) for row in rows),
    }


def page(rows: list[Row]) -> str:
    lines = [[row["kind"], row["name"], row["code"], f"{row['seconds']:.2f}", row["line"][7:]] for row in rows]
    return table(["as", "artefact", "exit", "s", "what is said"], lines)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--write", action="store_true", help="keep the figures")
    flags.add_argument("--only", help="artefacts whose kind or name has this in it")
    given = flags.parse_args()
    with tempfile.TemporaryDirectory(prefix="kinkajou-hostile-") as name:
        hostile = Hostile(Bench.make(Path(name)))
        rows = []
        for job in jobs(hostile):
            kind, artefact = job.args[1:3]  # type: ignore[attr-defined]
            if not given.only or given.only in kind or given.only in artefact:
                rows.append(job())
                print(f"{rows[-1]['seconds']:5.2f} s  {kind}: {artefact}", file=sys.stderr, flush=True)
                if not right(rows[-1]):
                    print(json.dumps(rows[-1], indent=1), file=sys.stderr, flush=True)
    found = summary(rows)
    if given.write:
        RESULT.write_text(json.dumps({"summary": found, "trials": rows}, indent=1) + "\n", encoding="utf-8")
    print(page(rows), json.dumps(found), sep="\n")
    return 0 if not found["wrong"] else 1


if __name__ == "__main__":
    sys.exit(main())
