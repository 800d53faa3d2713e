"""A run that was stopped anywhere goes on as if it had never been: bit by bit, by the same command."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from kinkajou import faults
from small import Small

CLOCK = {"clock.json", "manifest.json"}
LOGS = ("metrics.jsonl", "samples.jsonl", "findings.jsonl")
RL = {"kl_coef": 0.1, "kl_target": 0.5, "ema_decay": 0.9, "save_every": 2, "save_updates": 1}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"save_every": 2, "eval_share": 0.2, "batch_size": 6},
    "reward": {"save_every": 2, "lora_rank": 2},
    "prefer": {"save_every": 2},
    "ppo": RL,
    "grpo": RL,
}


def state_of(run: Path) -> dict[str, str]:
    """Digests of all that a run has left, but for what the clock says."""
    last = max((run / "checkpoints").glob("step-*"))
    files = [path for path in last.rglob("*") if path.is_file() and path.name not in CLOCK]
    files += [run / name for name in LOGS if (run / name).is_file()]
    return {
        str(path.relative_to(run)): path.read_text()
        if path.suffix in (".json", ".jsonl") and path.stat().st_size < 9000
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


class Broken(Exception):
    pass


def broken_off(small: Small, stage: str, run: Path, at: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Trains until that point is reached for the n-th time (`point:n`), and no further."""
    point, _, number = at.partition(":")
    seen = []

    def reached(name: str) -> str:
        seen.append(name)
        if seen.count(point) == int(number) and name == point:
            raise Broken
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(faults, "reached", reached)
        with pytest.raises(Broken):
            small.run(stage, run, **changes)


@pytest.mark.parametrize("at", ["step.start:4", "step.end:3", "step.logged:4", "save.snapshot:3"])
@pytest.mark.parametrize("stage", STAGES)
def test_it_goes_on(stage: str, at: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    small.run(stage, whole, **STAGES[stage])
    broken_off(small, stage, run, at, monkeypatch, **STAGES[stage])
    small.run(stage, run, **STAGES[stage])
    assert state_of(run) == state_of(whole)
