"""`kinkajou profile`: what it reads out of a trace, that its rows add up, what it prints, leaves behind and refuses."""

import dataclasses
import gzip
import json
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kinkajou import config
from kinkajou.cli import main
from kinkajou.train.profile_advice import of_memory, of_time
from kinkajou.train.profile_memory import Standing, holders, standing
from kinkajou.train.profile_rows import PASSING, Held, Measured, Memory, Row, memory_rows, time_rows
from kinkajou.train.profile_trace import Traced, read
from small import Small

MAIN, OTHER = 7, 8


def scope(name: str, start: float, end: float, thread: int = MAIN) -> dict[str, Any]:
    return event("user_annotation", f"kinkajou/{name}", start, end, thread)


def op(name: str, start: float, end: float, thread: int = MAIN) -> dict[str, Any]:
    return event("cpu_op", name, start, end, thread)


def event(kind: str, name: str, start: float, end: float, thread: int = MAIN, **args: int) -> dict[str, Any]:
    """Milliseconds."""
    return {"cat": kind, "name": name, "ts": 1000 * start, "dur": 1000 * (end - start), "tid": thread, "args": args}


def bytes_at(moment: float, size: int, place: int, device: int = 0) -> dict[str, Any]:
    args = {"Bytes": size, "Addr": place, "Device Type": device}
    return {"cat": "cpu_instant_event", "name": "[memory]", "ts": 1000 * moment, "tid": MAIN, "args": args}


STEP = [
    scope("step", 0, 100),
    scope("rollout", 0, 40),
    scope("prefill", 5, 15),
    scope("trunk", 6, 14),  # no row of its own
    scope("attention", 7, 10),
    scope("cache", 7, 8),
    scope("decode", 15, 25),
    scope("decode", 25, 35),
    scope("train", 40, 90),  # as stages on records call their update
    scope("forward", 45, 60),
    scope("head", 50, 60),
    scope("backward", 60, 80),
    scope("attention", 65, 70),  # recomputed
    scope("attention", 62, 66, OTHER),
    scope("optimizer", 80, 85),
    op("aten::mm", 6, 14),
    op("aten::copy_", 8, 9),
    op("aten::mm", 50, 56),
    op("aten::mm", 60, 61, OTHER),
    bytes_at(7.5, 300, 1),
    bytes_at(39, -300, 1),
    bytes_at(46, 1000, 2),
    bytes_at(55, 500, 3),
    bytes_at(61, -1000, 2),
    bytes_at(70, 900, 4),
    bytes_at(84, -900, 4),
]


def ms(traced: Traced, *path: str) -> float:
    found = traced.step.at(*path)
    assert found, path
    return pytest.approx(1000 * found.seconds)  # type: ignore[return-value]


def test_scopes_of_a_trace() -> None:
    found = read(STEP)
    assert not found.device
    assert found.wall_s == pytest.approx(0.1)
    assert set(found.step.inner) == {"rollout", "update"}
    assert set(found.step.inner["rollout"].inner) == {"prefill", "decode"}
    assert ms(found, "rollout", "prefill") == 10
    assert ms(found, "rollout", "prefill", "attention") == 3
    assert ms(found, "rollout", "decode") == 20
    assert ms(found, "update") == 50
    assert ms(found, "update", "forward", "head") == 10
    assert ms(found, "update", "backward") == 20
    backward = found.step.at("update", "backward")
    assert backward
    assert not backward.inner


def test_operators_without_what_they_call() -> None:
    found = read(STEP)
    assert [(item.name, item.calls) for item in found.operators] == [("aten::mm", 2), ("aten::copy_", 1)]
    assert [item.seconds for item in found.operators] == pytest.approx([0.013, 0.001])
    assert found.outside_s == pytest.approx(0.086)


def test_memory_of_a_trace() -> None:
    found = read(STEP)
    growth = {path: found.step.at(*path).growth for path in [("rollout",), ("update",), ("update", "backward")]}  # type: ignore[union-attr]
    assert growth == {("rollout",): 300, ("update",): 1500, ("update", "backward"): 0}
    assert found.cache == 300
    assert found.peak.made == 1500
    assert found.peak.path == ("update", "forward", "head")
    assert not found.peak.has_gradients
    assert found.peak.cache == 0


def test_a_gpu_is_asked_for_its_own_time() -> None:
    """A kernel belongs to the scope and operator that launched it; what overlaps counts once."""
    launches = [
        event("cuda_runtime", "cudaLaunchKernel", 6, 7, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 51, 52, correlation=2),
        event("cuda_runtime", "cudaGraphLaunch", 62, 63, OTHER, correlation=3),
        event("kernel", "gemm", 30, 50, 1, correlation=1),
        event("kernel", "gemm", 50, 60, 1, correlation=2),
        event("kernel", "reduce", 55, 75, 2, correlation=3),
    ]
    found = read([*STEP, *launches, bytes_at(46, 70, 5, device=1)])
    assert found.device
    assert found.device_s == pytest.approx(0.045)
    assert ms(found, "rollout", "prefill") == 20
    assert ms(found, "update", "forward", "head") == 10
    assert ms(found, "update", "backward") == 15
    assert [(item.name, item.calls) for item in found.operators] == [("aten::mm", 2), ("cudaGraphLaunch", 1)]
    assert found.peak.made == 70  # memory of the host is not counted
    rows = time_rows(measured(), found)
    levels_add_up(rows)
    assert ("update", "GPU waits") in {row.path for row in rows}


