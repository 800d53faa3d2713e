"""The planner's bytes against those of live tensors, over stages, families, strategies and ways to save memory.

    python -m benchmarks.plan_check                     # every case, a process each (about 5 minutes)
    python -m benchmarks.plan_check --only ppo          # those whose name contains it
    python -m benchmarks.plan_check --out FILE          # and saves the figures as JSON

Every row of a case has the same number of tokens, so that nothing is guessed but the memory.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

LENGTH, NEW, WORDS = 128, 64, 3000
PEAK_BOUND, STANDING_BOUND = 0.10, 0.05
STANDING = ("standing_planned", "standing_measured", "standing_error")
FAMILIES = {"llama": "llama-tiny", "gpt2": "gpt2-tiny", "opt": "opt-tiny", "bloom": "bloom-tiny"}


@dataclass(frozen=True)
class Case:
    stage: str
    family: str = "llama"
    strategy: str = "naive"
    ranks: int = 1
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = [f"{key}={value}" for key, value in self.changes.items()]
        return " ".join([self.stage, self.family, f"{self.strategy}x{self.ranks}", *words])


def cases() -> list[Case]:
    stages = ("sft", "reward", "prefer", "ppo", "grpo")
    found = [Case(stage, family) for stage in stages for family in FAMILIES]
    for stage in stages:
        found.append(Case(stage, changes={"gradient_checkpointing": True}))
        found.append(Case(stage, changes={"dtype": "bf16"}))
        found.append(Case(stage, changes={"lora_rank": 8}))
        found.append(Case(stage, strategy="ddp", ranks=2))
    for strategy in ("zero2", "zero2_cpu", "zero3", "gemini"):
        found.append(Case("sft", strategy=strategy, ranks=2))
        found.append(Case("ppo", strategy=strategy, ranks=2))
    found += [
        Case("sft", "gpt2", "zero3", 2, {"dtype": "bf16"}),
        Case("reward", "opt", "zero3", 2),
        Case("prefer", "bloom", "zero3", 2),
        Case("grpo", "llama", "zero3", 2, {"engine_weights": "sharded"}),
        Case("sft", "llama", "zero3", 2, {"lora_rank": 8, "gradient_checkpointing": True}),
        Case("sft", changes={"tokens_per_microbatch": 4096}),
        Case("sft", changes={"tokens_per_microbatch": 256}),
        Case("sft", "gpt2", changes={"dtype": "bf16", "gradient_checkpointing": True}),
        Case("ppo", changes={"backbone": "shared"}),
        Case("grpo", changes={"ema_decay": 0.9}),
    ]
    return found


def settings(case: Case, folder: Path, output: Path) -> Any:
    """The stage's config over data whose rows all have LENGTH tokens."""
    from kinkajou import config

    kinds = {
        "sft": config.SFTConfig,
        "reward": config.RewardConfig,
        "prefer": config.PreferConfig,
        "ppo": config.PPOConfig,
        "grpo": config.GRPOConfig,
    }
    common = {
        "model": FAMILIES[case.family],
        "tokenizer": str(folder / "tokenizer"),
        "output": str(output),
        "template": "plain",
        "max_len": LENGTH,
        "tokens_per_microbatch": 1024,
        "strategy": case.strategy,
        "preflight": "off",
        "overwrite": True,
    }
    records = {"data": str(folder / f"{case.stage}.jsonl"), "batch_size": 16, "epochs": 1}
    answers = {"prompts": str(folder / "prompts.jsonl"), "steps": 2, "max_new_tokens": NEW, "reward": "rule:ended"}
    own: dict[str, dict[str, Any]] = {
        "sft": records,
        "reward": {**records, "batch_size": 8},
        "prefer": {**records, "batch_size": 8},
        "ppo": {**answers, "prompts_per_step": 16, "minibatch_size": 16},
        "grpo": {**answers, "prompts_per_step": 4, "group_size": 4, "minibatch_size": 16},
    }
    return grouped(kinds[case.stage], {**common, **own[case.stage], **case.changes})


def grouped(kind: type[Any], flat: dict[str, Any]) -> Any:
    given: dict[str, Any] = {}
    left = dict(flat)
    for item in dataclasses.fields(kind):
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            names = [inner.name for inner in dataclasses.fields(item.type)]
            given[item.name] = item.type(**{name: left.pop(name) for name in names if name in left})
    return kind(**given, **left)


