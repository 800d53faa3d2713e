"""What runs leave behind is for everybody: each folder of a checkpoint opens in transformers without a warning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from small import Small
from stranger import opened

CAUSAL, SCORING = AutoModelForCausalLM, AutoModelForSequenceClassification
PPO = {"steps": 2, "ema_decay": 0.5}


def last(run: Path) -> Path:
    (folder,) = (run / "checkpoints").glob("step-*")
    return folder


@pytest.mark.parametrize("backbone", ["separate", "shared"])
@pytest.mark.parametrize("lora", [0, 2])
def test_policy_average_and_critic_of_ppo(backbone: str, lora: int, small: Small, tmp_path: Path) -> None:
    small.run("ppo", tmp_path / "run", **PPO, backbone=backbone, lora_rank=lora)
    folder = last(tmp_path / "run")
    policy, average, critic = opened(CAUSAL, folder), opened(CAUSAL, folder / "ema"), opened(SCORING, folder / "critic")
    own, mean = policy.state_dict(), average.state_dict()
    assert any(not torch.equal(own[name], mean[name]) for name in own)
    trunk = critic.model.state_dict()
    assert all(torch.equal(x, own[f"model.{name}"]) for name, x in trunk.items()) == (backbone == "shared")
    assert critic.score.weight.abs().max() > 0
    assert (folder / "manifest.json").is_file()
    for place in (folder, folder / "ema", folder / "critic"):
        assert AutoTokenizer.from_pretrained(place).eos_token == "<end>"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [AutoTokenizer.from_pretrained(folder).eos_token_id]


def test_a_shared_critic_on_an_adapter(small: Small, tmp_path: Path) -> None:
    small.run("ppo", tmp_path / "run", **PPO, backbone="shared", lora_rank=2, lora_save="adapter")
    folder = last(tmp_path / "run")
    opened(CAUSAL, folder)
    critic = SCORING.from_pretrained(folder / "critic", num_labels=1)
    kept = load_file(folder / "state" / "critic_head.safetensors")["score.weight"]
    assert any(torch.equal(x, kept) for name, x in critic.state_dict().items() if "score" in name)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize(
    ("stage", "auto"), [("sft", CAUSAL), ("prefer", CAUSAL), ("reward", SCORING), ("grpo", CAUSAL)]
)
def test_models_of_the_other_stages(stage: str, auto: Any, lora: int, small: Small, tmp_path: Path) -> None:
    small.run(stage, tmp_path / "run", lora_rank=lora, **({"steps": 1} if stage == "grpo" else {}))
    opened(auto, last(tmp_path / "run"))
