"""Two gloo ranks train the same model as one process: loss, gradient norm and weights, in every stage."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kinkajou.cli import main
from kinkajou.errors import UserError
from small import Small, metrics, steps_kept, weights

# A micro-batch of 40 tokens splits each rank's share again: ranks have different numbers of micro-batches.
# Warm-up ends before the first step, so weights move from the first one on; 1e-4 and not more, because AdamW
# turns the rounding of a gradient near 0 into a whole step.
COMMON: dict[str, Any] = {"tokens_per_microbatch": 40, "lr": 1e-4, "warmup": 0.0, "max_norm": 1.0}
PTX = {"ptx_coef": 0.3, "ptx_batch_size": 4}
HELD: dict[str, Any] = {"eval_share": 0.1, "batch_size": 6, "epochs": 0.84}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"eval_share": 0.1, "batch_size": 6, "epochs": 0.84}),
    "reward": ("reward", {"eval_share": 0.1, "batch_size": 6, "epochs": 0.84}),
    "ppo-rule": ("ppo", {"reward": "rule:length:3", "keep_best": "score", "eval_every": 2, "kl_coef": 0.3, **PTX}),
    "ppo-model": ("ppo", {"missing_end_penalty": 0.5, "top_k": 20, "minibatch_size": 2}),
    "sft-lora": ("sft", {"lora_rank": 2, "epochs": 0.4}),
    "prefer": ("prefer", {**HELD, "use_weighting": True, "ld_alpha": 0.5}),
    "prefer-aot": ("prefer", {**HELD, "loss": ("aot", "aot_unpaired", "0.3*sft"), "reference": "llama-nano"}),
    "prefer-kto": ("prefer", {**HELD, "loss": ("kto",), "epochs": 0.42}),
}


def torchrun(script: list[str], *, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = started.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        started.terminate()  # and not kill: torchrun then ends its ranks, which would otherwise go on alone
        started.communicate()
        raise
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def changes_of(name: str, small: Small) -> dict[str, Any]:
    changes = {**COMMON, **JOBS[name][1]}
    if "ptx_coef" in changes:
        changes["ptx_data"] = small.chats
    if "eval_every" in changes:
        changes["eval_prompts"] = small.held_out  # 3 of them: the ranks have different numbers
    return changes


@pytest.fixture(scope="module")
def on_two(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with every job's run on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    jobs: dict[str, Any] = {name: (JOBS[name][0], changes_of(name, small)) for name in JOBS}
    # The second rank has nothing to evaluate.
    one = {**COMMON, "epochs": 0.2, "eval_share": 0.01}
    jobs |= {"sft-one": ("sft", one), "reward-one": ("reward", one)}
    jobs["prefer-one"] = ("prefer", {**one, "loss": ("aot", "0.5*sft")})
    (folder / "held_out.jsonl").write_text('{"prompt": "w5 w6"}\n')
    one_prompt = {"eval_prompts": str(folder / "held_out.jsonl"), "steps": 1, "eval_every": 1}
    jobs["ppo-one"] = ("ppo", {**COMMON, **one_prompt})
    jobs["odd"] = ("sft", {**COMMON, "batch_size": 5})
    plan = {"small": {k: str(v) for k, v in dataclasses.asdict(small).items()}, "jobs": jobs}
    (folder / "plan.json").write_text(json.dumps(plan))
    done = torchrun([str(Path(__file__).with_name("ddp_stages.py")), str(folder / "plan.json")], cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_equal_one_process(name: str, small: Small, on_two: Path, tmp_path: Path) -> None:
    alone = small.run(JOBS[name][0], tmp_path / "run", **changes_of(name, small))
    both = metrics(on_two / name)
    assert len(both) == len(alone) >= 2
    for one, two in zip(alone, both, strict=True):
        # A ratio of variances, of which the lower may be near 0.
        assert two.pop("explained_variance", 0) == pytest.approx(one.pop("explained_variance", 0), rel=1e-3)
        assert two == pytest.approx(one, abs=1e-5, rel=1e-5)
    kept = steps_kept(tmp_path / "run")
    assert steps_kept(on_two / name) == kept
    moved, before = 0.0, weights_of_source(JOBS[name][0], small)
    for key, tensor in weights(tmp_path / "run", kept[-1]).items():
        torch.testing.assert_close(weights(on_two / name, kept[-1])[key], tensor, atol=1e-5, rtol=0)
        moved = max(moved, float((tensor - before.get(key, tensor)).abs().max()))
    assert moved > 1e-4  # ten times the tolerance: equality says something


def weights_of_source(stage: str, small: Small) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(small.policy) / "model.safetensors")


def test_samples_of_all_ranks_are_written_in_the_order_of_one_process(
    small: Small, on_two: Path, tmp_path: Path
) -> None:
    small.run("ppo", tmp_path / "run", **changes_of("ppo-rule", small))
    assert (on_two / "ppo-rule" / "samples.jsonl").read_text() == (tmp_path / "run" / "samples.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "key"), [("sft-one", "eval_loss"), ("reward-one", "eval_pairs"), ("prefer-one", "eval_loss")]
)
def test_a_rank_without_held_out_rows_does_no_harm(name: str, key: str, on_two: Path) -> None:
    assert metrics(on_two / name)[-1][key] is not None


def test_a_rank_without_held_out_prompts_does_no_harm(on_two: Path) -> None:
    assert [row["step"] for row in metrics(on_two / "ppo-one") if "eval_score" in row] == [0, 1]


def test_a_batch_that_cannot_be_shared_is_refused(on_two: Path) -> None:
    assert "cannot be shared by 2" in (on_two / "odd.refused").read_text()


def sft(small: Small, output: Path, *more: str) -> list[str]:
    return ["sft", "--model", small.policy, "--data", small.chats, "--output", str(output), *more]


def test_naive_under_torchrun_is_refused(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="--strategy ddp") as refused:
        small.run("sft", tmp_path / "run", strategy="naive")
    assert "WORLD_SIZE=2" in str(refused.value)
    assert refused.value.exit_code == 2


def test_ddp_without_torchrun_is_refused(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(sft(small, tmp_path / "run", "--strategy", "ddp")) == 2
    said = capsys.readouterr().err
    assert "torchrun" in said
    assert "naive" in said


@pytest.mark.slow
def test_the_command_line_under_torchrun(small: Small, tmp_path: Path) -> None:
    """Naive on two ranks ends in the sentence and no run; ddp trains."""
    run = sft(small, tmp_path / "run", "--template", "plain", "--max-len", "48", "--epochs", "1", "--batch-size", "8")
    refused = torchrun(["-m", "kinkajou", *run], cwd=tmp_path)
    assert refused.returncode != 0
    assert "say --strategy ddp" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = torchrun(["-m", "kinkajou", *run, "--strategy", "ddp"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps_kept(tmp_path / "run") == [5]
