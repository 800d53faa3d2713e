"""Kills: a run that dies by signal 9 at a named point, is started again, and must end as one that was left alone.

The faults of a trial are those of its lives, one after another; the last life has none.  What is compared are all
checkpoints that stayed, file by file, and the logs.
"""

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.trials import forked
from benchmarks.trials.compare import differing, digests
from benchmarks.trials.world import OF_STAGE, RUN, VARIANTS, make_world, write_recipe

KILLED = -9
SAVE_SHARE = 0.56
TWICE_EVERY = 6
ONCE = ("run.start", "resume.read")
"""Points that a process comes to once; to the second only if it goes on from a checkpoint."""


@dataclass(frozen=True)
class Trial:
    variant: str
    faults: tuple[str, ...]


@dataclass
class Bench:
    """A folder of the world and of the runs that were left alone, one of each variant."""

    folder: Path
    alone: dict[str, dict[str, str]] = field(default_factory=dict)
    counts: dict[str, Mapping[str, int]] = field(default_factory=dict)
    lasted: dict[str, float] = field(default_factory=dict)
    """Seconds of those runs."""

    @staticmethod
    def make(folder: Path) -> "Bench":
        forked.warm()
        ended = forked.run(lambda: make_world(folder) or 0, folder / "world.log")
        if ended.code:
            raise RuntimeError(ended.said)
        return Bench(folder)

    def home(self, name: str) -> Path:
        """A new folder to start a run in."""
        home = self.folder / name
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        return home

    def recipe(self, variant: str, **more: Any) -> tuple[str, str]:
        """Stage and recipe of a run."""
        name = "-".join([variant, *(f"{key}={value}" for key, value in more.items())])
        path = self.folder / f"{name}.toml"
        if not path.is_file():
            write_recipe(path, self.folder, variant, **more)
        return VARIANTS[variant].stage, str(path)

    def left_alone(self, variant: str) -> dict[str, str]:
        """What the run that nobody disturbs leaves; it also counts how often each point is reached."""
        if variant not in self.alone:
            home, seen = self.home(f"{variant}-alone"), self.folder / f"{variant}.points"
            work = forked.command(home, *self.recipe(variant), seen=seen)
            ended = forked.run(work, self.folder / "alone.log")
            if ended.code:
                raise RuntimeError(f"{variant}: exit {ended.code}\n{ended.said[-3000:]}")
            self.alone[variant], self.counts[variant] = digests(home / RUN), forked.counts(seen)
            self.lasted[variant] = ended.seconds
        return self.alone[variant]

    def step_s(self, variant: str) -> float:
        """At most the longest step of such a run, with its checkpoint."""
        return self.lasted[variant] / max(1, self.counts[variant].get("step.start", 1))


def variants_of(stage: str) -> list[str]:
    return [name for name, variant in VARIANTS.items() if variant.stage == stage]


def plan(bench: Bench, stage: str, each: int, seed: int, *, most: int) -> list[Trial]:
    """`each` trials of a stage: the points in turn, the moment by chance, its first so many variants in turn."""
    dice, variants = random.Random(f"{seed}/{stage}"), variants_of(stage)[:most]
    for variant in variants:
        bench.left_alone(variant)
    seen = Counter[str]()
    for variant in variants:
        seen.update(bench.counts[variant])
    saving = sorted(point for point in seen if point.startswith("save."))
    others = sorted({*seen} - {*saving} | {"resume.read"})
    saves = round(SAVE_SHARE * each)
    points = [*turns(saving, saves, dice), *turns(others, each - saves, dice)]
    found = []
    for number, point in enumerate(points):
        fitting = [name for name in variants if bench.counts[name].get(point) or point == "resume.read"]
        variant = fitting[number % len(fitting)]
        again = number % TWICE_EVERY == 0 and point != "resume.read"
        found.append(Trial(variant, tuple(fault_of(bench, variant, point, dice, again))))
    return found


def turns(points: Sequence[str], number: int, dice: random.Random) -> list[str]:
    """So many points, each as often as any other; those that are left over by chance."""
    whole, left = divmod(number, len(points)) if points else (0, 0)
    return [*points] * whole + dice.sample(points, left)


def fault_of(bench: Bench, variant: str, point: str, dice: random.Random, again: bool) -> Iterator[str]:
    counts = bench.counts[variant]
    if point == "resume.read":  # the first life must come far enough to leave something to go on from
        late = "step.start"
        yield f"{late}:{dice.randint(1 + counts[late] // 2, counts[late])}:kill"
        yield f"{point}:1:kill"
        return
    yield f"{point}:{dice.randint(1, counts[point])}:kill"
    if again:
        other = dice.choice([name for name in counts if name not in ONCE])
        yield f"{other}:{dice.randint(1, max(1, counts[other] // 3))}:kill"


def tried(bench: Bench, trial: Trial, number: int) -> dict[str, Any]:
    """One trial in a folder of its own, which is deleted where nothing is wrong with it."""
    wanted, home = bench.left_alone(trial.variant), bench.home(f"trial-{number}")
    arguments, log = bench.recipe(trial.variant), bench.folder / f"trial-{number}.log"
    began, died = time.monotonic(), []
    for fault in trial.faults:
        ended = forked.run(forked.command(home, *arguments, fault=fault), log)
        died.append(ended.code)
        if ended.code != KILLED:
            break
    if died[-1] == KILLED:
        ended = forked.run(forked.command(home, *arguments), log)
    different = differing(wanted, digests(home / RUN))
    found = {
        "variant": trial.variant,
        "faults": list(trial.faults),
        "died": died,  # exit codes of the lives that a fault should end
        "code": ended.code,
        "different": different,
        "resumed": "goes on" in ended.said,
        "seconds": round(time.monotonic() - began, 2),
    }
    if not right(found):
        return found | {"said": ended.said[-1500:]}
    shutil.rmtree(home)
    return found


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of a campaign: by stage and in all."""
    deaths = [
        (VARIANTS[row["variant"]].stage, fault.split(":")[0])
        for row in results
        for fault, code in zip(row["faults"], row["died"], strict=False)
        if code == KILLED
    ]
    points = Counter(point for _, point in deaths)
    return {
        "trials": len(results),
        "kills": len(deaths),
        "by_stage": dict(Counter(stage for stage, _ in deaths)),
        "inside_a_write": sum(point.startswith("save.") for _, point in deaths),
        "resumed": sum(row["resumed"] for row in results),
        "lost": sum(row["code"] != 0 for row in results),
        "different": sum(row["code"] == 0 and bool(row["different"]) for row in results),
        "not_killed": sum(row["died"][0] != KILLED for row in results),
        "points": dict(sorted(points.items())),
    }


def jobs(bench: Bench, each: int, seed: int, *, most: int = 99) -> list[Callable[[], dict[str, Any]]]:
    """Those of a stage are planned once the first of them begins: a plan needs runs that were left alone."""
    plans: dict[str, list[Trial]] = {}

    def job(stage: str, number: int) -> dict[str, Any]:
        if stage not in plans:
            plans[stage] = plan(bench, stage, each, seed, most=most)
        return tried(bench, plans[stage][number], number)

    return [partial(job, stage, number) for stage in OF_STAGE for number in range(each)]


def right(row: Mapping[str, Any]) -> bool:
    return row["code"] == 0 and not row["different"]
