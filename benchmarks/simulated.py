"""Simulated steps of models that no machine here holds: who fits, by which setting, what travels.

    python -m benchmarks.simulated                     # prints what is asked and what has been found
    python -m benchmarks.simulated --only NAME --write # simulates the cases whose name begins so, keeps the rows
    python -m benchmarks.simulated --write             # all that have no row yet

Rows lie in benchmarks/results/simulated.json.  A case is a stage, models of plan/architecture.py's table, ranks with
80 GB each and the setting that is tried first; kinkajou.train.simulated does the rest.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.line import versions
from benchmarks.speed.record import commit, machine
from kinkajou import config
from kinkajou.plan.architecture import NAMED
from kinkajou.plan.simulate import Change, Simulation, as_row, lines, settings_of
from kinkajou.train.simulated import Cluster, Stage, search, simulate

KEPT = Path(__file__).parent / "results" / "simulated.json"
MEMORY = 80.0 * 2**30


@dataclass(frozen=True)
class Case:
    """`flags` are the setting that is tried first; what does not fit is changed step by step where `look` says so."""

    name: str
    stage: str
    model: str
    ranks: int
    flags: dict[str, Any]
    length: int = 1024
    rows: int = 1
    """Rows of a rank in an optimiser step."""
    scorer: str | None = None
    look: bool = False


def cases() -> list[Case]:
    zero3 = {"strategy": "zero3", "gradient_checkpointing": True, "tokens_per_microbatch": 2048}
    zero2 = zero3 | {"strategy": "zero2"}
    found = [
        Case("65b-ppo-64", "ppo", "llama-65b", 64, zero2, rows=4, scorer="llama-65b", look=True),
        Case("65b-ppo-64-small-critic", "ppo", "llama-65b", 64, zero3, rows=4, scorer="llama-7b"),
        Case("175b-sft-128", "sft", "bloom-175b", 128, zero2, length=2048, rows=2, look=True),
        Case("65b-sft-1024", "sft", "llama-65b", 1024, zero3, length=2048, rows=2),
        Case("65b-sft-64-tp8", "sft", "llama-65b", 64, zero3 | {"tp": 8}, length=2048, rows=2),
    ]
    for stage in ("sft", "reward", "prefer", "ppo", "grpo"):
        found.append(Case(f"7b-{stage}-8", stage, "llama-7b", 8, zero3, rows=4))
    found += [Case(f"table-{name}-8", "sft", name, 8, zero3, rows=2) for name in NAMED]
    return found


def settings(case: Case) -> Stage:
    """The stage's config; what a step reads of data is its sizes alone."""
    flags = dict(case.flags)
    parallel = config.ParallelConfig(**{name: flags.pop(name) for name in ("strategy", "tp") if name in flags})
    budget = flags.pop("tokens_per_microbatch")
    base = config.ModelConfig(model=case.model, max_len=case.length, dtype="bf16", **flags)
    run, batch = config.RunConfig(output="-"), case.rows * case.ranks // parallel.tp
    if case.stage in ("sft", "reward", "prefer"):
        kind = {"sft": config.SFTConfig, "reward": config.RewardConfig, "prefer": config.PreferConfig}[case.stage]
        optim = config.OptimConfig(tokens_per_microbatch=budget)
        made: Any = kind(
            base=base, source=config.DataConfig(data="-"), optim=optim, parallel=parallel, run=run, batch_size=batch
        )
        return made
    rl = {"base": base, "parallel": parallel, "run": run, "optim": config.RLOptimConfig(tokens_per_microbatch=budget)}
    rl["judge"] = config.JudgeConfig(reward=("model:-",))
    new = case.length // 2
    if case.stage == "ppo":
        rollout = config.RolloutConfig(prompts="-", prompts_per_step=batch, max_new_tokens=new)
        return config.PPOConfig(rollout=rollout, algo=config.PPOAlgorithm(minibatch_size=batch), **rl)
    group = 8
    rollout = config.RolloutConfig(prompts="-", prompts_per_step=max(1, batch // group), max_new_tokens=new)
    return config.GRPOConfig(rollout=rollout, algo=config.GRPOAlgorithm(minibatch_size=batch, group_size=group), **rl)


def simulated(case: Case) -> list[tuple[Change, Simulation]]:
    cfg, policy = settings(case), settings_of(NAMED[case.model])
    scorer = settings_of(NAMED[case.scorer]) if case.scorer else None
    if case.look:
        return search(cfg, policy, Cluster(case.ranks, MEMORY), scorer=scorer)
    return [(Change(), simulate(cfg, policy, Cluster(case.ranks, MEMORY), scorer=scorer))]


def row_of(case: Case, change: Change, found: Simulation) -> dict[str, Any]:
    about = {"case": case.name, "stage": case.stage, "model": case.model, "scorer": case.scorer}
    return about | {
        "rows_of_a_rank": case.rows,
        "fits": found.fits(MEMORY),
        **as_row(change, found),
        "commit": commit(),
    }


def kept() -> dict[str, Any]:
    if KEPT.is_file():
        found: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
        return found
    return {"kind": "simulated", "memory": MEMORY, "rows": []}


def main(arguments: Sequence[str]) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks.simulated", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--only", default="", metavar="NAME", help="the cases whose names begin so, again")
    made.add_argument("--write", action="store_true", help=f"simulate, and keep the rows in {KEPT.name}")
    chosen = made.parse_args(arguments)
    known = {row["case"] for row in kept()["rows"]}
    for case in cases():
        wanted = case.name.startswith(chosen.only) and (bool(chosen.only) or case.name not in known)
        if not chosen.write or not wanted:
            if not chosen.write:
                print(f"{case.name:28} {'kept' if case.name in known else 'not simulated yet'}")
            continue
        found = simulated(case)
        for change, one in found:
            print(f"{case.name}\n" + "\n".join(lines(change, one, MEMORY)))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = kept() | {"when": now, "machine": machine(), "versions": versions()}
        others = [row for row in record["rows"] if row["case"] != case.name]
        record["rows"] = others + [row_of(case, change, one) for change, one in found]
        KEPT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
