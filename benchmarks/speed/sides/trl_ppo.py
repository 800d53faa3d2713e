"""TRL 1.12.0's PPOTrainer, its own `train` held before each round of 32 rollouts and four epochs over them."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.speed.line import Line
from benchmarks.speed.sides.trl_quiet import QUIET

ROLLOUTS = 32


class Held(TrainerCallback):
    def __init__(self, line: Line, length: int) -> None:
        self.line, self.length, self.start = line, length, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.line.wait()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """No completion ends early: the model never says the end token."""
        seconds, told = time.perf_counter() - self.start, state.log_history[-1]["val/num_eos_tokens"]
        assert told == 0, f"{told} end tokens"
        self.line.answer(seconds=seconds, tokens=ROLLOUTS * self.length, samples=ROLLOUTS, mean_length=self.length)
        self.line.wait()
        self.start = time.perf_counter()


def main() -> None:
    line = Line()
    job, folder = line.job, Path(line.folder)
    auto = {"policy": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}
    source = {"policy": folder / "tiny", "reward": folder / "tiny-reward"}
    models = [auto[kind].from_pretrained(source[kind], dtype=torch.float32) for kind in ("policy", "reward") * 2]
    args = PPOConfig(
        output_dir=str(folder / "out-ppo"),
        per_device_train_batch_size=job["minibatch"],
        gradient_accumulation_steps=ROLLOUTS // job["minibatch"] // job["updates"],
        num_mini_batches=job["updates"],
        num_ppo_epochs=4,
        total_episodes=ROLLOUTS * 100_000,
        local_rollout_forward_batch_size=job["forward"],
        response_length=job["length"],
        learning_rate=0.0,
        num_sample_generations=0,
        bf16=False,
        gradient_checkpointing=False,
        stop_token="eos",
        **QUIET,
        seed=0,
    )
    prompts = json.loads((folder / "data.json").read_text())["prompts"][:ROLLOUTS]
    trainer = PPOTrainer(
        args=args,
        processing_class=AutoTokenizer.from_pretrained(folder / "tiny", padding_side="left"),
        model=models[0],
        ref_model=models[2],
        reward_model=models[1],
        value_model=models[3],
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[:1]}),
        callbacks=[Held(line, job["length"])],
    )
    line.ready()
    trainer.train()


if __name__ == "__main__":
    main()
