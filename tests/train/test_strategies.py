"""Sharded strategies and tensor parallel train the same model as one process, and hold what they promise."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from kinkajou.errors import UserError
from kinkajou.models.adapters import merged_weights
from kinkajou.models.load import LoadOptions, load_language_model, load_scalar_model
from merged import merged
from small import Small, metrics, steps_kept, weights
from tiny import save_source, tiny_tokenizer
from train.test_ddp import torchrun

# A micro-batch of 40 tokens: ranks have different numbers of them, and make the same number of passes.
COMMON: dict[str, Any] = {"tokens_per_microbatch": 40, "lr": 1e-4, "warmup": 0.0}
HELD: dict[str, Any] = {"eval_share": 0.1, "batch_size": 6, "epochs": 0.84}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero3-sft": ("sft", {**HELD, "save_state": True}),
    "zero3-ppo": ("ppo", {"missing_end_penalty": 0.5, "save_state": True, "eval_every": 2}),
    "zero3-shared": ("ppo", {"backbone": "shared", "ema_decay": 0.9, "lora_rank": 2, "gradient_checkpointing": True}),
    "zero3-sampling": ("grpo", {"engine_weights": "sharded", "steps": 3}),
    "zero3-prefer": ("prefer", {**HELD, "use_weighting": True, "loss": ("dpo", "0.3*sft")}),
    "zero2-reward": ("reward", {**HELD, "lora_rank": 2, "lora_save": "adapter"}),
    "zero2_cpu-kto": ("prefer", {**HELD, "loss": ("kto",), "epochs": 0.42}),
    "gemini-sft": ("sft", {**HELD, "device_share": 0.5, "lora_rank": 2}),
    "zero3-split": ("sft", {"tp": 2, "lora_rank": 2, "batch_size": 5, "epochs": 0.5}),
    "zero3-split-ppo": ("ppo", {"tp": 2, "steps": 2}),
    # Norms of heads, which LoRA freezes: each rank sees a part of the heads.
    "zero3-split-norms": ("sft", {"tp": 2, "lora_rank": 2, "epochs": 0.5, "model": "qwen3"}),
    "zero3-split-norms-all": ("sft", {"tp": 2, "epochs": 0.5, "model": "qwen3"}),
}


def changes_of(name: str, small: Small) -> dict[str, Any]:
    changes = {**COMMON, **JOBS[name][1]}
    if "model" in changes:
        changes["model"] = str(source(small.folder, changes["model"]))
    return {**changes, "eval_prompts": small.held_out} if "eval_every" in changes else changes


@pytest.fixture(scope="module")
def on_two(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with every job's run on two ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    jobs: dict[str, Any] = {
        name: (JOBS[name][0], {**changes_of(name, small), "strategy": name.partition("-")[0]}) for name in JOBS
    }
    jobs["half"] = ("sft", {**COMMON, "dtype": "bf16", "strategy": "zero3"})
    # The loss overflows on one of the ranks alone: both must hear of it.
    jobs["broken"] = ("sft", {**COMMON, "lr": 1e30, "max_norm": 1e30, "strategy": "zero3"})
    jobs["odd-heads"] = (
        "sft",
        {"strategy": "zero3", "tp": 2, "model": str(source(folder, "llama", num_key_value_heads=1))},
    )
    jobs["no-plan"] = ("sft", {"strategy": "zero3", "tp": 2, "model": "gpt2-tiny", "tokenizer": small.policy})
    plan = {"small": {k: str(v) for k, v in dataclasses.asdict(small).items()}, "jobs": jobs}
    (folder / "plan.json").write_text(json.dumps(plan))
    done = torchrun([str(Path(__file__).with_name("ddp_stages.py")), str(folder / "plan.json")], cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def source(folder: Path, family: str, **changes: object) -> Path:
    """A model of that family, of its own sizes."""
    place = folder / "-".join([family, *changes])
    if not place.exists():
        save_source(place, AutoModelForCausalLM, family, tiny_tokenizer(), **changes)
    return place


def alone(name: str, small: Small, folder: Path) -> Path:
    changes = {
        key: x for key, x in changes_of(name, small).items() if key not in ("tp", "device_share", "engine_weights")
    }
    small.run(JOBS[name][0], folder, **changes)
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_equal_one_process(name: str, small: Small, on_two: Path, tmp_path: Path) -> None:
    one, many = alone(name, small, tmp_path / "run"), on_two / name
    assert len(metrics(one)) == len(metrics(many)) >= 2
    for a, b in zip(metrics(one), metrics(many), strict=True):
        assert b.pop("explained_variance", 0) == pytest.approx(a.pop("explained_variance", 0), rel=1e-3, abs=1e-3)
        assert b == pytest.approx(a, abs=1e-5, rel=1e-5)
    last = steps_kept(one)[-1]
    assert steps_kept(many) == steps_kept(one)
    kept, other = (folder / "checkpoints" / f"step-{last:06d}" for folder in (one, many))
    compared = names_of(kept)
    assert names_of(other) == compared
    assert compared
    for name in compared:
        mine, theirs = tensors_of(kept, name), tensors_of(other, name)
        assert mine.keys() == theirs.keys(), name
        for key, x in mine.items():
            torch.testing.assert_close(theirs[key], x, atol=1e-5, rtol=1e-4)


def names_of(folder: Path) -> set[str]:
    """Safetensors files, those of several processes by their common name."""
    found = (str(path.relative_to(folder)).removesuffix(".safetensors") for path in folder.rglob("*.safetensors"))
    return {re.sub(r"-\d{5}-of-\d{5}$", "", name) for name in found}


def tensors_of(folder: Path, name: str) -> dict[str, Tensor]:
    """Whole tensors, put together from where their parts say that they begin."""
    whole: dict[str, Tensor] = {}
    for path in [*folder.glob(f"{name}.safetensors"), *sorted(folder.glob(f"{name}-?????-of-?????.safetensors"))]:
        with safe_open(path, framework="pt") as file:
            places = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for key in file.keys():  # noqa: SIM118
                part = file.get_tensor(key)
                begins = places[key]["saved_offsets"] if key in places else [0] * part.dim()
                size = [a + b for a, b in zip(begins, part.shape, strict=True)]
                before = whole.get(key, part.new_zeros(size))
                grown = part.new_zeros([max(a, b) for a, b in zip(before.shape, size, strict=True)])
                grown[tuple(slice(n) for n in before.shape)] = before
                grown[tuple(slice(a, b) for a, b in zip(begins, size, strict=True))] = part
                whole[key] = grown
    return whole


def test_bfloat16_with_sums_in_float32(small: Small, on_two: Path, tmp_path: Path) -> None:
    """Gathered in bf16, summed and stepped in float32: near the float32 run, and not equal to it."""
    exact = small.run("sft", tmp_path / "run", **COMMON)
    near = metrics(on_two / "half")
    assert [row["loss"] for row in near] == pytest.approx([row["loss"] for row in exact], rel=5e-3)
    assert [row["loss"] for row in near] != pytest.approx([row["loss"] for row in exact], rel=1e-7)
    kept = weights(on_two / "half", 5)
    assert {x.dtype for x in kept.values()} == {torch.float32}
    assert any(not torch.equal(x.bfloat16().float(), x) for x in kept.values())


def test_what_is_not_finite_is_told_by_all(on_two: Path) -> None:
    assert "the step is not finite" in (on_two / "broken.refused").read_text()


@pytest.mark.parametrize(
    ("name", "words"), [("odd-heads", "num_key_value_heads"), ("no-plan", "gpt2 models have no plan")]
)
def test_a_model_that_cannot_be_split_is_refused(name: str, words: str, on_two: Path) -> None:
    assert words in (on_two / f"{name}.refused").read_text()


@pytest.mark.parametrize("strategy", ["zero2", "zero2_cpu", "zero3", "gemini"])
def test_sharding_needs_torchrun(strategy: str, small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torchrun"):
        small.run("sft", tmp_path / "run", strategy=strategy)


@pytest.mark.parametrize("kind", ["language", "scalar"])
def test_adapters_folded_by_name_are_those_that_peft_folds(kind: str, small: Small) -> None:
    options = LoadOptions(lora_rank=3, lora_alpha=5.0)
    load = load_language_model if kind == "language" else load_scalar_model
    model = load(small.policy if kind == "language" else small.judge, tiny_tokenizer(), options)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(generator=torch.Generator().manual_seed(7))
    folded = merged_weights(model.module, model.module.state_dict())
    expected = merged(model.module).state_dict()
    assert folded.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(folded[name], x, atol=1e-6, rtol=1e-6)
