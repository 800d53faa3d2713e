"""Runs whose answers come from workers: the local engine's numbers, and answers of earlier weights."""

import dataclasses
import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_ddp import torchrun

from crew import Crew
from kinkajou import faults
from kinkajou.engine.pool import Pool
from kinkajou.engine.pool_engine import PoolEngine
from kinkajou.errors import UserError
from kinkajou.train import engines, grpo, ppo
from rl import causal, close, rows_of, token_logps, watch
from small import Small, metrics, nearly, weights

TRAINERS: dict[str, ModuleType] = {"ppo": ppo, "grpo": grpo}
RAY = {"rollout": "ray", "workers": 2}


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Crew:
    made = Crew()

    def make(model: Any, plan: Any, *, workers: int, address: str | None, say: Any) -> PoolEngine:
        return PoolEngine(Pool(made, plan("cpu"), workers=workers, say=say), model)

    monkeypatch.setattr(engines, "make_ray_engine", make)
    return made


def same_run(one: Path, other: Path) -> None:
    assert metrics(one) == nearly(metrics(other))
    last = metrics(one)[-1]["step"]
    for name, tensor in weights(one, last).items():
        torch.testing.assert_close(weights(other, last)[name], tensor, atol=2e-5, rtol=0)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("ppo", {}), ("grpo", {}), ("ppo", {"backbone": "shared", "lora_rank": 2}), ("grpo", {"dtype": "bf16"})],
)
def test_workers_change_nothing(stage: str, changes: dict[str, Any], small: Small, tmp_path: Path, crew: Crew) -> None:
    held_out = {"eval_prompts": small.held_out, "eval_every": 2, "lr": 1e-4, "steps": 3}
    small.run(stage, tmp_path / "local", **held_out, **changes)
    small.run(stage, tmp_path / "workers", **held_out, **changes, **RAY)
    same_run(tmp_path / "local", tmp_path / "workers")
    assert crew.closed


def test_workers_that_die_change_nothing(small: Small, tmp_path: Path, crew: Crew) -> None:
    small.run("grpo", tmp_path / "local")
    asked: Counter[int] = Counter()

    def fails(event: Any) -> bool:
        asked[event[0]] += event[1] == "sample"
        return event[1] == "sample" and asked[event[0]] == 3

    crew.fails = fails
    small.run("grpo", tmp_path / "workers", **RAY)
    assert len(crew.hands) > 5
    same_run(tmp_path / "local", tmp_path / "workers")


@pytest.mark.parametrize("stage", TRAINERS)
@pytest.mark.parametrize("behind", [1, 2])
def test_answers_of_earlier_weights(
    stage: str, behind: int, small: Small, tmp_path: Path, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step n is sampled by the weights that step max(0, n - 1 - K) left; its ratio starts from those of n - 1, and the
    importance weight of a token is old over sampler probability, at most 2."""
    seen = watch(monkeypatch, TRAINERS[stage])
    rows = small.run(stage, tmp_path / "run", save_every=1, max_staleness=behind, **RAY)
    assert [row["staleness"] for row in rows] == [min(n, behind) for n in range(5)]
    for n, step in enumerate(seen.steps, 1):
        sampler = max(0, n - 1 - behind)
        model = causal(small.policy, weights(tmp_path / "run", sampler) if sampler else None)
        rollout, batch = step.sampled.rollout, step.batch
        width = rollout.mask.shape[1]
        with torch.no_grad():
            drawn = [x.tolist() for x in token_logps(model, rollout.tokens, rollout.mask)]
            now = causal(small.policy, step.policy)
            old = [x.tolist() for x in token_logps(now, rollout.tokens, rollout.mask)]
        close(rows_of(rollout.sampler_logp, rollout.mask), drawn)
        close(rows_of(batch.old_logp[:, :width], rollout.mask), old)
        far = max(abs(a - b) for x, y in zip(old, drawn, strict=True) for a, b in zip(x, y, strict=True))
        want = [
            [min(2.718281828459045 ** (a - b), 2.0) if far > 0.05 else 1.0 for a, b in zip(x, y, strict=True)]
            for x, y in zip(old, drawn, strict=True)
        ]
        close(rows_of(batch.correction[:, :width], rollout.mask), want, 1e-3)
        assert (far > 0.05) == (n > 1)
    assert all("engine_gap" not in row and row["first_gap"] < 1e-5 for row in rows)
    again = small.run(stage, tmp_path / "again", save_every=1, max_staleness=behind, **RAY)
    assert again == nearly(rows)


@pytest.mark.parametrize("at", ["step.logged:3", "update.after_step:10"])
def test_answers_that_were_begun_are_kept(at: str, small: Small, tmp_path: Path, crew: Crew) -> None:
    """A run that goes on does not sample them again with weights that have moved since."""
    changes = {"save_every": 1, "save_updates": 1, "max_staleness": 2, "lr": 1e-2, **RAY}
    whole = small.run("grpo", tmp_path / "whole", **changes)
    faults.arm(f"{at}:raise")
    try:
        with pytest.raises(RuntimeError, match="asked for at"):
            small.run("grpo", tmp_path / "run", **changes)
    finally:
        faults.arm("")
    rows = small.run("grpo", tmp_path / "run", **changes)
    assert [row["staleness"] for row in rows] == [0, 1, 2, 2, 2]
    assert rows == nearly(whole)
    same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({**RAY, "tp": 2, "strategy": "zero3"}, "do not go with tensor parallel"),
        ({**RAY, "max_staleness": 1, "dynamic_sampling": 2}, "none can be sampled ahead"),
        ({"max_staleness": 1}, "read by Ray rollouts alone"),
    ],
)
def test_refused(changes: dict[str, Any], problem: str, small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        small.settings("grpo", tmp_path, **changes)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'kinkajou[ray]'")
def test_two_ranks_ask_the_same_actors(small: Small, tmp_path: Path) -> None:
    changes = {"lr": 1e-4, "steps": 3, "tokens_per_microbatch": 40}
    jobs = {
        "ray": ("grpo", {**changes, **RAY}),
        "lost": ("grpo", {**changes, "rollout": "ray", "ray_address": "127.0.0.1:9"}),
    }
    plan = {"small": {k: str(v) for k, v in dataclasses.asdict(small).items()}, "jobs": jobs}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = torchrun([str(Path(__file__).with_name("ddp_stages.py")), str(tmp_path / "plan.json")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = small.run("grpo", tmp_path / "alone", **changes)
    both = metrics(tmp_path / "ray")
    assert len(both) == len(alone)
    for one, two in zip(alone, both, strict=True):
        assert two == pytest.approx(one, abs=1e-5, rel=2e-4)
    assert "no Ray cluster could be joined" in (tmp_path / "lost.refused").read_text()
