"""The step that stopped a run lies on the disk, and `kinkajou replay` finds the same place again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kinkajou import faults
from kinkajou.cli import main
from kinkajou.errors import UserError
from small import Small


def stopped(small: Small, stage: str, run: Path, fault: str, **more: Any) -> tuple[UserError, Path]:
    faults.arm(fault)
    try:
        with pytest.raises(UserError) as caught:
            small.run(stage, run, max_skipped=0, **more)
    finally:
        faults.arm("")
    (folder,) = (run / "replay").iterdir()
    assert f"kinkajou replay {folder}" in caught.value.fix
    return caught.value, folder


def spoil(folder: Path, name: str) -> None:
    """One weight of the kept model becomes what it may have become in a run."""
    weights = load_file(folder / "weights.safetensors")
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, folder / "weights.safetensors")


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("sft", {}),
        ("sft", {"lora_rank": 2}),
        ("reward", {}),
        ("prefer", {}),
        ("prefer", {"loss": ("kto",)}),
        ("ppo", {}),
        ("ppo", {"backbone": "shared"}),
        ("grpo", {"kl_in": "loss", "kl_coef": 0.1}),
    ],
)
def test_every_stage_is_replayed(
    stage: str, more: dict[str, Any], small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault of one moment is not found again; a weight that is broken is, by its name."""
    # In PPO the second pass is the policy's; where the trunk is shared there is one model.
    point = "update.forward:2:nan" if stage == "ppo" and not more else "update.forward:1:nan"
    fault, folder = stopped(small, stage, tmp_path / "run", point, **more)
    assert fault.exit_code == 3
    assert main(["replay", str(folder)]) == 1
    assert "not reproduced" in capsys.readouterr().err
    names = load_file(folder / "weights.safetensors")
    name = next(name for name in names if name.endswith("layers.1.mlp.down_proj.weight") or "down_proj.base" in name)
    spoil(folder, name)
    assert main(["replay", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"first in the weight {name.removeprefix('language.').removeprefix('module.')}" in out
    assert "micro-batch 1 of" in out
    assert "w" in out.partition("text")[2]  # rows with their words


def test_the_critic(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = stopped(small, "ppo", tmp_path / "run", "update.forward:1:nan")
    assert [one["name"] for one in json.loads((folder / "replay.json").read_text())["objectives"]] == ["value_loss"]
    spoil(folder, "module.score.weight")
    assert main(["replay", str(folder)]) == 0
    assert "score" in capsys.readouterr().out


def test_what_the_run_saw_is_found_again(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that blows up by itself: the same place, and losses to the bit."""
    with pytest.raises(UserError) as caught:
        small.run("sft", tmp_path / "run", lr=1e30, warmup=0.0, max_skipped=1)
    place = str(caught.value).partition("first in ")[2].partition("; the weights")[0]
    (folder,) = (tmp_path / "run" / "replay").iterdir()
    assert folder.name == "step-000003"
    about = json.loads((folder / "replay.json").read_text())
    assert (about["stage"], about["step"], about["place"]) == ("sft", 3, place)
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.count(f"first in {place}") == 2
    batch = load_file(folder / "batch.safetensors")
    assert batch["0.tokens"].shape[0] == 8


def test_weights_are_exact_and_nothing_is_touched(small: Small, tmp_path: Path) -> None:
    _, folder = stopped(small, "sft", tmp_path / "run", "update.forward:1:nan")
    kept, source = load_file(folder / "weights.safetensors"), load_file(Path(small.policy) / "model.safetensors")
    for name, x in source.items():
        assert torch.equal(kept[f"module.{name}"], x), name
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    main(["replay", str(folder)])
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file", ["replay.json", "batch.safetensors"])
def test_a_damaged_folder(file: str, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = stopped(small, "sft", tmp_path / "run", "update.forward:1:nan")
    (folder / file).write_bytes((folder / file).read_bytes()[:40])
    assert main(["replay", str(folder)]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert main(["replay", str(tmp_path)]) == 2
    assert "holds no step to replay" in capsys.readouterr().err