def write_data(folder: Path) -> None:
    """Records longer than LENGTH, which are cut to it, and prompts that leave just room for the answer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("w0", "<pad>", "<end>", *(f"w{i}" for i in range(3, WORDS))))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0", pad_token="<pad>", eos_token="<end>")
    made.save_pretrained(str(folder / "tokenizer"))
    dice = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{dice.randint(3, WORDS - 1)}" for _ in range(count))

    def rows(name: str, count: int, **lengths: int) -> None:
        lines = [json.dumps({key: words(length) for key, length in lengths.items()}) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))

    rows("sft", 48, instruction=4, output=2 * LENGTH)
    rows("reward", 24, prompt=LENGTH, chosen=NEW, rejected=NEW)
    rows("prefer", 24, prompt=4, chosen=2 * LENGTH, rejected=2 * LENGTH)
    rows("prompts", 48, prompt=LENGTH - NEW)


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """In this process, which is one of the case's ranks."""
    import torch

    from benchmarks.plan_measured import measured
    from kinkajou.plan.job import SHARDED
    from kinkajou.plan.memory import memory_of
    from kinkajou.train import STARTERS, grpo, ppo, preference, reward, sft  # noqa: F401  # all of one state of the code
    from kinkajou.train.plan_job import job_of

    torch.set_num_threads(1)
    cfg = settings(case, folder, folder / "run")
    with contextlib.redirect_stdout(io.StringIO()):
        found = measured(lambda: STARTERS[case.stage](cfg), sharded=case.strategy in SHARDED)  # type: ignore[operator]
    plan = memory_of(job_of(cfg, ranks=case.ranks, gpu=False, vocabulary=WORDS))
    # Device and host are one memory here; the peak of each may belong to another phase.
    planned = max(sum(phase.device.values()) + sum(phase.host.values()) for phase in (plan.standing, *plan.phases))
    standing = plan.standing.on_device + plan.standing.on_host
    phases = {phase.name: phase.on_device + phase.on_host for phase in plan.phases}
    parts = {name: round(size) for name, size in plan.device_owner.device.items()}
    return {
        "name": case.name,
        "planned": planned,
        "measured": found.peak,
        "error": planned / found.peak - 1,
        "standing_planned": standing,
        "standing_measured": found.standing,
        "standing_error": standing / found.standing - 1,
        "owner": plan.device_owner.name,
        "phases_planned": phases,
        "phases_measured": found.phases,
        "parts": parts,
    }


def start(numbers: Sequence[int], folder: Path) -> Iterator[dict[str, Any]]:
    """The cases, all on as many ranks, one after the other in processes of their own; the first rank's figures."""
    ranks, port = cases()[numbers[0]].ranks, free_port()
    started = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if ranks > 1 else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **own}
        given = ["--cases", *map(str, numbers), "--folder", str(folder)]
        command = [sys.executable, "-m", "benchmarks.plan_check", *given]
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        started.append(subprocess.Popen(command, env=environment, stdout=out, text=True))
    assert started[0].stdout
    for line in started[0].stdout:
        if line.startswith("{"):
            yield json.loads(line)
    if any(process.wait(60) for process in started):
        raise SystemExit(f"a case failed: {[cases()[number].name for number in numbers]}")


def groups(only: str) -> list[list[int]]:
    """Cases of one process together; those of several ranks by themselves."""
    chosen = [(number, case) for number, case in enumerate(cases()) if only in case.name]
    alone = [number for number, case in sorted(chosen, key=lambda x: x[1].stage in ("ppo", "grpo")) if case.ranks == 1]
    return [*([alone] if alone else []), *([number] for number, case in chosen if case.ranks > 1)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def told(row: dict[str, Any]) -> str:
    held = abs(row["error"]) <= PEAK_BOUND and abs(row["standing_error"]) <= STANDING_BOUND
    pairs = []
    for planned, found, error in (("planned", "measured", "error"), STANDING):
        mib = f"{row[planned] / 2**20:>7.1f} / {row[found] / 2**20:>7.1f} MiB"
        pairs.append(f"{mib} {row[error]:>+7.1%}")
    return f"{row['name']:<58} peak {pairs[0]}   standing {pairs[1]}  {'ok' if held else 'MISSES'}"


def main() -> None:
    options = argparse.ArgumentParser(description="Plan against measurement.")
    options.add_argument("--only", default="")
    options.add_argument("--out", type=Path)
    options.add_argument("--cases", type=int, nargs="+")
    options.add_argument("--folder", type=Path)
    options.add_argument("--detail", action="store_true", help="also every phase and part")
    given = options.parse_args()
    if given.cases:
        for number in given.cases:
            print(json.dumps(run_case(cases()[number], given.folder)), flush=True)
        return
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        for row in chain.from_iterable(start(numbers, folder) for numbers in groups(given.only)):
            found.append(row)
            if given.out:
                given.out.write_text(json.dumps(found, indent=1) + "\n")
            print(told(row), flush=True)
            if given.detail:
                print("   ", row["phases_planned"], row["phases_measured"])
                print("   ", row["parts"], flush=True)


if __name__ == "__main__":
    main()
