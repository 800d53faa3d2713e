"""A run that has been made is not made again, unless what it made is gone."""

import shutil
from pathlib import Path

import pytest
import torch

from small import Small, metrics, weights


def test_the_same_command_again_makes_nothing(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    small.run("sft", run, save_every=2)
    before = (run / "timing.jsonl").read_text()
    capsys.readouterr()
    small.run("sft", run, save_every=2)
    assert f"done already: {run / 'checkpoints' / 'step-000005'}" in capsys.readouterr().out
    assert (run / "timing.jsonl").read_text() == before


def test_a_lost_last_checkpoint_is_made_again(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    want = small.run("sft", run, save_every=2)
    model, clock = weights(run, 5), metrics(run, "timing.jsonl")
    shutil.rmtree(run / "checkpoints" / "step-000005")
    capsys.readouterr()
    assert small.run("sft", run, save_every=2) == want
    assert "done already" not in capsys.readouterr().out
    assert all(torch.equal(x, model[name]) for name, x in weights(run, 5).items())
    again = metrics(run, "timing.jsonl")
    assert again[:4] == clock[:4]  # what was made before the checkpoint took the time that it took
    assert again[4]["time_s"] > again[3]["time_s"]
