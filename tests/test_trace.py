"""Twenty CPU steps of every stage against recorded numbers: a change of numerics is made on purpose or not at all.

To record anew: `KINKAJOU_RECORD_TRACES=1 python -m pytest tests/test_trace.py`, and say why in CHANGELOG.md under
"Numerics".  The tolerance covers other processors and torch builds, not another formula.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from small import Small

FOLDER = Path(__file__).with_name("traces")
RECORD = bool(os.environ.get("KINKAJOU_RECORD_TRACES"))
KEYS = ("loss", "margin", "score", "kl_ref", "policy_loss", "value_loss", "ptx_loss", "entropy", "grad_norm")
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"epochs": 4, "lr": 3e-4, "weight_decay": 0.1},
    "reward": {"epochs": 4, "lr": 3e-4},
    "ppo": {"steps": 20, "lr": 3e-4, "kl_coef": 0.1, "ptx_coef": 0.2, "missing_end_penalty": 0.5},
}


def rounded(row: dict[str, Any]) -> dict[str, float]:
    return {name: float(f"{row[name]:.6g}") for name in KEYS if name in row}


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps_give_the_recorded_numbers(stage: str, small: Small, tmp_path: Path) -> None:
    changes = {**STAGES[stage], **({"ptx_data": small.chats} if stage == "ppo" else {})}
    rows = [rounded(row) for row in small.run(stage, tmp_path / "run", **changes)]
    file = FOLDER / f"{stage}.json"
    if RECORD:
        file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        pytest.skip(f"recorded {file}: say why in CHANGELOG.md, under Numerics")
    recorded = json.loads(file.read_text())
    assert len(recorded) == len(rows) == 20
    for step, (got, want) in enumerate(zip(rows, recorded, strict=True), start=1):
        assert got == pytest.approx(want, rel=1e-3, abs=2e-4), f"step {step}"
