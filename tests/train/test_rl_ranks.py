"""Two gloo ranks and the options of reinforcement learning: the same numbers, the same decisions."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ddp import torchrun

from rl import ending
from small import Small, metrics, steps_kept, weights

# As in test_ddp: AdamW turns the rounding of a gradient near 0 into a whole step, so steps are small.
COMMON: dict[str, Any] = {"tokens_per_microbatch": 40, "lr": 1e-4, "warmup": 0.0, "max_norm": 1.0, "steps": 3}
PTX = {"ptx_coef": 0.3, "ptx_batch_size": 4}
RULE = "rule:mentions:w5,w6,w7"
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared": ("ppo", {"backbone": "shared", "score_at": "after_last"}),
    "shared-ptx": ("ppo", {"backbone": "shared", **PTX}),
    "stop": ("ppo", {"stop_kl": 2e-4, "lr": 1e-3, "epochs": 6, "steps": 1}),
    "ended-only": ("ppo", {"mask_truncated": True, "minibatch_size": 2}),
    "adaptive": ("ppo", {"kl_target": 1e-4, "kl_horizon": 20.0, "ema_decay": 0.5, "critic_warmup": 1}),
    "dynamic": ("grpo", {"dynamic_sampling": 3, "reward": RULE, "overlong_share": 0.3}),
    "rloo": ("grpo", {"algorithm": "rloo", "minibatch_size": 4}),
    "reinforce++": ("grpo", {"algorithm": "reinforce++", "missing_end_penalty": 0.5}),
    "gspo-lora": ("grpo", {"algorithm": "gspo", "lora_rank": 2}),
    "grpo-ended-only": ("grpo", {"mask_truncated": True, "minibatch_size": 2, "scale": "batch"}),
}
FAILS = """
import os
from pathlib import Path

def reward(prompts, completions, **columns):
    rank = os.environ["RANK"]
    calls = Path(f"calls-{rank}")
    calls.write_text(calls.read_text() + "." if calls.exists() else ".")
    if rank == "1" and len(calls.read_text()) == 3:
        raise ValueError("the third call")
    return [float(len(x)) for x in completions]
"""


def changes_of(name: str, small: Small) -> dict[str, Any]:
    changes = {**COMMON, "model": ending(small), **JOBS[name][1]}
    return changes | ({"ptx_data": small.chats} if "ptx_coef" in changes else {})


@pytest.fixture(scope="module")
def on_two(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    (folder / "late_reward.py").write_text(FAILS)
    jobs: dict[str, Any] = {name: (JOBS[name][0], changes_of(name, small)) for name in JOBS}
    jobs["lost"] = ("grpo", {**COMMON, "reward": "late_reward:reward"})
    plan = {"small": {k: str(v) for k, v in dataclasses.asdict(small).items()}, "jobs": jobs}
    (folder / "plan.json").write_text(json.dumps(plan))
    done = torchrun([str(Path(__file__).with_name("ddp_stages.py")), str(folder / "plan.json")], cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_equal_one_process(name: str, small: Small, on_two: Path, tmp_path: Path) -> None:
    alone = small.run(JOBS[name][0], tmp_path / "run", **changes_of(name, small))
    both = metrics(on_two / name)
    assert len(both) == len(alone)
    for one, two in zip(alone, both, strict=True):
        assert two.pop("explained_variance", 0) == pytest.approx(one.pop("explained_variance", 0), rel=1e-3)
        assert two == pytest.approx(one, abs=1e-5, rel=2e-4)
    kept = steps_kept(tmp_path / "run")
    for key, tensor in weights(tmp_path / "run", kept[-1]).items():
        torch.testing.assert_close(weights(on_two / name, kept[-1])[key], tensor, atol=2e-5, rtol=0)
    assert (on_two / name / "samples.jsonl").read_text() == (tmp_path / "run" / "samples.jsonl").read_text()


def test_both_ranks_stop_at_the_same_update(on_two: Path) -> None:
    (row,) = metrics(on_two / "stop")
    assert 1 < row["updates"] < 12


def test_groups_were_replaced(on_two: Path) -> None:
    assert max(row.get("sampling_rounds", 1) for row in metrics(on_two / "dynamic")) > 1


def test_some_minibatches_had_nothing_to_teach(on_two: Path) -> None:
    assert any(row["updates"] < 16 for row in metrics(on_two / "grpo-ended-only"))


def test_a_judge_that_fails_on_one_rank(on_two: Path) -> None:
    """Both stop together, each with its own answers on disk, and step 2 is saved."""
    refused = (on_two / "lost.refused").read_text()  # of the rank that wrote last
    assert "another process" in refused or "late_reward" in refused
    files = sorted((on_two / "lost").glob("unscored-*"))
    assert [path.name for path in files] == ["unscored-000003-0.jsonl", "unscored-000003-1.jsonl"]
    assert [len(path.read_text().splitlines()) for path in files] == [8, 8]
    assert steps_kept(on_two / "lost") == [2]
