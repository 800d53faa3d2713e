"""`kinkajou profile`: what it prints for every stage, what it leaves behind, what it refuses."""

import gzip
import json
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kinkajou import config
from kinkajou.cli import main
from small import Small


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    return work


def recipe(here: Path, small: Small, stage: str, **changes: object) -> Path:
    """The small settings of a stage, whose own steps and warm-up are no business of a profile."""
    flat = {k: v for k, v in config.flat(small.settings(stage, "-")).items() if k in KEPT or k == "reward"}
    flat |= {"warmup": 0.5, **({"steps": 77} if stage in ("ppo", "grpo") else {}), **changes}
    path = here.parent / f"{stage}.toml"
    path.write_text(config.to_toml({stage: flat}))
    return path


KEPT = {"data", "prompts", "model", "template", "max_len", "batch_size", "prompts_per_step", "group_size"}
KEPT |= {"minibatch_size", "max_new_tokens"}
PHASES = {
    "sft": {"data", "update", "rest"},
    "reward": {"data", "update", "rest"},
    "prefer": {"data", "update", "rest"},
    "ppo": {"rollout", "score", "update", "rest"},
    "grpo": {"rollout", "score", "update", "rest"},
}


def first_level(text: str) -> dict[str, float]:
    table = text.split("Time of a step\n")[1].split("\n\n")[0].splitlines()[1:]
    rows = [re.match(r"(\w+) +[\d.]+ +([\d.]+) %", line) for line in table]
    return {row[1]: float(row[2]) for row in rows if row}


@pytest.mark.parametrize("stage", list(PHASES))
def test_every_stage(small: Small, here: Path, capsys: pytest.CaptureFixture[str], stage: str) -> None:
    path = recipe(here, small, stage)
    assert main(["profile", str(path), "--steps", "1", "--warmup", "0"]) == 0
    text = capsys.readouterr().out
    shares = first_level(text)
    assert shares.pop("step") == 100.0
    assert set(shares) == PHASES[stage]
    assert sum(shares.values()) == pytest.approx(100, abs=0.3)  # each is rounded to 0.1
    rows = {"forward", "trunk", "attention", "head", "backward", "clip", "optimizer"}
    rows |= {"prefill", "decode", "sample", "judge"} if "rollout" in shares else set()
    said = set(re.findall(r"^ +(\w+) ", text, re.MULTILINE))
    assert rows <= said, rows - said
    models = {"ppo": {"policy", "critic", "reference", "judges"}, "reward": {"reward model"}, "grpo": {"judges"}}
    assert models.get(stage, {"policy"}) | {"optimiser state"} <= set(
        re.findall(r"^([a-z ]+\w) {2}", text, re.MULTILINE)
    )
    assert [p.name for p in here.iterdir()] == ["profile-trace.json"]
    assert not list((here.parent / "temporary").iterdir())
    names = {e.get("name") for e in json.loads((here / "profile-trace.json").read_text())["traceEvents"]}
    assert {"kinkajou/step", "kinkajou/forward", "aten::mm"} <= names


def test_the_users_run_is_untouched(small: Small, here: Path) -> None:
    """Also where it is a run already; flags override the recipe, and no trace is written."""
    run = here / "run"
    run.mkdir()
    (run / "config.toml").write_text("mine")
    path = recipe(here, small, "sft", output=str(run), export=str(here / "export"), save_every=1)
    flags = ["--steps", "2", "--warmup", "0", "--batch-size", "4", "--trace", "none"]
    assert main(["profile", "sft", str(path), *flags]) == 0
    assert [p.name for p in here.iterdir()] == ["run"]
    assert [p.name for p in run.iterdir()] == ["config.toml"]
    assert (run / "config.toml").read_text() == "mine"


def test_a_reference_is_asked_for_no_more_than_the_steps_need(
    small: Small, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(here, small, "prefer", batch_size=8)
    assert main(["profile", str(path), "--steps", "1", "--trace", "t.json.gz"]) == 0
    assert "note: 32 of 40 records" in capsys.readouterr().out  # 1 to warm up, 1 measured, 1 traced, 1 to spare
    with gzip.open(here / "t.json.gz") as file:
        assert json.load(file)["traceEvents"]


def test_memory_is_that_of_the_model(small: Small, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    size = sum(x.numel() * 4 for x in load_file(Path(small.policy) / "model.safetensors").values())
    assert main(["profile", str(recipe(here, small, "sft")), "--steps", "1", "--warmup", "0", "--trace", "none"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^policy +{size / 1e3:.3g} kB", text, re.MULTILINE), text
    assert re.search(rf"^optimiser state +{2 * size / 1e3:.3g} kB", text, re.MULTILINE), text


def fault(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["profile", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_faults_end_in_a_sentence(small: Small, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(here, small, "sft")
    none = here.parent / "none.toml"
    none.write_text("[environment]\nworld = 1\n")
    both = here.parent / "both.toml"
    both.write_text("[sft]\n[ppo]\n")
    text = here.parent / "text.json"
    text.write_text('{"precious": 1}')
    assert "no table of a stage" in fault(capsys, none)
    assert "kinkajou profile sft" in fault(capsys, both)
    assert "unknown stage 'sftt'" in fault(capsys, path, "--stage", "sftt")
    assert "--stepps" in fault(capsys, path, "--stepps", 3)
    assert "--steps must be at least 1" in fault(capsys, path, "--steps", 0)
    assert "--warmup must be at least 0" in fault(capsys, path, "--warmup", -1)
    assert "is no folder" in fault(capsys, path, "--trace", here / "gone" / "t.json")
    assert "a trace is a .json or .json.gz file" in fault(capsys, path, "--trace", here.parent)
    assert "is not writable" in fault(capsys, path, "--trace", folder_like(here))
    assert "is no trace" in fault(capsys, path, "--trace", text)
    assert text.read_text() == '{"precious": 1}'
    assert not list((here.parent / "temporary").iterdir())


def folder_like(here: Path) -> Path:
    path = here.parent / "folder.json"
    path.mkdir()
    return path


def test_one_process(small: Small, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "of one process" in fault(capsys, recipe(here, small, "sft"))


def test_a_strategy_of_several_processes_is_not_profiled_in_silence(
    small: Small, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", str(recipe(here, small, "sft")), "--steps", "1", "--strategy", "zero3"]) == 0
    assert "profiled as one process, not as zero3" in capsys.readouterr().out


@pytest.mark.parametrize("number", [1, 3])
def test_interrupted(
    small: Small, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """In a plain step and in the traced one; the profiler is free again."""
    from kinkajou.train import fit

    calls: Iterator[int] = iter(range(1, 9))
    real = fit.update

    def interrupted(*args: Any, **kwargs: Any) -> dict[str, float]:
        if next(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(fit, "update", interrupted)
    path = recipe(here, small, "sft")
    assert main(["profile", str(path), "--steps", "1"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(here.iterdir())
    assert not list((here.parent / "temporary").iterdir())
    assert main(["profile", str(path), "--steps", "1", "--trace", "none"]) == 0


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "sft", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Steps that are measured" in text
    assert "perfetto" in text
    assert "Share of the steps over which the learning rate rises" not in text  # --warmup is the profile's own
    assert main(["profile", "--help"]) == 0
    assert "--warmup" in capsys.readouterr().out
