"""TRL 1.16's SFT, reward and DPO trainers on token batches, their own `train` held before each piece of work.

`order` sorted: rows sorted by length before they are cut into batches, as `group_by_length` makes them.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.speed.line import Line
from benchmarks.speed.material import text
from benchmarks.speed.sides.trl_quiet import QUIET

BATCH = 8
KINDS = {"sft": (SFTTrainer, SFTConfig), "reward": (RewardTrainer, RewardConfig), "dpo": (DPOTrainer, DPOConfig)}


class Held(TrainerCallback):
    """Waits for a command where a step begins, and answers it where the last of its steps ends."""

    def __init__(self, line: Line, tokens: list[int]) -> None:
        self.line, self.tokens = line, tokens
        self.left, self.steps, self.start = 0, 0, 0.0
        self.logged: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.left == 0:
            self.steps = len(self.tokens) if self.line.wait() == "run" else 1
            self.left, self.start, self.logged = self.steps, time.perf_counter(), []
            self.first = state.global_step % len(self.tokens)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Once a step, after it has ended."""
        if "loss" not in logs:
            return
        self.logged.append(logs)
        self.left -= 1
        if self.left == 0:
            count = len(self.tokens)
            done = [self.tokens[(self.first + i) % count] for i in range(self.steps)]
            self.line.answer(
                seconds=time.perf_counter() - self.start,
                tokens=sum(done),
                samples=BATCH * self.steps,
                first_loss=self.logged[0]["loss"],
                first_norm=self.logged[0]["grad_norm"],
            )


def records(kind: str, rows: list[Any], order: str) -> tuple[list[dict[str, Any]], list[int]]:
    """What the trainer reads, and real tokens of each row.  DPO reads text alone, and adds the end token itself."""
    sides = ("chosen", "rejected")
    if kind == "sft":
        found, lengths = [{"input_ids": row} for row in rows], [len(row) for row in rows]
    else:
        lengths = [sum(len(row["prompt"]) + len(row[side]) for side in sides) for row in rows]
        if kind == "reward":
            found = [{f"{side}_ids": row["prompt"] + row[side] for side in sides} for row in rows]
        else:
            found = [{"prompt": text(row["prompt"]) + " "} | {x: text(row[x][:-1]) for x in sides} for row in rows]
    if order == "sorted":
        places = sorted(range(len(rows)), key=lambda i: -lengths[i])
        found, lengths = [found[i] for i in places], [lengths[i] for i in places]
    return found, lengths


def main() -> None:
    line = Line()
    job, folder = line.job, Path(line.folder)
    trainer_of, config_of = KINDS[job["kind"]]
    rows = json.loads((folder / "data.json").read_text())[job["data"]][: job["rows"]]
    found, lengths = records(job["kind"], rows, job["order"])
    tokens = [sum(lengths[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    args = config_of(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=BATCH,
        max_steps=1_000_000,
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        bf16=job["dtype"] == "bf16",
        **QUIET,
        **job["settings"],
    )
    auto = AutoModelForSequenceClassification if job["kind"] == "reward" else AutoModelForCausalLM
    trainer = trainer_of(
        model=auto.from_pretrained(folder / job["model"], dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(found),
        processing_class=AutoTokenizer.from_pretrained(folder / job["model"]),
        callbacks=[Held(line, tokens)],
    )
    line.ready()
    trainer.train()


if __name__ == "__main__":
    main()
