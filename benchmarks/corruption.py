"""`python -m benchmarks.corruption --write`: 500 corruptions of real checkpoints; docs/reliability.md has the table.

A run of every stage is killed once it has left several checkpoints.  Then, trial after trial, its newest ones are
broken by chance: cut, a bit flipped, deleted, exchanged, added to, the manifest edited or emptied, replaced by a link.
Every damage must be found, the newest whole checkpoint must be the one that is named, and in every fourth trial the
run goes on for real: it must say what it skipped, and end with the bytes of a run that nobody disturbed.

`--seconds` begins nothing new after so many, and the same command with `--write` goes on from there.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.trials import forked
from benchmarks.trials.compare import differing, digests
from benchmarks.trials.kills import Bench
from benchmarks.trials.page import table
from benchmarks.trials.world import RUN
from kinkajou.checkpoint.manifest import NAME, damages
from kinkajou.checkpoint.shelf import Shelf

RESULT = Path(__file__).parent / "results" / "corruption.json"
VARIANTS = {
    "sft": "save.renamed:2",
    "reward": "save.renamed:2",
    "prefer": "save.renamed:2",
    "ppo": "step.end:3",
    "grpo-adapter": "step.end:3",
}
"""Variants, and where they are killed: late enough that there are two checkpoints or more."""
SAVING = {"keep_last": 0, "save_behind": False}
"""All checkpoints stay, and are there when the run is killed."""
RESUMED_EVERY, ALL_BROKEN_EVERY = 4, 10
Row = dict[str, Any]
Dice = random.Random


def files_of(folder: Path, *, full: bool = True) -> list[Path]:
    """Plain files but the manifest, those with content where `full` is asked for."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.name != NAME]
    return sorted(path for path in found if not full or path.stat().st_size)


def truncate(folder: Path, dice: Dice) -> str:
    path = dice.choice(files_of(folder))
    os.truncate(path, dice.randrange(path.stat().st_size))
    return path.name


def flip(folder: Path, dice: Dice) -> str:
    path = dice.choice([*files_of(folder), folder / NAME])
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    return path.name


def delete(folder: Path, dice: Dice) -> str:
    path = dice.choice([*files_of(folder, full=False), folder / NAME, folder / "state"])
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return path.name


def swap(folder: Path, dice: Dice) -> str:
    """Two files with each other, or one with the same file of another checkpoint."""
    pairs = [(one, other) for one in files_of(folder) for other in files_of(folder) if one < other]
    elsewhere = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    for other in elsewhere:
        pairs += [(path, other / path.relative_to(folder)) for path in files_of(folder)]
    one, other = dice.choice([pair for pair in pairs if pair[1].is_file() and differ(*pair)])
    if other.is_relative_to(folder):
        first = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(first)
        return f"{one.name} and {other.name}"
    one.write_bytes(other.read_bytes())
    return f"{one.name} of {other.relative_to(folder.parent).parts[0]}"


def differ(one: Path, other: Path) -> bool:
    return one.read_bytes() != other.read_bytes()


def add(folder: Path, dice: Dice) -> str:
    name = dice.choice(["more.safetensors", "state/more.json", "pytorch_model.bin", ".hidden", "ema/model.safetensors"])
    path = folder / name if not (folder / name).exists() else folder / f"{name}.bak"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(dice.randbytes(dice.randrange(100)))
    return path.name


def edit_manifest(folder: Path, dice: Dice) -> str:
    """So that it stays JSON."""
    path = folder / NAME
    written = json.loads(path.read_text())
    name = dice.choice([*written["files"]])
    entry = written["files"][name]
    change = dice.choice(["sha256", "bytes", "drop", "rename", "format", "drop both"])
    if change == "sha256":
        entry["sha256"] = "".join(dice.choice("0123456789abcdef") for _ in range(64))
    elif change == "bytes":
        entry["bytes"] += dice.choice([-1, 1, 2**62])
    elif change == "format":
        written["format"] = dice.choice([0, 2, "1", None])
    else:
        del written["files"][name]
        if change == "rename":
            written["files"][dice.choice(["../" + name, "/etc/passwd", name + "x", "./" + name])] = entry
        elif change == "drop both":
            (folder / name).unlink()
    path.write_text(json.dumps(written, indent=1) + "\n")
    return change


def empty_manifest(folder: Path, dice: Dice) -> str:
    (folder / NAME).write_bytes(dice.choice([b"", b"{}", b"null", b"\0" * 64]))
    return NAME


def symlink(folder: Path, dice: Dice) -> str:
    """A file with the same content, or a folder, through a link."""
    path = dice.choice([*files_of(folder), folder / NAME, folder / "state"])
    target = folder.parent.parent / "moved" / folder.name / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(target)
    return path.name


KINDS: dict[str, tuple[str, Callable[[Path, Dice], str]]] = {
    "truncate": ("a file is cut", truncate),
    "flip": ("one bit is flipped", flip),
    "delete": ("a file or folder is deleted", delete),
    "swap": ("two files are exchanged, or one is of another checkpoint", swap),
    "add": ("a file is added", add),
    "edit": ("the manifest is edited", edit_manifest),
    "empty": ("the manifest is emptied", empty_manifest),
    "symlink": ("a file or folder becomes a link", symlink),
}


def killed(bench: Bench, variant: str) -> Path:
    """The run folder of a run that was killed, made once."""
    home = bench.folder / f"{variant}-killed"
    if not home.is_dir():
        home = bench.home(home.name)
        work = forked.command(home, *bench.recipe(variant, **SAVING), fault=f"{VARIANTS[variant]}:kill")
        ended = forked.run(work, bench.folder / "killed.log")
        kept = Shelf(home / RUN / "checkpoints").places()
        if ended.code != -9 or len(kept) < 2:
            raise RuntimeError(f"{variant}: exit {ended.code}, {len(kept)} checkpoints\n{ended.said[-2000:]}")
    return home


