"""What a run does with findings: says, writes, counts, stops."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_ddp import torchrun

from kinkajou.errors import UserError
from kinkajou.parallel.strategy import Single
from kinkajou.train.run import Run, clear_run
from small import Small, metrics, steps_kept


def findings(run: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "findings.jsonl").read_text().splitlines()]


def test_a_finding_is_printed_once_written_and_summed_up(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small.run("sft", tmp_path / "run", lr=0.0)
    said = capsys.readouterr().out
    assert (
        "\nwarning: lr_zero at step 3: the learning rate is 0: nothing is trained\n  seen: lr 0\n  do:   set --lr\n"
        in said
    )
    assert said.count("lr_zero at step") == 1
    times = len(metrics(tmp_path / "run")) - 2
    assert f"findings: lr_zero (step 3, {times} times)" in said
    lines = findings(tmp_path / "run")
    assert [line["name"] for line in lines] == ["lr_zero"] * len(lines)
    assert lines[0]["step"] == 3
    assert lines[0]["metrics"] == ["lr"]
    assert lines[-1]["seen"] == times


def test_a_healthy_run_has_no_file_of_findings(small: Small, tmp_path: Path) -> None:
    small.run("sft", tmp_path / "run")
    assert not (tmp_path / "run" / "findings.jsonl").exists()


@pytest.mark.parametrize("names", [("lr_zero",), ("kl_leap", "any")])
def test_stop_on_saves_first(small: Small, tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="stopped at step 3 on lr_zero") as fault:
        small.run("reward", tmp_path / "run", lr=0.0, stop_on=names)
    assert fault.value.exit_code == 3
    assert steps_kept(tmp_path / "run") == [3]
    assert str(tmp_path / "run" / "checkpoints" / "step-000003") in fault.value.evidence
    assert fault.value.fix == "set --lr"
    assert len(metrics(tmp_path / "run")) == 3


def test_other_findings_do_not_stop(small: Small, tmp_path: Path) -> None:
    small.run("sft", tmp_path / "run", lr=0.0, stop_on=("kl_leap",))


def test_it_stops_where_the_finding_is_certain(small: Small, tmp_path: Path) -> None:
    cfg = small.settings("sft", tmp_path / "run", stop_on=("lr_zero",))
    run = Run("sft", cfg, Single(), total=9, shown=())
    for step in run.steps():
        if step < 3:
            run.end_step({"lr": 0.0})
            continue
        with pytest.raises(UserError) as fault:
            run.end_step({"lr": 0.0})
        assert "saved: " in fault.value.evidence
        break


def test_a_step_that_is_not_finite_leaves_its_finding(small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite") as fault:
        small.run("sft", tmp_path / "run", lr=1e30, warmup=0.0, max_skipped=0)
    assert fault.value.exit_code == 3
    (line,) = findings(tmp_path / "run")
    assert line["name"] == "not_finite"
    assert line["step"] == len(metrics(tmp_path / "run")) + 1
    assert line["cause"].startswith("a loss or gradient is not finite, first in ")
    assert line["evidence"]["seen"] in fault.value.evidence


def test_names_are_checked_before_anything_is_read(small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown finding 'lr_zer0'") as fault:
        small.settings("sft", tmp_path / "run", stop_on=("lr_zer0",))
    assert fault.value.exit_code == 2


def test_what_a_new_run_clears(tmp_path: Path) -> None:
    own = [
        "config.toml",
        "metrics.jsonl",
        "timing.jsonl",
        "samples.jsonl",
        "findings.jsonl",
        "best.json",
        "report.html",
    ]
    own += ["unscored-000003-0.jsonl", "reference.safetensors"]
    for name in [*own, "notes.txt"]:
        (tmp_path / name).write_text("")
    clear_run(tmp_path, keep=("reference.safetensors",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "reference.safetensors"]
    clear_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_two_ranks_say_the_same_and_stop_together(tmp_path: Path) -> None:
    """What is wrong is on the second rank alone."""
    script = Path(__file__).with_name("ddp_findings.py")
    done = torchrun([str(script), str(tmp_path)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert set(first) == {"loss", "gradient", "stop"}
    assert "first in the loss 'loss'" in first["loss"]
    assert "first in the gradient of lm_head.weight" in first["gradient"]
    for name in ("loss", "gradient"):
        assert first[name] == second[name]
        assert "seen: process 1: " in first[name]
    assert "another process stopped" in first["stop"]
    assert "stopped at step 3 on lr_zero" in second["stop"]
    assert steps_kept(tmp_path / "run") == [3]


@pytest.mark.parametrize("stage", ["ppo", "grpo", "prefer"])
def test_every_stage_saves_before_it_stops(small: Small, tmp_path: Path, stage: str) -> None:
    with pytest.raises(UserError, match="stopped at step 3 on lr_zero") as fault:
        small.run(stage, tmp_path / "run", lr=0.0, stop_on=("lr_zero",))
    assert "saved: " in fault.value.evidence
    assert steps_kept(tmp_path / "run") == [3]


@pytest.mark.parametrize("stage", ["reward", "prefer", "ppo", "grpo"])
def test_small_healthy_runs_find_nothing(small: Small, tmp_path: Path, stage: str) -> None:
    small.run(stage, tmp_path / "run", lr=1e-4)
    assert not (tmp_path / "run" / "findings.jsonl").exists()
