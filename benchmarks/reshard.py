"""`python -m benchmarks.reshard --stage ppo --write`: runs that go on under another strategy and number of processes.

Each way of lying over processes makes a run that is stopped by SIGTERM (PPO and GRPO in the middle of a round); each
other one goes on from its checkpoint.  Measured is how far metrics and final weights are from a run of one process that
was never stopped.  Figures go to benchmarks/results/reshard.json.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "reshard.json"
sys.path[:0] = [str(ROOT / "tests")]

from kinkajou import faults  # noqa: E402
from kinkajou.checkpoint.place import Place  # noqa: E402
from kinkajou.train.signals import Stopped  # noqa: E402
from small import Small, make_small, metrics, weights  # noqa: E402

COMMON: dict[str, Any] = {"tokens_per_microbatch": 60, "lr": 1e-4, "warmup": 0.0}
ROLLED = {"kl_coef": 0.05, "kl_target": 0.5, "epochs": 2, "ema_decay": 0.9}
STAGES: dict[str, tuple[dict[str, Any], str]] = {
    "sft": ({"epochs": 1}, "update.after_step:3:term@0"),
    "ppo": ({**ROLLED, "missing_end_penalty": 0.5}, "update.after_step:9:term@0"),
    "grpo": (ROLLED, "update.after_step:7:term@0"),
}
"""Settings, and where the run is stopped."""
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "naive": (1, {}),
    "ddp on 2": (2, {"strategy": "ddp"}),
    "zero3 on 2": (2, {"strategy": "zero3"}),
    "tp 2": (2, {"strategy": "zero3", "tp": 2}),
    "zero2 on 4": (4, {"strategy": "zero2"}),
    "zero3 on 4, tp 2": (4, {"strategy": "zero3", "tp": 2}),
}
NUMBERS = ("loss", "policy_loss", "value_loss", "grad_norm", "critic_grad_norm", "score", "kl_ref")
Jobs = dict[str, tuple[Any, ...]]


def places(folder: Path) -> list[Place]:
    return sorted(filter(None, (Place.of(path.name) for path in (folder / "checkpoints").iterdir())))


def named(way: str) -> str:
    return way.replace(" ", "-").replace(",", "")


def run_jobs(small: Small, folder: Path, ranks: int, jobs: Jobs) -> None:
    if ranks == 1:
        for name, (stage, changes, *armed) in jobs.items():
            faults.arm(*armed or [""])
            try:
                small.run(stage, folder / name, **changes)
            except Stopped as fault:
                print(fault)
        faults.arm("")
        return
    plan = {"small": {key: str(x) for key, x in dataclasses.asdict(small).items()}, "jobs": jobs}
    (folder / "plan.json").write_text(json.dumps(plan))
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(ROOT / "tests" / "train" / "ddp_stages.py"), str(folder / "plan.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])


def distance(one: Path, many: Path) -> dict[str, float]:
    """Largest relative difference of a metric and largest absolute one of a weight; infinite where a run fell short."""
    mine, theirs, last = metrics(one), metrics(many), places(one)[-1].step
    if len(mine) != len(theirs) or places(many)[-1] != Place(last):
        return {"metrics": math.inf, "weights": math.inf}
    pairs = [(a[name], b[name]) for a, b in zip(mine, theirs, strict=True) for name in NUMBERS if name in a]
    kept, other = weights(one, last), weights(many, last)
    return {
        "metrics": max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs),
        "weights": max(float((kept[name] - other[name]).abs().max()) for name in kept),
    }


def measured(stage: str, small: Small, folder: Path) -> dict[str, Any]:
    """By way that was stopped and way that went on."""
    changes, stop = STAGES[stage]
    settings = {**COMMON, **changes}
    run_jobs(small, folder, 1, {"whole": (stage, settings)})
    worlds = sorted({ranks for ranks, _ in WAYS.values()})
    for ranks in worlds:
        own = {way: more for way, (n, more) in WAYS.items() if n == ranks}
        run_jobs(small, folder, ranks, {named(w): (stage, {**settings, **more}, stop) for w, more in own.items()})
    left = {way: folder / named(way) / "checkpoints" / places(folder / named(way))[-1].name for way in WAYS}
    for ranks in worlds:
        jobs: Jobs = {}
        for way, (n, more) in WAYS.items():
            for source in WAYS if n == ranks else ():
                name = f"{named(source)}--{named(way)}"
                jobs[name] = (stage, {**settings, **more, "resume": str(left[source])})
        run_jobs(small, folder, ranks, jobs)
    pairs = {f"{a} -> {b}": folder / f"{named(a)}--{named(b)}" for a in WAYS for b in WAYS}
    found = {name: distance(folder / "whole", path) for name, path in pairs.items()}
    return {"stopped_at": {way: path.name for way, path in left.items()}, "pairs": found}


def table(results: dict[str, Any]) -> str:
    lines = ["| stage | pairs | metrics, largest relative | weights, largest absolute |", "|---|---|---|---|"]
    for stage, found in results.items():
        worst = {key: max(pair[key] for pair in found["pairs"].values()) for key in ("metrics", "weights")}
        lines.append(f"| {stage} | {len(found['pairs'])} | {worst['metrics']:.1e} | {worst['weights']:.1e} |")
    return "\n".join(lines)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--stage", nargs="+", default=list(STAGES), choices=list(STAGES))
    flags.add_argument("--write", action="store_true", help="keep the figures beside those that are there")
    given = flags.parse_args()
    results: dict[str, Any] = json.loads(RESULT.read_text()) if given.write and RESULT.is_file() else {}
    for stage in given.stage:
        with tempfile.TemporaryDirectory(prefix="kinkajou-reshard-") as name:
            results[stage] = measured(stage, make_small(Path(name)), Path(name))
        if given.write:
            RESULT.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    worst = max(max(pair.values()) for stage in given.stage for pair in results[stage]["pairs"].values())
    return 0 if worst <= 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
