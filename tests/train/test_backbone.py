"""One backbone for policy, reference, critic and reward model: LoRA, `--backbone shared`, an adapter as reward."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kinkajou.models.backbone import BackboneScorer, shares_backbone
from kinkajou.train import ppo
from small import Small

ONE = {"backbone": "shared", "lora_rank": 2, "lr": 1e-2, "steps": 3, "warmup": 0.0, "save_every": 3}


def judge_of(small: Small, folder: Path, save: str) -> str:
    small.run("reward", folder, lora_rank=3, lora_save=save, lr=1e-2, seed=4)
    return str(folder)


def parts_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    kept: list[Any] = []
    real = ppo.load_parts
    monkeypatch.setattr(ppo, "load_parts", lambda *given: kept.append(real(*given)) or kept[-1])
    return kept


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_on_one_backbone_is_the_run_with_a_reward_model_of_its_own(
    dtype: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, whole = (judge_of(small, tmp_path / save, save) for save in ("adapter", "merged"))
    kept = parts_of(monkeypatch)
    got = small.run("ppo", tmp_path / "one", **ONE, reward=adapter, dtype=dtype, lora_save="adapter")
    want = small.run("ppo", tmp_path / "two", **ONE, reward=whole, dtype=dtype, lora_save="adapter")
    one, two = (made.judge.terms[0].judge.model for made in kept)
    assert isinstance(one, BackboneScorer)
    assert not isinstance(two, BackboneScorer)
    # In bf16 a folded-in adapter is rounded with its weight: the same answers are judged in the first step only.
    steps, close = (3, 1e-4) if dtype == "fp32" else (1, 0.02)
    for a, b in zip(got[:steps], want[:steps], strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=close)
    if dtype == "fp32":
        assert [row["kl_ref"] for row in got] == pytest.approx([row["kl_ref"] for row in want], abs=1e-3)
    saved = tmp_path / "one" / "checkpoints" / "step-000003"
    names = load_file(saved / "adapter_model.safetensors")
    assert names
    assert not any("reward" in name or "score" in name for name in names)
    assert not (saved / "reward0").exists()


def test_the_reward_models_adapter_is_frozen_and_the_policys_is_trained(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = judge_of(small, tmp_path / "judge", "adapter")
    kept = parts_of(monkeypatch)
    small.run("ppo", tmp_path / "run", **ONE, reward=adapter)
    params = dict(kept[0].language.module.named_parameters())
    stored = load_file(next((tmp_path / "judge" / "checkpoints").glob("*")) / "adapter_model.safetensors")
    own = {name: x for name, x in stored.items() if "lora" in name}
    assert own
    for name, x in own.items():
        param = params[name.replace(".weight", ".reward0.weight")]
        assert torch.equal(param, x)
        assert not param.requires_grad
    assert all(x.requires_grad == (".default." in name) for name, x in params.items() if "lora" in name)
    assert any(bool(x.any()) for name, x in params.items() if "lora_B.default" in name)


def test_only_an_adapter_on_that_very_base_shares_it(small: Small, tmp_path: Path) -> None:
    adapter, whole = (judge_of(small, tmp_path / save, save) for save in ("adapter", "merged"))
    folders = [str(next((Path(x) / "checkpoints").glob("*"))) for x in (adapter, whole)]
    assert shares_backbone(folders[0], small.policy)
    assert not shares_backbone(folders[0], small.judge)
    assert not shares_backbone(folders[1], small.policy)
    small.run("sft", tmp_path / "sft", lora_rank=2, lora_save="adapter")
    assert not shares_backbone(str(next((tmp_path / "sft" / "checkpoints").glob("*"))), small.policy)
