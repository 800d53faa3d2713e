"""`kinkajou plan`: tables, JSON, refusals, sizes; the plan before and after a run."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kinkajou import config
from kinkajou.cli import main
from kinkajou.config.tools import size_of
from kinkajou.errors import UserError
from kinkajou.train import planned
from small import Small

SEVEN = ("--model", "llama-7b")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


BROKEN = [
    ({"hidden_size": "x"}, "hidden_size"),
    ({"num_attention_heads": 0}, "zero"),
    ({"hidden_size": 100, "num_attention_heads": 7}, "multiple"),
    ({"vocab_size": 0}, "vocab_size 0"),
    ({"num_hidden_layers": -1}, "num_hidden_layers -1"),
]


@pytest.mark.parametrize(("change", "word"), BROKEN, ids=str)
def test_a_broken_config_is_a_sentence(
    change: dict[str, object], word: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "config.json").write_text(json.dumps({"model_type": "llama", **change}))
    code, _, err = said(capsys, "sft", "--model", here)
    assert code == 2
    assert "the settings of the model" in err
    assert word in err


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["plan", *map(str, words)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "size"),
    [("24GB", 24 * 2**30), ("1.5 TiB", 3 * 2**39), ("800m", 800 * 2**20), ("17", 17), ("64 g", 64 * 2**30)],
)
def test_sizes(words: str, size: int) -> None:
    assert size_of(words, "memory") == size


@pytest.mark.parametrize("words", ["", "GB", "-1GB", "24 GBit", "1e9", "0", "9999999T"])
def test_what_is_no_size(words: str) -> None:
    with pytest.raises(UserError, match="--memory is no size of memory"):
        size_of(words, "memory")


def test_seven_billion_on_one_card(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "sft", *SEVEN, "--memory", "24GB", "--lora-rank", 8)
    assert code == 0
    assert "SFT of llama-7b: 6.74 B parameters, naive, 1 GPU, fp32, LoRA of rank 8" in out
    assert "does not fit: peak" in out
    assert "The smallest changes that make it fit" in out
    assert "25.2 GiB" in out  # 6.76e9 float32 numbers


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"ema_decay": 0.9}], ids=str)
def test_what_a_checkpoint_takes(
    changes: dict[str, float], small: Small, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the tensors of a real one."""
    stage = "ppo" if "ema_decay" in changes else "sft"
    small.run(stage, here / "run", **changes)
    (last,) = (here / "run" / "checkpoints").iterdir()
    there = sum(x.nbytes for path in last.rglob("*.safetensors") for x in load_file(path).values())
    own = [f"--{name}={value}" for name, value in changes.items()]
    reads = ("--reward", small.judge) if stage == "ppo" else ()
    capsys.readouterr()
    _, out, _ = said(capsys, stage, "--model", small.policy, *reads, *own, "--json")
    assert json.loads(out)["checkpoint"]["disk"] == pytest.approx(there, rel=0.03)


def test_json_of_a_sharded_ppo(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpus", 8, "--memory", "80GB", "--host", "512GB", "--strategy", "zero3", "--dtype", "bf16", "--json")
    code, out, fault = said(capsys, "ppo", *SEVEN, *words)
    assert code == 0, fault
    found = json.loads(out)
    assert found["parameters"] == 6_738_415_616
    assert set(found["phases"]) == {"load", "rollout", "scoring", "policy update", "critic update"}
    assert found["standing"]["device"]["policy"] == round(4 * 6_738_415_616 / 8)
    assert found["fits"] is True
    assert found["estimate"]["seconds"]["rollout"] > 0


def test_a_recipe_finds_its_stage(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "r.toml").write_text('[grpo]\nmodel = "llama-tiny"\nprompts = "p"\nreward = "rule:ended"\nsteps = 7\n')
    code, out, _ = said(capsys, here / "r.toml", "--host", "8GB", "--gpu", "cpu")
    assert code == 0
    assert "GRPO of llama-tiny" in out
    assert "fits: main memory of a machine" in out


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--gpus", 4), "strategy 'naive' is one process"),
        (("--gpus", 3, "--tp", 2, "--strategy", "zero3"), "--tp does not divide"),
        (("--gpu", "h10"), "unknown GPU 'h10'"),
        (("--memory", "lots"), "--memory is no size of memory"),
        (("--gpus", 0), "--gpus must be at least 1"),
        (("--gpus", "two"), "two"),
    ],
)
def test_bad_flags(words: tuple[object, ...], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said_fault = said(capsys, "sft", *SEVEN, *words)
    assert code == 2
    assert fault in said_fault


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, fault = said(capsys, "sft", "--model", "nowhere/at-all")
    assert code == 2
    assert "llama-7b" in fault  # names that would do


def test_a_run_tells_its_plan_at_the_end(small: Small, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.run("sft", here / "run")
    assert "memory: planned " in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["sft", "reward", "prefer", "ppo", "grpo"])
def test_a_certain_lack_of_memory_is_refused(
    stage: str, small: Small, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned, "host_memory", lambda: 100_000)
    with pytest.raises(UserError, match="cannot fit into memory") as fault:
        small.run(stage, here / "run")
    assert "of main memory, of which the machine has" in (fault.value.evidence or "")
    assert not (here / "run" / "checkpoints").exists()


def test_a_run_without_preflight_is_not_refused(small: Small, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "host_memory", lambda: 100_000)
    assert small.run("sft", here / "run", preflight="off")


def test_defaults_name_no_machine() -> None:
    assert config.PlanConfig().memory_bytes is None
    assert config.PlanConfig(host="2T").host_bytes == 2**41