def trial(bench: Bench, variant: str, kind: str, number: int, seed: int) -> Row:
    """One corruption, or one of every checkpoint; whether it is found, and what is used instead."""
    dice = Dice(f"{seed}/{number}")
    source, home = killed(bench, variant), bench.folder / f"corrupt-{number}"
    shutil.copytree(source, home, symlinks=True)
    shelf = Shelf(home / RUN / "checkpoints")
    places = shelf.places()
    count = len(places) if number % ALL_BROKEN_EVERY == 9 else dice.randint(1, len(places) - 1)
    bad = places[-count:]
    what = [KINDS[kind][1](shelf.path(place), dice) for place in reversed(bad)]
    wanted = places[-count - 1] if count < len(places) else None
    found, told = shelf.newest()
    row: Row = {
        "variant": variant,
        "kind": kind,
        "what": what,
        "broken": count,
        "detected": sum(bool(damages(shelf.path(place))) for place in bad),
        "named": len(told),
        "used": found.name if found else "none",
        "wanted": wanted.name if wanted else "none",
    }
    if number % RESUMED_EVERY == 0 or wanted is None:
        row["resume"] = resumed(bench, variant, home, [place.name for place in bad], refused=wanted is None)
    if right(row):
        shutil.rmtree(home)
    return row


def resumed(bench: Bench, variant: str, home: Path, bad: list[str], *, refused: bool) -> Row:
    """The run's own command in the broken folder."""
    ended = forked.run(forked.command(home, *bench.recipe(variant, **SAVING)), bench.folder / "resumed.log")
    said = " ".join(ended.said.split())
    row: Row = {
        "code": ended.code,
        "named": sum(f"{name} is damaged" in said for name in bad),
        "traceback": "Traceback" in said,
        "refused": refused,
    }
    if not refused:
        row["different"] = differing(undisturbed(bench, variant), digests(home / RUN))
    if "Traceback" in said or ended.code not in (0, 4):
        row["said"] = ended.said[-2000:]
    return row


def undisturbed(bench: Bench, variant: str) -> dict[str, str]:
    """Digests of the same run to its end, with all its checkpoints."""
    name = f"{variant}-whole"
    if name not in bench.alone:
        home = bench.home(name)
        ended = forked.run(forked.command(home, *bench.recipe(variant, **SAVING)), bench.folder / "whole.log")
        if ended.code:
            raise RuntimeError(ended.said[-3000:])
        bench.alone[name] = digests(home / RUN)
    return bench.alone[name]


def right(row: Row) -> bool:
    whole = row["detected"] == row["named"] == row["broken"] and row["used"] == row["wanted"]
    again = row.get("resume")
    if not again:
        return whole
    if again["refused"]:
        return whole and again["code"] == 4 and not again["traceback"]
    return whole and again["code"] == 0 and again["named"] == row["broken"] and not again["different"]


def jobs(bench: Bench, number: int, seed: int) -> list[Callable[[], Row]]:
    names = [*VARIANTS]
    kinds = [*KINDS]
    return [
        partial(trial, bench, names[i % len(names)], kinds[i // len(names) % len(kinds)], i, seed)
        for i in range(number)
    ]


def summary(rows: list[Row]) -> Row:
    """All of it, and by kind."""
    return {"all": counted(rows), **{kind: counted([row for row in rows if row["kind"] == kind]) for kind in KINDS}}


def counted(rows: list[Row]) -> Row:
    again = [row["resume"] for row in rows if "resume" in row]
    return {
        "trials": len(rows),
        "corruptions": sum(row["broken"] for row in rows),
        "detected": sum(row["detected"] for row in rows),
        "loaded": sum(row["used"] != row["wanted"] for row in rows) + sum(bool(r.get("different")) for r in again),
        "older used": sum(row["used"] == row["wanted"] != "none" for row in rows),
        "none left, refused": sum(row["used"] == row["wanted"] == "none" for row in rows),
        "resumed": sum(not r["refused"] for r in again),
        "bitwise": sum(not r["refused"] and r["code"] == 0 and not r["different"] for r in again),
        "wrong": sum(not right(row) for row in rows),
    }


def page(found: Row) -> str:
    heads = ["corruption", *found["all"]]
    lines = [[KINDS[kind][0], *found[kind].values()] for kind in KINDS]
    return table(heads, [*lines, ["all", *found["all"].values()]])


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--number", type=int, default=500, help="corrupted runs")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many seconds")
    flags.add_argument("--write", action="store_true", help="keep the figures")
    flags.add_argument("--again", action="store_true", help="forget the figures that are there")
    given = flags.parse_args()
    until = time.monotonic() + given.seconds
    kept = RESULT.is_file() and given.write and not given.again
    rows: list[Row] = json.loads(RESULT.read_text())["trials"] if kept else []
    with tempfile.TemporaryDirectory(prefix="kinkajou-corruption-") as name:
        for job in jobs(Bench.make(Path(name)), given.number, given.seed)[len(rows) :]:
            if time.monotonic() > until:
                break
            rows.append(job())
            if not right(rows[-1]):
                print(json.dumps(rows[-1], indent=1), file=sys.stderr, flush=True)
    found = summary(rows)
    if given.write:
        RESULT.write_text(json.dumps({"summary": found, "trials": rows}, indent=1) + "\n", encoding="utf-8")
    print(page(found), end="")
    return 0 if not found["all"]["wrong"] else 1


if __name__ == "__main__":
    sys.exit(main())
