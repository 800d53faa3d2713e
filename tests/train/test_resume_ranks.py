"""A run that goes on under another strategy, or on another number of ranks, ends where it would have ended.

The whole table is `python -m benchmarks.reshard`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kinkajou import faults
from kinkajou.checkpoint.place import Place
from kinkajou.train.signals import Stopped
from small import Small, metrics, weights
from train.test_ddp import torchrun

COMMON: dict[str, Any] = {"tokens_per_microbatch": 60, "lr": 1e-4, "warmup": 0.0}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"epochs": 1},
    "ppo": {"kl_target": 0.5, "epochs": 2, "missing_end_penalty": 0.5, "ema_decay": 0.9},
}
STOP = {"sft": "update.after_step:3:term@0", "ppo": "update.after_step:9:term@0"}
"""In the middle of a round, where there are rounds."""
TWO = {"ddp": {"strategy": "ddp"}, "zero3": {"strategy": "zero3"}, "tp": {"strategy": "zero3", "tp": 2}}


def places(folder: Path) -> list[Place]:
    found = (Place.of(path.name) for path in (folder / "checkpoints").iterdir())
    return sorted(place for place in found if place)


def left(folder: Path) -> str:
    """The checkpoint of a run that was stopped."""
    return str(folder / "checkpoints" / places(folder)[-1].name)


def plan(folder: Path, small: Small, jobs: dict[str, Any]) -> None:
    words = {"small": {k: str(v) for k, v in dataclasses.asdict(small).items()}, "jobs": jobs}
    (folder / "plan.json").write_text(json.dumps(words))
    done = torchrun([str(Path(__file__).with_name("ddp_stages.py")), str(folder / "plan.json")], cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each stage's run without a stop, and one that was stopped."""
    folder = tmp_path_factory.mktemp("alone")
    for stage, changes in STAGES.items():
        small.run(stage, folder / stage, **COMMON, **changes)
        faults.arm(STOP[stage])
        try:
            with pytest.raises(Stopped):
                small.run(stage, folder / f"{stage}-stopped", **COMMON, **changes)
        finally:
            faults.arm("")
    return folder


def check_equal(one: Path, many: Path) -> None:
    assert len(metrics(one)) == len(metrics(many))
    for a, b in zip(metrics(one), metrics(many), strict=True):
        assert b.pop("explained_variance", 0) == pytest.approx(a.pop("explained_variance", 0), rel=1e-3, abs=1e-3)
        assert b == pytest.approx(a, abs=1e-5, rel=1e-5)
    last = places(one)[-1].step
    assert places(many)[-1] == Place(last)
    mine, theirs = weights(one, last), weights(many, last)
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        torch.testing.assert_close(theirs[name], x, atol=1e-5, rtol=1e-4)


def test_one_process_and_two_take_up_each_others_runs(small: Small, alone: Path, tmp_path: Path) -> None:
    """PPO in the middle of a round, zero3: shards from whole tensors and whole tensors from shards."""
    zero3 = {**COMMON, **STAGES["ppo"], **TWO["zero3"]}
    plan(
        tmp_path,
        small,
        {
            "stopped": ("ppo", zero3, STOP["ppo"]),
            "up": ("ppo", {**zero3, "resume": left(alone / "ppo-stopped")}),
        },
    )
    assert places(tmp_path / "stopped")[-1].updates > 0
    small.run("ppo", tmp_path / "down", **COMMON, **STAGES["ppo"], resume=left(tmp_path / "stopped"))
    check_equal(alone / "ppo", tmp_path / "up")
    check_equal(alone / "ppo", tmp_path / "down")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_strategies_take_up_each_others_runs(stage: str, small: Small, alone: Path, tmp_path: Path) -> None:
    jobs: dict[str, Any] = {}
    for way, more in TWO.items():
        jobs[f"stopped-{way}"] = (stage, {**COMMON, **STAGES[stage], **more}, STOP[stage])
    plan(tmp_path, small, jobs)
    pairs = {f"{a}-{b}": (a, more) for a in TWO for b, more in TWO.items()}
    jobs = {
        name: (stage, {**COMMON, **STAGES[stage], **more, "resume": left(tmp_path / f"stopped-{source}")})
        for name, (source, more) in pairs.items()
    }
    plan(tmp_path, small, jobs)
    for name in pairs:
        check_equal(alone / stage, tmp_path / name)
