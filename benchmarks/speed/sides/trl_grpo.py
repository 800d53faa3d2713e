"""TRL 1.16's GRPOTrainer, held before each step: 32 completions, generated and trained on."""

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.speed.line import Line
from benchmarks.speed.sides.trl_quiet import QUIET

ROLLOUTS = 32


class Held(TrainerCallback):
    def __init__(self, line: Line) -> None:
        self.line, self.left = line, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.left == 0:
            self.asked = self.left = self.line.job["steps"] if self.line.wait() == "run" else 1
            self.start, self.said = time.perf_counter(), 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Once a step, after it has ended."""
        if "loss" not in logs:
            return
        self.said += round(ROLLOUTS * logs["completions/mean_length"])
        self.left -= 1
        if self.left == 0:
            seconds, samples = time.perf_counter() - self.start, self.asked * ROLLOUTS
            figures = {"tokens": self.said, "samples": samples, "mean_length": self.said / samples}
            self.line.answer(seconds=seconds, **figures)


def rewards(completions: list[str], **_: Any) -> list[float]:
    """Half of the answers earn something, by their number of words."""
    return [float(len(text.split()) % 2) for text in completions]


def main() -> None:
    line = Line()
    job, folder = line.job, Path(line.folder)
    args = GRPOConfig(
        output_dir=str(folder / "out-grpo"),
        per_device_train_batch_size=ROLLOUTS,
        num_generations=8,
        max_completion_length=96,
        max_steps=1_000_000,
        learning_rate=0.0,
        lr_scheduler_type="constant",
        beta=0.0,
        gradient_checkpointing=False,
        logging_steps=1,
        bf16=job["dtype"] == "bf16",
        **QUIET,
        seed=0,
        **job["settings"],
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / job["model"], dtype=torch.float32),
        reward_funcs=rewards,
        args=args,
        train_dataset=Dataset.from_json(str(folder / "prompts.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(folder / job["model"], padding_side="left"),
        callbacks=[Held(line)],
    )
    line.ready()
    trainer.train()


if __name__ == "__main__":
    main()
