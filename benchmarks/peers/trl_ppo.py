"""TRL 1.12.0's PPOTrainer over whole rollout batches, its own code driven and watched.

`FOLDER` holds models (policy, reference, critic, reward), `ppo.json` (settings by case, prompts) and gets
`ppo.safetensors`: what `train` had computed when it began its updates, and each minibatch's weights, losses, gradients.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

BATCH = ("query_responses", "responses", "postprocessed_responses", "sequence_lengths", "padding_mask")
BATCH += ("logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns")


def main(folder: Path) -> None:
    job = json.loads((folder / "ppo.json").read_text())
    found: dict[str, Tensor] = {}
    for name, settings in job["cases"].items():
        found |= {f"{name}/{key}": x for key, x in one_batch(folder, settings, job["prompts"]).items()}
    save_file({key: x.detach().clone().contiguous() for key, x in found.items()}, folder / "ppo.safetensors")


def one_batch(folder: Path, settings: dict[str, Any], prompts: list[list[int]]) -> dict[str, Tensor]:
    trainer = make_trainer(folder, settings, prompts)
    found: dict[str, Tensor] = {}
    permutation, backward = np.random.permutation, trainer.accelerator.backward

    def at_epoch(count: int) -> Any:
        frame = sys._getframe(1)
        if not found:
            found.update({key: frame.f_locals[key] for key in BATCH})
            found["context"] = torch.tensor(frame.f_locals["context_length"])
        return permutation(count)

    def at_minibatch(loss: Tensor) -> None:
        number = sum(key.endswith("/loss") for key in found)
        found.update({f"{number}/{key}": x for key, x in watched(sys._getframe(1), loss, trainer, backward).items()})

    np.random.permutation, trainer.accelerator.backward = at_epoch, at_minibatch
    try:
        trainer.train()
    finally:
        np.random.permutation = permutation
    return found


def watched(
    frame: FrameType, loss: Tensor, trainer: PPOTrainer, backward: Callable[[Tensor], None]
) -> dict[str, Tensor]:
    """One minibatch: its rows, the weights before it, losses, and gradients of log-probabilities, values, weights."""
    names = frame.f_locals
    wanted = {"logp": names["new_logprobs"], "values": names["vpred"]}
    for x in wanted.values():
        x.retain_grad()
    before = {f"weight/{name}": x.detach().clone() for name, x in trainer.model.named_parameters()}
    backward(loss)
    return {
        **before,
        "rows": torch.as_tensor(names["micro_batch_inds"]),
        "loss": loss,
        "policy_loss": names["pg_loss"],
        "value_loss": names["vf_loss"],
        "policy_size": names["pg_loss_max"].abs().sum() / (~names["padding_mask"][names["micro_batch_inds"]]).sum(),
        **{name: x.detach() for name, x in wanted.items()},
        **{f"grad/{name}": x.grad for name, x in wanted.items()},
        **{f"grad/{name}": x.grad.clone() for name, x in trainer.model.named_parameters() if x.grad is not None},
    }


def make_trainer(folder: Path, settings: dict[str, Any], prompts: list[list[int]]) -> PPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    language = {name: AutoModelForCausalLM.from_pretrained(folder / name) for name in ("policy", "reference")}
    scalar = {name: AutoModelForSequenceClassification.from_pretrained(folder / name) for name in ("critic", "reward")}
    args = PPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=len(prompts),
        gradient_accumulation_steps=1,
        total_episodes=len(prompts),
        local_rollout_forward_batch_size=len(prompts),
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        stop_token="eos",
        disable_tqdm=True,
        **settings,
    )
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=language["policy"],
        ref_model=language["reference"],
        reward_model=scalar["reward"],
        value_model=scalar["critic"],
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
