"""`python -m benchmarks.speed.first_step_trl FOLDER OUTPUT`: SFT as a user's script has it, up to its first step."""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Written(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"step": state.global_step}) + "\n")


def main() -> None:
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    data = load_dataset("json", data_files=str(folder / "chats.jsonl"), split="train", cache_dir=str(folder / "cache"))
    trainer = SFTTrainer(
        model=str(folder / "tiny"),
        args=SFTConfig(
            output_dir=str(output),
            per_device_train_batch_size=8,
            num_train_epochs=1,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            bf16=False,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=data.rename_columns({"instruction": "prompt", "output": "completion"}),
        callbacks=[Written(output / "metrics.jsonl")],
    )
    trainer.train()


if __name__ == "__main__":
    main()
