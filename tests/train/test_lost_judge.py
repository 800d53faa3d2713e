"""A judge that fails in the middle of a run loses neither the answers nor the weights of the steps before."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kinkajou.errors import UserError
from kinkajou.rewards.judges import Judge
from kinkajou.train import grpo, parts, ppo
from rl import changed, rows_of, watch
from small import Small, metrics, steps_kept, weights

CALL = "the reward service does not answer"
TRAINERS = {"ppo": ppo, "grpo": grpo}


def failing(monkeypatch: pytest.MonkeyPatch, which: Callable[[Any], bool], call: int) -> None:
    """Judges whose specs `which` picks fail at that call, as a service that went down does."""
    load = parts.judge_of

    def judge_of(cfg: Any, specs: Any, *rest: Any, **more: Any) -> Judge:
        judge, calls = load(cfg, specs, *rest, **more), []

        def once(answers: Any, rollout: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                raise UserError(CALL, evidence="5 tries", fix="start it again", exit_code=5)
            return judge(answers, rollout)

        return once if which(specs) else judge

    monkeypatch.setattr(parts, "judge_of", judge_of)


def unscored(run: Path) -> list[dict[str, Any]]:
    (path,) = run.glob("unscored-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stage", TRAINERS)
def test_it_fails_in_the_third_step(stage: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 2 is saved as it was; the answers of step 3 are on disk with tokens and log-probabilities."""
    untouched, lost = tmp_path / "untouched", tmp_path / "lost"
    with monkeypatch.context() as patch:
        seen = watch(patch, TRAINERS[stage])
        small.run(stage, untouched, steps=3, schedule="constant", save_every=1)
    failing(monkeypatch, lambda specs: True, 3)
    with pytest.raises(UserError, match=CALL) as stopped:
        small.run(stage, lost, steps=3, schedule="constant")
    fault = stopped.value
    assert fault.exit_code == 5
    assert fault.fix == "start it again"
    assert "5 tries" in fault.evidence
    assert str(lost / "unscored-000003-0.jsonl") in fault.evidence
    assert steps_kept(lost) == [2]
    assert not changed(weights(untouched, 2), weights(lost, 2))
    assert [row["step"] for row in metrics(lost)] == [1, 2]
    rollout, rows = seen.steps[2].sampled.rollout, unscored(lost)
    assert len(rows) == len(rollout.tokens)
    logps = rows_of(rollout.sampler_logp, rollout.mask)
    for row, tokens, mask, logp in zip(rows, rollout.tokens, rollout.mask, logps, strict=True):
        assert row["tokens"] == tokens[1:][mask].tolist()
        assert row["sampler_logp"] == pytest.approx(logp, abs=1e-6)
        assert all(math.isfinite(x) for x in row["sampler_logp"])
    assert [row["ended"] for row in rows] == rollout.ended.tolist()
    asked = {json.loads(line)["prompt"] for line in Path(small.prompts).read_text().splitlines()}
    assert {row["prompt"] for row in rows} <= asked


def test_it_fails_at_once(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been learnt, so there is no checkpoint; a run over it forgets the answers that were kept."""
    failing(monkeypatch, lambda specs: True, 1)
    with pytest.raises(UserError, match=CALL):
        small.run("ppo", tmp_path / "run", steps=2)
    assert steps_kept(tmp_path / "run") == []
    assert len(unscored(tmp_path / "run")) == 8
    monkeypatch.undo()
    small.run("ppo", tmp_path / "run", steps=1, overwrite=True)
    assert not list((tmp_path / "run").glob("unscored-*"))


@pytest.mark.parametrize("who", ["reward", "gold"])
def test_it_fails_on_held_out_prompts(who: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the updates of step 2: the weights on disk are those of step 2, which has not ended yet."""
    held_out = {"eval_prompts": small.held_out, "eval_every": 2, "reward": "rule:length:3", "gold": "rule:ended"}
    changes = {**held_out, "steps": 4, "schedule": "constant", "save_every": 1}
    small.run("ppo", tmp_path / "untouched", **changes)
    # Gold: before the first step, then in step 2.  Reward: held out, step 1, step 2, held out.
    failing(
        monkeypatch, lambda specs: ("gold" if "rule:ended" in specs else "reward") == who, 2 if who == "gold" else 4
    )
    changes["save_every"] = 0
    with pytest.raises(UserError, match=CALL) as stopped:
        small.run("ppo", tmp_path / "lost", **changes)
    assert "3 answers without a score" in stopped.value.evidence
    (kept,) = (tmp_path / "lost" / "checkpoints").iterdir()
    assert kept.name == "step-000001+004"
    assert not changed(weights(tmp_path / "untouched", 2), load_file(kept / "model.safetensors"))
    assert len(unscored(tmp_path / "lost")) == 3
    assert [row["step"] for row in metrics(tmp_path / "lost")][-1] == 1
    monkeypatch.undo()
    small.run("ppo", tmp_path / "lost", **changes)  # the service is back
    assert metrics(tmp_path / "lost") == metrics(tmp_path / "untouched")


def test_a_checkpoint_of_that_step_is_there_already(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda specs: True, 3)
    with pytest.raises(UserError, match=CALL):
        small.run("grpo", tmp_path / "run", steps=3, save_every=1)
    assert steps_kept(tmp_path / "run") == [1, 2]
    assert unscored(tmp_path / "run")


def test_a_score_that_is_no_number(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python function that gives NaN in its third call: the same care, by the function itself."""
    (tmp_path / "odd_reward.py").write_text(
        "calls = []\n"
        "def reward(prompts, completions, **columns):\n"
        "    calls.append(1)\n"
        "    return [float('nan') if len(calls) == 3 else 1.0 for _ in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="reward") as stopped:
        small.run("ppo", tmp_path / "run", steps=4, reward="odd_reward:reward")
    assert stopped.value.exit_code == 3
    assert "prompts.jsonl:" in stopped.value.evidence
    assert steps_kept(tmp_path / "run") == [2]
