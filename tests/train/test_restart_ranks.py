"""Under torchrun: a rank that is killed costs a restart and no bit of the result; a signal to it saves the run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kinkajou import config, faults
from kinkajou.checkpoint.place import Place
from small import Small

PPO: dict[str, Any] = {"lr": 1e-4, "epochs": 2, "kl_target": 0.5, "save_every": 1, "save_updates": 1}


def begin(small: Small, home: Path, *words: str, fault: str = "", **changes: Any) -> "subprocess.Popen[str]":
    home.mkdir()
    cfg = small.settings("ppo", "run", **PPO, **changes, strategy="ddp")
    (home / "recipe.toml").write_text(config.to_toml({"ppo": config.flat(cfg)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", faults.VARIABLE: fault}
    return subprocess.Popen(
        [*command, "-m", "kinkajou", "ppo", "recipe.toml"],
        cwd=home,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(job: "subprocess.Popen[str]") -> str:
    try:
        said, _ = job.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        job.terminate()  # torchrun then ends its ranks
        job.communicate()
        raise
    return said


def result(home: Path) -> dict[str, bytes]:
    """Metrics, and every file with numbers in it of the last checkpoint."""
    last = max(filter(None, (Place.of(path.name) for path in (home / "run" / "checkpoints").iterdir())))
    folder = home / "run" / "checkpoints" / last.name
    files = [home / "run" / "metrics.jsonl", *sorted(folder.rglob("*.safetensors"))]
    assert len(files) > 3
    return {str(path.relative_to(home)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_torchrun_starts_again_where_the_killed_run_was(small: Small, tmp_path: Path) -> None:
    whole = begin(small, tmp_path / "whole")
    said = end(whole)
    assert whole.returncode == 0, said[-3000:]
    broken = begin(small, tmp_path / "broken", "--max_restarts=1", fault="update.after_step:23:kill@1")
    said = end(broken)
    assert broken.returncode == 0, said[-3000:]
    assert "error: lost rank 1 on " in said
    assert "goes on from run/checkpoints/step-" in said
    assert result(tmp_path / "broken") == result(tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_the_run(small: Small, tmp_path: Path) -> None:
    job = begin(small, tmp_path / "run", steps=1000)
    metrics = tmp_path / "run" / "run" / "metrics.jsonl"
    until = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < until:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    said = end(job)
    assert said.count("the same command goes on from there") == 2, said[-3000:]
    assert job.returncode == CODE_OF_TORCHRUN, said[-3000:]
    assert result(tmp_path / "run")


CODE_OF_TORCHRUN = 1
"""Whatever its ranks returned: torchrun ends in a traceback of its own, SignalException."""
