"""TRL 1.16's GRPO and RLOO trainers over a rollout batch whose tokens and scores are given.

`FOLDER` holds models (policy, reference), `rollouts.json` (settings by case, prompts, answers), `rollouts.safetensors`
(scores, the engine's log-probabilities) and gets `rollouts-found.safetensors`: what the trainer hands to its update.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

KINDS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def main(folder: Path) -> None:
    job, given = json.loads((folder / "rollouts.json").read_text()), load_file(folder / "rollouts.safetensors")
    found: dict[str, Tensor] = {}
    for name, case in job["cases"].items():
        output = one_batch(folder, case, job, given)
        found |= {f"{name}/{key}": x for key, x in output.items() if isinstance(x, Tensor)}
    save_file({key: x.clone().contiguous() for key, x in found.items()}, folder / "rollouts-found.safetensors")


def one_batch(folder: Path, case: dict[str, Any], job: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Any]:
    trainer_of, settings_of = KINDS[case["kind"]]
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    answers: list[list[int]] = job["answers"]
    args = settings_of(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=len(answers),
        num_generations=job["group"],
        num_iterations=2,  # so that the old log-probabilities are computed and handed on
        gradient_accumulation_steps=1,
        max_completion_length=job["longest"],
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **case["settings"],
    )
    trainer = trainer_of(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        reward_funcs=lambda prompts, **_: given["scores"].tolist(),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["w2"] * len(answers)}),
        processing_class=tokenizer,
    )
    if args.beta:
        trainer.ref_model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder / "reference").state_dict())
    rows = [x[: len(answer)].tolist() for x, answer in zip(given["sampler_logp"], answers, strict=True)]
    texts = ["w2"] * len(answers)
    extra = (None, texts, rows, {}, None, []) if case["kind"] == "grpo" else (texts,)
    trainer._generate = lambda prompts: (job["prompts"], answers, *extra)
    for name, value in case.get("attributes", {}).items():  # vLLM's correction without a vLLM
        setattr(trainer, name, value)
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": "w2"} for _ in answers])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
