"""`python -m benchmarks.invariance --write`: five steps of every stage on every strategy against one process.

The models are those of the tests: two layers of each family, random weights.  For each way of lying over ranks torchrun
starts once and runs all stages; the result is the largest difference of loss, gradient norm and final weights.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "invariance.json"
sys.path[:0] = [str(ROOT / "tests")]

from small import Small, make_small, metrics, steps_kept, weights  # noqa: E402

STAGES = ("sft", "reward", "prefer", "ppo", "grpo")
WAYS = [(name, ranks, 1) for name in ("ddp", "zero2", "zero2_cpu", "zero3", "gemini") for ranks in (1, 2, 4)]
WAYS += [("zero3", 2, 2), ("zero3", 4, 2)]
FAMILIES = ("llama", "gpt2", "opt", "bloom")
SPLIT_FAMILIES = ("llama", "mistral", "qwen3", "gemma3")
"""Of tensor parallel: those that transformers has a plan for."""
KEY_BIAS = ("attn.c_attn.bias", "k_proj.bias", "query_key_value.bias")
"""Softmax does not feel a bias of the keys: its gradient is 0 but for rounding, which AdamW turns into whole steps."""
COMMON: dict[str, Any] = {"tokens_per_microbatch": 60, "lr": 1e-4, "warmup": 0.0}
NUMBERS = ("loss", "policy_loss", "value_loss", "grad_norm", "critic_grad_norm", "score", "kl_ref", "margin")


def jobs() -> dict[str, tuple[str, dict[str, Any]]]:
    return {f"{stage}{end}": (stage, {**COMMON, **more}) for stage in STAGES for end, more in kinds()}


def kinds() -> list[tuple[str, dict[str, Any]]]:
    return [("", {}), ("-lora", {"lora_rank": 2})]


def alone(small: Small, folder: Path) -> None:
    """The runs of one process."""
    for name, (stage, changes) in jobs().items():
        small.run(stage, folder / name, **changes)


def on_ranks(small: Small, folder: Path, way: tuple[str, int, int]) -> None:
    strategy, ranks, tp = way
    plan = {
        "small": {key: str(x) for key, x in dataclasses.asdict(small).items()},
        "jobs": {n: (stage, {**more, "strategy": strategy, "tp": tp}) for n, (stage, more) in jobs().items()},
    }
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    script = str(ROOT / "tests" / "train" / "ddp_stages.py")
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command, str(folder / "plan.json")], env=env, capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])


def differences(one: Path, many: Path) -> dict[str, float]:
    """The largest over all steps: of numbers relative to max(1, |x|), of weights absolute."""
    found = {"loss": 0.0, "grad_norm": 0.0, "weights": 0.0, "key_bias": 0.0}
    for a, b in zip(metrics(one), metrics(many), strict=True):
        for name in NUMBERS:
            if name in a:
                kind = "grad_norm" if name.endswith("grad_norm") else "loss"
                found[kind] = max(found[kind], abs(a[name] - b[name]) / max(1.0, abs(a[name])))
    last = steps_kept(one)[-1]
    mine, others = weights(one, last), weights(many, last)
    assert mine.keys() == others.keys()
    for name, x in mine.items():
        kind = "key_bias" if name.endswith(KEY_BIAS) else "weights"
        found[kind] = max(found[kind], float((x - others[name]).abs().max()))
    return found


def measure(known: dict[str, Any], write: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family in dict.fromkeys((*FAMILIES, *SPLIT_FAMILIES)):
            small: Small | None = None
            for way in WAYS:
                key = f"{way[0]} on {way[1]}" + (f", tp {way[2]}" if way[2] > 1 else "")
                if family not in (SPLIT_FAMILIES if way[2] > 1 else FAMILIES) or family in known.get(key, {}):
                    continue
                if small is None:
                    (folder / family).mkdir()
                    small = make_small(folder / family, family)
                    alone(small, folder / family / "alone")
                there = folder / family / key.replace(" ", "-")
                on_ranks(small, there, way)
                rows = {job: differences(folder / family / "alone" / job, there / job) for job in jobs()}
                known.setdefault(key, {})[family] = rows
                worst = {
                    what: max(row[what] for row in rows.values())
                    for what in ("loss", "grad_norm", "weights", "key_bias")
                }
                print(f"{key:22} {family:8}", *(f"{what} {x:.1e}" for what, x in worst.items()), flush=True)
                if write:
                    RESULT.write_text(json.dumps(known, indent=1) + "\n")
    return known


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--write", action="store_true", help=f"keep the figures in {RESULT.relative_to(ROOT)}")
    flags.add_argument("--again", action="store_true", help="forget the figures that are there")
    given = flags.parse_args()
    known = json.loads(RESULT.read_text()) if RESULT.is_file() and not given.again else {}
    measure(known, given.write)


if __name__ == "__main__":
    main()
