"""The numbers of `kinkajou profile`: what a trace says, that rows add up, what they say to change."""

import dataclasses
import re
from typing import Any

import pytest
import torch

from kinkajou import config
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
    twin = torch.optim.AdamW(model.parameters())  # what two hold counts once
    assert not twin.state
    known = {id(x) for x in before}
    found = standing((x for x in holders() if id(x) not in known), scalar="critic")
    assert found.parts == {"critic": 4 * 55, "optimiser state": 2 * 4 * 55 + 2 * 4}  # two moments, a counter each
    assert found.gradients == 4 * 55
