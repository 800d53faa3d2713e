"""TRL 1.16's losses on given tensors: each trainer's own loss method, run on a trainer that was never initialised.

`FOLDER` holds `losses.json` (cases: kind, and what the trainer's attributes are), `losses.safetensors` (tensors) and
gets `losses-found.safetensors`: by case the loss and its gradient.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

Tensors = dict[str, Tensor]


class Answering(nn.Module):
    """Stands where a trainer expects its model: gives the prepared tensors."""

    is_gradient_checkpointing = False

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)


def trainer(kind: type, model: nn.Module, **attributes: Any) -> Any:
    """One of the kind with these attributes; `args` becomes a namespace."""
    made = kind.__new__(kind)
    made.model, made.accelerator = model, Accelerator(cpu=True)
    made._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    made._total_train_tokens, made._tp_size, made.aux_loss_enabled = 0, 1, False
    made.args = SimpleNamespace(gradient_checkpointing_kwargs=None, **attributes.pop("args", {}))
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def reward(x: Tensors, leaf: Tensor, settings: dict[str, Any]) -> Tensor:
    model = Answering(lambda **_: SimpleNamespace(logits=leaf[:, None]))
    made = trainer(RewardTrainer, model, args={"center_rewards_coefficient": None})
    return made.compute_loss(model, {"attention_mask": torch.ones(len(leaf), 1)})


def fused(logp: Tensor, x: Tensors) -> SimpleNamespace:
    """What TRL's fused head returns; only the log-probabilities and their sums of squares matter."""
    zeros = torch.zeros_like(logp)
    return SimpleNamespace(
        log_probs=logp, log_sum_sq_probs=x["log_sum_sq"], entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def dpo(x: Tensors, leaf: Tensor, settings: dict[str, Any]) -> Tensor:
    policy = Answering(lambda **_: fused(leaf * x["mask"], x))
    usual = {
        "loss_weights": [1.0] * len(settings["loss_types"]),
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
        "precompute_ref_logps": False,
        "ref_model": Answering(lambda **_: fused(x["ref_logp"] * x["mask"], x)),
    }
    made = trainer(DPOTrainer, policy, **usual | settings)
    whole = nn.functional.pad(x["mask"], (1, 0)).long()
    inputs = {"input_ids": x["tokens"], "attention_mask": torch.ones_like(x["tokens"]), "completion_mask": whole}
    return made._compute_loss(policy, inputs, False)


def kto(x: Tensors, leaf: Tensor, settings: dict[str, Any]) -> Tensor:
    mixed = x["tokens"].flip(0)

    def answers(own: Tensor, other: Tensor) -> Callable[..., Any]:
        return lambda input_ids, **_: fused((other if input_ids is mixed else own) * x["mask"], x)

    policy = Answering(answers(leaf, x["mixed_logp"]))
    usual = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "precompute_ref_logps": False}
    reference = Answering(answers(x["ref_logp"], x["mixed_ref_logp"]))
    known = {"ref_model": reference, "calculate_KL": settings["loss_type"] == "kto"}
    made = trainer(KTOTrainer, policy, **usual | known | settings)
    ones, whole = torch.ones_like(x["tokens"]), nn.functional.pad(x["mask"], (1, 0)).long()
    inputs = {"input_ids": x["tokens"], "attention_mask": ones, "completion_mask": whole, "label": x["good"]}
    kl = {"KL_input_ids": mixed, "KL_attention_mask": ones, "KL_completion_mask": whole}
    return made._compute_loss(policy, inputs | kl, False)


def reference_free(kind: type) -> Callable[[Tensors, Tensor, dict[str, Any]], Tensor]:
    """ORPO's and CPO's trainers, from logits: they sum and average log-probabilities themselves."""

    def loss(x: Tensors, leaf: Tensor, settings: dict[str, Any]) -> Tensor:
        model = Answering(lambda *_, **__: SimpleNamespace(logits=leaf))
        usual = {"beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "alpha": 0.0}
        fixed = {"is_encoder_decoder": False, "padding_value": 0, "pad_token_id": 0}
        made = trainer(kind, model, **usual | fixed | settings)
        answer = nn.functional.pad(x["mask"], (1, 0))
        columns = {
            "input_ids": x["tokens"],
            "attention_mask": x["real"].long(),
            "labels": x["tokens"].masked_fill(~answer, -100),
        }
        sides = {name: x.chunk(2) for name, x in columns.items()}
        batch = {
            f"{side}_{name}": both[i] for i, side in enumerate(("chosen", "rejected")) for name, both in sides.items()
        }
        return made.get_batch_loss_metrics(model, batch)[0]

    return loss


def policy_inputs(x: Tensors) -> Tensors:
    """A prompt of one token and the answer."""
    ones = torch.ones(len(x["mask"]), 1, dtype=torch.long)
    completion = {"completion_ids": x["mask"].long(), "completion_mask": x["mask"].long()}
    return {"prompt_ids": ones, "prompt_mask": ones, **completion, "advantages": x["advantages"]}


def grpo(x: Tensors, leaf: Tensor, settings: dict[str, Any]) -> Tensor:
    usual = {
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": leaf.shape[1],
    }
    arguments = {"use_bias_correction_kl": True, "delta": None, "steps_per_generation": 1}
    arguments |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05} | settings.pop("args", {})
    made = trainer(GRPOTrainer, Answering(lambda: None), **usual | settings, args=arguments)
    made._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, torch.zeros_like(leaf), None)
    known = {"old_per_token_logps": x["old_logp"], "ref_per_token_logps": x["ref_logp"]}
    return made._compute_loss(made.model, {**policy_inputs(x), **known, "num_items_in_batch": x["mask"].sum()})


def rloo(x: Tensors, leaf: Tensor, settings: dict[str, Any]) -> Tensor:
    made = trainer(RLOOTrainer, Answering(lambda: None), epsilon_low=0.2, epsilon_high=0.2, **settings)
    made._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, torch.zeros_like(leaf), None)
    return made._compute_loss(made.model, {**policy_inputs(x), "old_logps": (x["old_logp"] * x["mask"]).sum(1)})


KINDS = {
    "reward": reward,
    "dpo": dpo,
    "kto": kto,
    "orpo": reference_free(ORPOTrainer),
    "cpo": reference_free(CPOTrainer),
    "grpo": grpo,
    "rloo": rloo,
}


def main(folder: Path) -> None:
    cases, tensors = json.loads((folder / "losses.json").read_text()), load_file(folder / "losses.safetensors")
    found: Tensors = {}
    for number, case in enumerate(cases):
        prefix = case["tensors"] + "/"
        x = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        leaf = x[case["leaf"]].clone().requires_grad_()
        loss = KINDS[case["kind"]](x, leaf, case["theirs"])
        loss.backward()
        found |= {f"{number}/value": loss.detach().reshape(()), f"{number}/grad": leaf.grad}
    save_file({key: x.clone().contiguous() for key, x in found.items()}, folder / "losses-found.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
