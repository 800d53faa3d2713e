"""One side of `benchmarks/gpu_trl.py`: `python -m benchmarks.gpu_sides KIND FOLDER JOB` prints its figures at the end.

TRL's sides import it from the folder that the parent puts on the path; times lie between ends of optimiser steps, so
the first step, which warms up, does not count.
"""

import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from benchmarks.growth_points import peak_bytes
from kinkajou import config
from kinkajou.train import STARTERS

RATE = 1e-12
"""Learning rate: the work is the same, and answers do not change their length."""


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in pairwise(self.ends)]


def common(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "bf16": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": job["device"] == "cpu",
        "disable_tqdm": True,
    }


def trl_sft(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """A step is all rows: eight micro-batches and more of `batch` rows each, packed to `most` tokens or padded."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    total, batch, clock = sum(map(len, job["rows"])), job["batch"], Clock()
    rows = -(-total // job["most"]) if job["packed"] else len(job["rows"])
    args = SFTConfig(
        **common(folder, job),
        max_length=job["most"],
        packing=job["packed"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=max(1, rows // batch),
        max_steps=job["steps"] + 1,
        train_sampling_strategy="sequential",
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list([{"input_ids": row} for row in job["rows"]]),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        callbacks=[clock],
    )
    trainer.train()
    step_rows = min(batch * args.gradient_accumulation_steps, len(trainer.train_dataset))
    tokens = total * step_rows / len(trainer.train_dataset)
    return {"seconds": clock.seconds, "tokens_per_s": tokens / median(clock.seconds)}


def prompts_of(folder: Path) -> list[str]:
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def trl_grpo(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    clock = Clock()
    args = GRPOConfig(
        **common(folder, job),
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=job["samples"] // job["batch"],
        num_generations=job["group"],
        max_completion_length=job["new"],
        beta=0.0,
        max_steps=job["steps"] + 1,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32),
        args=args,
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32),
        reward_processing_classes=AutoTokenizer.from_pretrained(folder / "reward"),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts_of(folder)]),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy", padding_side="left"),
        callbacks=[clock],
    )
    trainer.train()
    return {"seconds": clock.seconds}


def trl_ppo(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    clock = Clock()
    words = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    args = PPOConfig(
        **common(folder, job),
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=job["samples"] // job["batch"],
        local_rollout_forward_batch_size=job["batch"],
        num_mini_batches=1,
        num_ppo_epochs=4,
        total_episodes=job["samples"] * (job["steps"] + 1),
        response_length=job["new"],
        num_sample_generations=0,
        stop_token="eos",
    )
    scalar = [
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32) for _ in range(2)
    ]
    language = [AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32) for _ in range(2)]
    trainer = PPOTrainer(
        args=args,
        processing_class=words,
        model=language[0],
        ref_model=language[1],
        reward_model=scalar[0],
        value_model=scalar[1],
        train_dataset=Dataset.from_dict({"input_ids": [words(prompt)["input_ids"] for prompt in prompts_of(folder)]}),
        callbacks=[clock],
    )
    trainer.train()
    return {"seconds": clock.seconds}


def ours(kind: str, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The trainer as users start it; the times are those of its own record."""
    algo: dict[str, Any] = {"steps": job["steps"] + 1, "minibatch_size": job["samples"]}
    if kind == "grpo":
        algo |= {"group_size": job["group"], "epochs": 1}
    else:
        algo |= {"epochs": 4}
    shapes = {"grpo": (config.GRPOConfig, config.GRPOAlgorithm), "ppo": (config.PPOConfig, config.PPOAlgorithm)}
    config_of, algorithm_of = shapes[kind]
    model = {"model": str(folder / "policy"), "dtype": "bf16", "template": "plain", "max_len": job["most"]}
    prompts = job["samples"] // (job["group"] if kind == "grpo" else 1)
    cfg = config_of(
        base=config.ModelConfig(**model),
        rollout=config.RolloutConfig(
            prompts=str(folder / "prompts.jsonl"), prompts_per_step=prompts, max_new_tokens=job["new"]
        ),
        judge=config.JudgeConfig(reward=(str(folder / "reward"),)),
        algo=algorithm_of(**algo),
        kl=config.KLConfig(kl_coef=0.0 if kind == "grpo" else 0.05),
        optim=config.RLOptimConfig(lr=RATE, tokens_per_microbatch=job["most"] * job["batch"]),
        run=config.RunConfig(output=str(folder / "run"), preflight="off"),
    )
    STARTERS[kind](cfg)
    rows = [json.loads(line) for line in (folder / "run" / "timing.jsonl").read_text().splitlines()]
    ends = [row["time_s"] for row in rows if row["step"]]
    return {"seconds": [b - a for a, b in pairwise(ends)]}


KINDS: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "trl-sft": trl_sft,
    "trl-grpo": trl_grpo,
    "trl-ppo": trl_ppo,
    "ours-grpo": lambda folder, job: ours("grpo", folder, job),
    "ours-ppo": lambda folder, job: ours("ppo", folder, job),
}


def main() -> None:
    kind, folder, job = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    found = KINDS[kind](folder, job)
    peak = torch.cuda.max_memory_allocated() if job["device"] == "cuda" else peak_bytes()
    print("\n" + json.dumps(found | {"peak_gib": peak / 2**30}), flush=True)


if __name__ == "__main__":
    main()