def measured(**changes: Any) -> Measured:
    own: dict[str, Any] = {
        "step_s": 0.05,
        "all_s": [0.05],
        "phase_s": {"rollout": 0.02, "update": 0.028},
        "phase_tokens": {"rollout": 10, "update": 28},
        "peaks": {"rollout": 9000, "update": 10_000},
        "standing": Standing({"policy": 2000, "optimiser state": 4000}, gradients=2000),
        "device": "CPU",
        "threads": 1,
    }
    return Measured(**{**own, **changes})


def levels_add_up(rows: list[Row]) -> None:
    """Rows of each level to the row above, the first level and all leaves to 1."""
    for path in {row.path[:-1] for row in rows}:
        below = sum(row.share for row in rows if row.path[:-1] == path)
        above = next((row.share for row in rows if row.path == path), 1.0)
        assert below == pytest.approx(above), path
    assert sum(row.share for row in rows if row.is_leaf) == pytest.approx(1)


def test_rows_of_time_add_up() -> None:
    """Phases as timed without the profiler; what is in them as in the trace."""
    rows = time_rows(measured(), read(STEP))
    levels_add_up(rows)
    found = {" ".join(row.path): row for row in rows}
    assert found["rollout"].seconds == 0.02
    assert found["rollout prefill"].seconds == pytest.approx(0.02 * 10 / 40)
    assert found["rollout decode"].tokens_per_s == pytest.approx(10 / (0.02 * 20 / 40))
    assert found["update"].share == pytest.approx(0.56)
    assert found["update forward head"].seconds == pytest.approx(0.028 * 10 / 50)
    assert found["update"].tokens_per_s == pytest.approx(1000)
    assert found["rest"].seconds == pytest.approx(0.002)


def test_rows_of_memory_add_up() -> None:
    memory = memory_rows(measured(), read(STEP))
    assert memory.peak == 10_000
    assert sum(row.share for row in memory.rows if row.share is not None) == pytest.approx(1)
    sizes = {row.name: row.size for row in memory.rows}
    assert sizes["policy"] == 2000
    assert sizes[PASSING] == 1500
    assert sizes["Python, libraries, data"] == 10_000 - 2000 - 4000 - 1500
    gone = {row.name: row.size for row in memory.rows if row.share is None}
    assert gone == {"gradients, later": 2000, "KV cache, in rollouts": 300}


def test_gradients_that_lie_at_the_peak() -> None:
    """900 bytes come in the backward pass, before anything else has gone."""
    late = [e for e in STEP if not (e["name"] == "[memory]" and e["args"]["Addr"] == 2 and e["args"]["Bytes"] < 0)]
    found = read(late)
    assert found.peak.path == ("update", "backward")
    assert found.peak.made == 2400
    sizes = {row.name: row.size for row in memory_rows(measured(standing=Standing(gradients=800)), found).rows}
    assert (sizes["gradients"], sizes[PASSING]) == (800, 1600)


# --- the words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "reward", "prefer", "ppo", "grpo"])
@pytest.mark.parametrize("largest", ["rollout", "score", "judge", "data", "optimizer", "head", "attention", "update"])
def test_advice_names_flags_that_the_stage_has(small: Small, stage: str, largest: str) -> None:
    cfg = small.settings(stage, "run")
    if not hasattr(cfg, "rollout") and largest in ("rollout", "score", "judge"):
        return
    for dtype in ("fp32", "bf16"):
        cfg = dataclasses.replace(cfg, base=dataclasses.replace(cfg.base, dtype=dtype))
        path = {"judge": ("rollout", "judge"), "head": ("update", "head"), "attention": ("update", "attention")}
        rows = [Row(path.get(largest, (largest,)), 1.0, 0.9)]
        said = of_time(cfg, measured(), read(STEP), rows)
        said += of_memory(cfg, Standing({"optimiser state": 3}), Memory([Held(PASSING, 2, 0.2)], 10, ()))
        said += of_memory(cfg, Standing(), Memory([Held(PASSING, 2, 0.2)], 10, ()))
        named = {name.rstrip(".,;:") for name in re.findall(r"--(\w+)", said)}
        assert named
        assert named <= set(config.flat(cfg)), said


def test_little_work_at_a_time_is_said() -> None:
    """14 ms of 100 in operators."""
    cfg = config.SFTConfig(
        base=config.ModelConfig(model="m"), source=config.DataConfig(data="d"), run=config.RunConfig(output="o")
    )
    said = of_time(cfg, measured(), read(STEP), [Row(("update",), 1.0, 0.9)])
    assert said.startswith("86 % of a step lies outside of torch's operators")


def test_what_lies_between_two_steps() -> None:
    before = holders()
    model = torch.nn.Linear(10, 5)  # 55 numbers
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    known = {id(x) for x in before}
    found = standing((x for x in holders() if id(x) not in known), scalar="critic")
    assert found.parts == {"critic": 4 * 55, "optimiser state": 2 * 4 * 55 + 2 * 4}  # two moments, a counter each
    assert found.gradients == 4 * 55


# --- the command --------------------------------------------------------------------------------------------


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
