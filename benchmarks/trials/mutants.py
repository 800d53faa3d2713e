"""Runs that go on with one part of their state dropped: each must end otherwise than a run that was left alone.

Were one of them not caught, a kill would prove nothing of the part that it drops.  A run with nothing dropped is
tried beside each kind of run, and must end equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.trials import forked
from benchmarks.trials.compare import differing, digests
from benchmarks.trials.drops import (
    begins,
    cursor,
    duplicates,
    empties,
    forgets,
    generator,
    nothing,
    rate,
    reference,
    resamples,
    restarts,
    swapped,
    without,
)
from benchmarks.trials.kills import KILLED, Bench
from benchmarks.trials.world import RUN

MID_BUFFER, MID_RECORDS, LATE = "save.renamed:8:kill", "save.renamed:2:kill", "save.renamed:10:kill"
"""Ends of first lives: after three of four updates of the second round, after the fourth step, after two rounds."""
CRASHED = 1
"""A traceback: the drop itself is wrong."""
DRAW = "step.start:*:draw"
"""Nothing in a run draws from the global generators by itself; this does, once a step."""


@dataclass(frozen=True)
class Mutant:
    name: str
    variant: str
    drop: Callable[[], None]
    """Changes the process that goes on."""
    ends: str = MID_BUFFER
    fault: str = ""
    """Of the run left alone and of the first life; `DRAW` is one of the second too."""


MUTANTS = [
    Mutant("policy weights", "ppo", without("policy")),
    Mutant("policy weights (SFT)", "sft", without("policy"), MID_RECORDS),
    Mutant("LoRA adapters below merged weights", "ppo-lora-ptx", without("policy")),
    Mutant("critic weights", "ppo", without("critic")),
    Mutant("critic's head on the shared trunk", "ppo-shared", without("critic_head")),
    Mutant("moving average", "ppo", without("ema")),
    Mutant("policy optimiser", "ppo", without("optimizer")),
    Mutant("optimiser's first moments", "sft", empties("exp_avg"), MID_RECORDS),
    Mutant("optimiser's second moments", "reward", empties("exp_avg_sq"), MID_RECORDS),
    Mutant("optimiser's step count", "prefer", empties("step"), MID_RECORDS),
    Mutant("critic optimiser", "ppo", without("critic_optimizer")),
    Mutant("adaptive KL coefficient", "ppo", forgets("rl", "kl_coef"), LATE),
    Mutant("reward statistics", "ppo", forgets("rl", "scores"), LATE),
    Mutant("prompt batches taken", "grpo-dynamic", forgets("rl", "batches"), LATE),
    Mutant("rollouts still trusted", "grpo", forgets("rl", "trusted"), LATE),
    Mutant("steps left out so far", "sft", forgets("skips"), MID_RECORDS, "update.backward:2:nan"),
    Mutant("rollout buffer (sampled again)", "ppo", resamples()),
    Mutant("rollout buffer (sampled again, the place kept)", "ppo", resamples(keep_place=True)),
    Mutant("place in the rollout buffer", "ppo", begins("done", 0)),
    Mutant("what the round's updates have reported", "grpo", begins("history", [])),
    Mutant("metrics of the round", "ppo", begins("metrics", {})),
    Mutant("samples of the round", "grpo", begins("samples", [])),
    Mutant("best so far", "ppo-best", forgets("best"), LATE),
    Mutant("step and data cursor", "sft", restarts, MID_RECORDS),
    Mutant("place in the data", "reward", cursor, MID_RECORDS),
    Mutant("place in the learning-rate schedule", "prefer", rate, MID_RECORDS),
    Mutant("length of the logs", "sft", duplicates, "step.logged:5:kill"),
    Mutant("reference (the weights as they are now)", "ppo", reference),
    Mutant("reference's identity (another in its folder)", "grpo", swapped),
    Mutant("python's generator", "sft", generator("python"), MID_RECORDS, DRAW),
    Mutant("numpy's generator", "sft", generator("numpy"), MID_RECORDS, DRAW),
    Mutant("torch's generator", "sft", generator("torch"), MID_RECORDS, DRAW),
]


def tried(bench: Bench, mutant: Mutant, *, control: bool) -> dict[str, Any]:
    """A first life that ends at a known place, and one that goes on with the drop, or with none as a control."""
    recipe = bench.recipe(mutant.variant, save_behind=False)
    wanted = alone(bench, mutant)
    home, log = bench.home("mutant"), bench.folder / "mutant.log"
    first = ",".join(filter(None, (mutant.fault, mutant.ends)))
    died = forked.run(forked.command(home, *recipe, fault=first), log)
    if died.code != KILLED:
        raise RuntimeError(f"{mutant.name}: {first} did not end {mutant.variant}: {died.code}\n{died.said[-2000:]}")
    still = DRAW if mutant.fault == DRAW else ""
    drop = nothing if control else mutant.drop
    ended = forked.run(forked.command(home, *recipe, fault=still, before=drop), log)
    if ended.code == CRASHED:
        raise RuntimeError(f"{mutant.name}: {ended.said[-3000:]}")
    different = differing(wanted, digests(home / RUN))
    caught = f"exit {ended.code}" if ended.code else told(different) if different else ""
    row = {"name": mutant.name, "variant": mutant.variant, "control": control, "caught": caught}
    return row if bool(caught) != control else row | {"said": ended.said[-1500:]}


def alone(bench: Bench, mutant: Mutant) -> dict[str, str]:
    key = f"{mutant.variant} {mutant.fault}"
    if key not in bench.alone:
        home = bench.home("mutant-alone")
        work = forked.command(home, *bench.recipe(mutant.variant, save_behind=False), fault=mutant.fault)
        ended = forked.run(work, bench.folder / "mutant.log")
        if ended.code:
            raise RuntimeError(f"{key}: exit {ended.code}\n{ended.said[-2000:]}")
        bench.alone[key] = digests(home / RUN)
    return bench.alone[key]


def told(different: list[str]) -> str:
    """Logs by name, files of checkpoints by their number."""
    logs = [name for name in different if "/" not in name]
    files = len(different) - len(logs)
    return ", ".join([*logs, *([f"{files} files of checkpoints"] if files else [])])


def jobs(bench: Bench) -> list[Callable[[], dict[str, Any]]]:
    kinds = {(mutant.variant, mutant.ends, mutant.fault): mutant for mutant in MUTANTS}
    controls = [partial(tried, bench, mutant, control=True) for mutant in kinds.values()]
    return [*controls, *(partial(tried, bench, mutant, control=False) for mutant in MUTANTS)]


def right(row: dict[str, Any]) -> bool:
    return bool(row["caught"]) != row["control"]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    mutants = [row for row in rows if not row["control"]]
    return {
        "mutants": len(mutants),
        "caught": sum(map(right, mutants)),
        "controls": len(rows) - len(mutants),
        "controls_equal": sum(right(row) for row in rows if row["control"]),
    }
