"""The same seed twice gives the same bytes, and another seed other ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.trials import forked
from benchmarks.trials.compare import differing, digests
from benchmarks.trials.kills import Bench
from benchmarks.trials.world import RUN, STAGES


def twice(bench: Bench, stage: str, seed: int) -> dict[str, Any]:
    found = []
    for name in ("one", "other"):
        home = bench.home(f"seed-{name}")
        ended = forked.run(forked.command(home, *bench.recipe(stage, seed=seed)), bench.folder / "seed.log")
        if ended.code:
            raise RuntimeError(f"{stage}, seed {seed}: exit {ended.code}\n{ended.said[-2000:]}")
        found.append(digests(home / RUN))
    return {"stage": stage, "seed": seed, "different": differing(*found), "metrics": found[0]["metrics.jsonl"]}


def jobs(bench: Bench) -> list[Callable[[], dict[str, Any]]]:
    return [partial(twice, bench, stage, seed) for stage in STAGES for seed in (1, 2, 3)]


def right(row: dict[str, Any]) -> bool:
    return not row["different"]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pairs": len(rows),
        "equal": sum(map(right, rows)),
        "different_seeds": len({(row["stage"], row["metrics"]) for row in rows}),
    }
