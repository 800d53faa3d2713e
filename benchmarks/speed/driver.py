"""Runs the sides of a contest in turn, one at a time, and reads rows from what they answer."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any, Protocol

from benchmarks import peers
from benchmarks.speed.contests import MEMORY, SECONDS, Contest, Row, Side

ROOT = Path(__file__).resolve().parents[2]
REST_S = 0.5
"""Between two sides: threads of the one that has worked spin for a moment before they sleep."""
LIMIT_S = 900
"""Longest wait for an answer."""
WITHIN = 0.01
"""How far apart the figures may be that say whether two sides do the same work."""


class Failed(Exception):
    """A side could not be run."""


class Player(Protocol):
    def ask(self, command: str) -> dict[str, Any]: ...

    def end(self) -> None: ...


def command(side: Side, folder: Path) -> list[str]:
    return [peers.python(side.peer), "-m", f"benchmarks.speed.sides.{side.script}", str(folder), json.dumps(side.job)]


class Child:
    """A side in a process of its own, ready to work."""

    def __init__(self, side: Side, folder: Path, log: Path) -> None:
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command(side, folder),
                env=peers.environment(side.peer) | {"OMP_NUM_THREADS": str(os.cpu_count())},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
            )
        self.versions: dict[str, str] = self.read()["versions"]

    def ask(self, command: str) -> dict[str, Any]:
        writing: IO[str] = self.process.stdin  # type: ignore[assignment]
        try:
            writing.write(f"{command}\n")
            writing.flush()
        except BrokenPipeError:
            raise self.failed() from None
        return self.read()

    def read(self) -> dict[str, Any]:
        """Its next answer: a line at a time, so that nothing waits in the pipe's buffer."""
        reading: IO[str] = self.process.stdout  # type: ignore[assignment]
        if not select.select([reading], [], [], LIMIT_S)[0]:
            self.process.kill()
            self.end()
            raise Failed(f"no answer within {LIMIT_S} s")
        line = reading.readline()
        if not line:
            raise self.failed()
        found: dict[str, Any] = json.loads(line)
        return found

    def failed(self) -> Failed:
        self.end()
        told = self.log.read_text(errors="replace").strip().splitlines()
        return Failed(next((line for line in reversed(told) if "Error" in line), told[-1] if told else "no word"))

    def end(self) -> None:
        """The child leaves when its commands end."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Played:
    """What a contest showed, by side: figures of the warm-up, of every round, and why a side is missing."""

    warm: dict[str, dict[str, Any]] = field(default_factory=dict)
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    def peak_mb(self, side: str) -> float:
        return float(max(answer["peak_mb"] for answer in self.rounds[side]))


def play(
    sides: Mapping[str, Side], start: Callable[[str, Side], Player], rounds: int, say: Callable[[str], None]
) -> Played:
    """Each side is started and warmed up, then all work in turn, `rounds` times.  A side that fails drops out."""
    found, players = Played(), dict[str, Player]()

    def tried(name: str, what: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return what()
        except Failed as fault:
            found.failed[name] = str(fault)
            players.pop(name, None)
            found.rounds.pop(name, None)
            say(f"    {name}: could not be run: {fault}")
            return None

    def opening(name: str) -> dict[str, Any]:
        players[name] = start(name, sides[name])
        found.versions[name] = getattr(players[name], "versions", {})
        return players[name].ask("warm")

    try:
        for name in sides:
            if (answer := tried(name, lambda name=name: opening(name))) is not None:  # type: ignore[misc]
                found.warm[name], found.rounds[name] = answer, []
        for number in range(rounds):
            for name in list(players):
                time.sleep(REST_S)
                answer = tried(name, lambda name=name: players[name].ask("run"))  # type: ignore[misc]
                if answer is not None:
                    found.rounds[name].append(answer)
                    say(f"    round {number + 1}, {name}: {told(answer)}")
    finally:
        for player in players.values():
            player.end()
    return found


def told(answer: Mapping[str, Any]) -> str:
    rate = f", {answer['tokens'] / answer['seconds']:.0f} tokens/s" if answer.get("tokens") else ""
    return f"{answer['seconds']:.2f} s{rate}, peak {answer['peak_mb']:.0f} MB"


def value(answer: Mapping[str, Any], measure: str) -> float:
    if measure == SECONDS:
        return float(answer["seconds"])
    if measure == MEMORY:
        return float(answer["peak_mb"])
    return float(answer[measure.removesuffix("/s")] / answer["seconds"])


def differences(contest: Contest, played: Played) -> list[str]:
    """Where two sides did not do the same work."""
    found = []
    for figure, names in contest.alike.items():
        known = {name: played.warm[name][figure] for name in names if name in played.rounds}
        if known and max(known.values()) - min(known.values()) > WITHIN * abs(max(known.values())):
            found.append(f"{figure}: " + ", ".join(f"{name} {x:.5g}" for name, x in known.items()))
    return found


def read_row(row: Row, contest: Contest, played: Played) -> dict[str, Any]:
    """The row's figures as they are saved; a row that could not be measured says why."""
    found: dict[str, Any] = {"work": row.work, "contest": row.contest, "measure": row.measure}
    found |= {"floor": row.floor, "aim": row.aim, "higher_is_better": row.higher_is_better}
    there = [name for name in row.peers if played.rounds.get(name)]
    if not played.rounds.get(row.ours) or not there:
        missing = [row.ours] if not played.rounds.get(row.ours) else list(row.peers)
        reasons = [f"{contest.sides[name].title}: {played.failed.get(name, 'was not run')}" for name in missing]
        return found | {"failed": "; ".join(reasons)}
    if apart := differences(contest, played):
        return found | {"failed": f"the sides did not do the same work: {'; '.join(apart)}"}
    sign = 1 if row.higher_is_better else -1
    ours = [value(answer, row.measure) for answer in played.rounds[row.ours]]
    rates = {name: [value(answer, row.measure) for answer in played.rounds[name]] for name in there}
    best = max(there, key=lambda name: sign * median(rates[name]))
    if row.measure == MEMORY:  # a peak of the whole process: rounds do not repeat it
        ours, rates = [max(ours)], {name: [max(x)] for name, x in rates.items()}
    ratios = [a / b for a, b in zip(ours, rates[best], strict=True)]
    return found | {
        "ours": {"title": contest.sides[row.ours].title, "value": median(ours), "peak_mb": played.peak_mb(row.ours)},
        "peer": {
            "title": contest.sides[best].title,
            "value": median(rates[best]),
            "peak_mb": played.peak_mb(best),
        },
        "other_peers": {contest.sides[name].title: median(rates[name]) for name in there if name != best},
        "ratio": median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def one_line(name: str, row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return f"{name}: could not be run: {row['failed']}"
    spread = f"{row['ratio']:.2f} ({row['least']:.2f}..{row['most']:.2f})"
    sign = ">=" if row["higher_is_better"] else "<="
    sides = f"{row['ours']['value']:.4g} / {row['peer']['value']:.4g} {row['measure']} ({row['peer']['title']})"
    return f"{name}: {spread}, asked {sign} {row['floor']:g}, aim {row['aim']:g}; {sides}"


def sides_of(rows: Iterable[Row], contest: Contest) -> dict[str, Side]:
    """Those that the rows need, in the contest's order: ours first."""
    wanted = {name for row in rows for name in (row.ours, *row.peers)}
    return {name: side for name, side in contest.sides.items() if name in wanted}


def write_material(folder: Path) -> None:
    """In a process of its own: this one never loads torch, so that no child begins with its memory."""
    command: Sequence[str] = [sys.executable, "-m", "benchmarks.speed.material", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
