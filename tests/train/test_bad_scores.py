"""Scores that are not finite: their answers teach nothing, and nothing of them is left in a number."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kinkajou import faults
from kinkajou.batch import ScoredRollout
from kinkajou.data.records import Message
from kinkajou.data.sources import Prompt
from kinkajou.errors import UserError
from kinkajou.parallel.strategy import Single
from kinkajou.rewards.answer import Answer
from kinkajou.rewards.judges import Verdict
from kinkajou.train import grpo, ppo
from kinkajou.train.bad_scores import take_out
from kinkajou.train.nonfinite import NotFinite
from kinkajou.train.skips import Guard
from rl import watch
from small import Small, metrics

NAN, INF = float("nan"), float("inf")


class Here(Single):
    def __init__(self) -> None:
        self.device = torch.device("cpu")


def taken(scores: list[float], size: int, limit: int = 3) -> tuple[ScoredRollout, dict[str, float], list[NotFinite]]:
    n = len(scores)
    told: list[NotFinite] = []
    guard = Guard(limit, tell=lambda fault, number: told.append(fault), keep=lambda fault: "")
    mask = torch.ones(n, 4, dtype=torch.bool)
    rollout = ScoredRollout(
        torch.zeros(n, 5, dtype=torch.long),
        mask,
        torch.zeros(n, 4),
        torch.ones(n, dtype=torch.bool),
        torch.tensor(scores),
    )
    answers = [Answer(Prompt((Message("user", f"q{i}"),), {}, f"p.jsonl:{i}"), f"a{i}", True) for i in range(n)]
    verdict = Verdict(rollout.scores, {}, {1: ("rule:x", NAN)})
    found, metric = take_out(rollout, verdict, answers, size, Here(), guard)
    return found, metric, told


def test_a_row_of_ppo() -> None:
    found, metric, told = taken([1.0, NAN, 3.0, -INF], 1)
    assert metric == {"bad_scores": 2.0}
    assert found.mask.any(1).tolist() == [True, False, True, False]
    assert found.scores.tolist() == [1.0, 2.0, 3.0, 2.0]
    (fault,) = told
    assert fault.place == "the reward rule:x"
    for word in ("gave nan", "p.jsonl:1", "q1", "2 such scores"):
        assert word in fault.evidence


def test_a_group_goes_as_a_whole() -> None:
    found, _, _ = taken([1.0, NAN, 3.0, 5.0], 2)
    assert found.mask.any(1).tolist() == [False, False, True, True]
    assert found.scores.tolist() == [4.0, 4.0, 3.0, 5.0]


def test_nothing_bad_changes_nothing() -> None:
    found, metric, told = taken([1.0, 2.0], 2)
    assert (metric, told) == ({}, [])
    assert found.scores.tolist() == [1.0, 2.0]


def test_all_bad_stops() -> None:
    with pytest.raises(NotFinite, match="the reward sum") as fault:
        taken([NAN, NAN, 1.0, NAN], 2)
    assert fault.value.exit_code == 3


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        *(("ppo", how) for how in ({}, {"score_at": "after_last"}, {"advantage": "bandit"}, {"backbone": "shared"})),
        *(("grpo", how) for how in ({}, {"returns": "token"}, {"algorithm": "reinforce++"}, {"dynamic_sampling": 1})),
    ],
)
def test_a_run_goes_on(
    stage: str, how: dict[str, Any], small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch, {"ppo": ppo, "grpo": grpo}[stage])
    faults.arm("judge.scores:2:nan")
    try:
        rows = small.run(stage, tmp_path / "run", score_scale="std", **how)
    finally:
        faults.arm("")
    assert [row.get("bad_scores", 0) for row in rows] == [0, 1, 0, 0, 0]
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 0, 0, 0]
    assert all(math.isfinite(x) for row in rows for x in row.values() if isinstance(x, float))
    mask = seen.steps[1].batch.mask.any(1)
    size = {"ppo": 1, "grpo": 0 if "dynamic_sampling" in how else 4}[stage]  # another group takes its place
    assert mask.tolist() == [False] * size + [True] * (len(mask) - size)
    assert not seen.steps[1].batch.advantages[:size].any()
    (line,) = [json.loads(text) for text in (tmp_path / "run" / "findings.jsonl").read_text().splitlines()]
    assert (line["name"], line["step"]) == ("not_finite", 2)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_too_many_steps_in_a_row_stop(stage: str, small: Small, tmp_path: Path) -> None:
    faults.arm("judge.scores:*:nan")
    try:
        with pytest.raises(UserError, match="first in the reward") as fault:
            small.run(stage, tmp_path / "run", max_skipped=2)
    finally:
        faults.arm("")
    assert fault.value.exit_code == 3
    assert "3 in a row" in fault.value.evidence
    assert len(metrics(tmp_path / "run")) == 2


def test_held_out_scores_must_be_finite(small: Small, tmp_path: Path) -> None:
    faults.arm("judge.scores:1:nan")
    try:
        with pytest.raises(UserError, match="instead of a number") as fault:
            small.run("ppo", tmp_path / "run", eval_prompts=small.held_out)
    finally:
        faults.arm("")
    assert fault.value.exit_code == 3


def statistics(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_running_statistics_of_a_run(stage: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step's scores are counted once, before they are divided."""
    trainer: Any = {"ppo": ppo, "grpo": grpo}[stage]
    raw, made = list[list[float]](), list[list[float]]()
    real = trainer.shaped

    def shaped(cfg: Any, rollout: ScoredRollout, *rest: Any) -> Any:
        raw.append(rollout.scores.tolist())
        made.append(real(cfg, rollout, *rest).tolist())
        return real(cfg, rollout, *rest)

    monkeypatch.setattr(trainer, "shaped", shaped)
    rows = small.run(stage, tmp_path / "run", score_scale="mean_std", score_clip=1.0)
    everything: list[float] = []
    for row, scores, got in zip(rows, raw, made, strict=True):
        everything += scores
        mean, std = statistics(everything)
        assert row["score_mean_running"] == pytest.approx(mean, rel=1e-6)
        assert row["score_std_running"] == pytest.approx(std, rel=1e-6)
        assert got == pytest.approx([max(-1.0, min(1.0, (x - mean) / std)) for x in scores], abs=1e-5)


def test_a_function_that_gives_nan_at_times(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without any fault point: a user's own reward."""
    monkeypatch.chdir(tmp_path)
    code = "seen = []\ndef f(completions, **rest):\n    seen.append(1)\n"
    code += (
        "    return [float('nan') if len(seen) == 2 and i == 1 else len(c) % 7 for i, c in enumerate(completions)]\n"
    )
    (tmp_path / "scores_n.py").write_text(code)
    rows = small.run("grpo", tmp_path / "run", reward="python:scores_n:f")
    assert [row.get("bad_scores", 0) for row in rows] == [0, 1, 0, 0, 0]
    assert "first in the reward python:f" in capsys.readouterr().out
