"""The page of `kinkajou profile`: tables of time, memory and operators, and what they mean."""

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kinkajou.train.profile_advice import advice
from kinkajou.train.profile_rows import Measured, Memory, Row, memory_rows, place, time_rows
from kinkajou.train.profile_trace import Traced
from kinkajou.train.tables import grid, head

MOST = 10
"""Operators shown."""
LONGEST = 44
ENGINE_PREFIX = "autograd::engine::evaluate_function: "
SMALL = 0.0005
"""Share of a step below which the rest of a row is not shown."""


def page(cfg: Any, measured: Measured, traced: Traced) -> Iterator[RenderableType]:
    rows, memory = time_rows(measured, traced), memory_rows(measured, traced)
    yield Text()
    threads = f"{measured.threads} thread{'s' if measured.threads > 1 else ''}"
    yield Text(f"{measured.device}, {threads}, {cfg.base.dtype}. {of_steps(measured, traced)}")
    yield head("Time of a step")
    yield time_table(rows)
    yield head(f"Memory of {'the GPU' if traced.device else 'the process'} at its peak, {readable(memory.peak)}")
    yield memory_table(memory)
    yield head("Memory by phase")
    yield phase_table(measured, traced)
    yield head(f"Operators, the {MOST} most expensive, without what they call")
    yield operator_table(traced)
    yield head("What it means")
    for sentence in advice(cfg, measured, traced, rows, memory):
        yield Text(sentence[0].upper() + sentence[1:])


def of_steps(measured: Measured, traced: Traced) -> str:
    low, high, n = measured.all_s[0], measured.all_s[-1], len(measured.all_s)
    said = f"{n} steps of {low:.3g} to {high:.3g} s: below is that of {measured.step_s:.3g} s. "
    if n == 1:
        said = f"One step of {low:.3g} s. "
    slower = traced.wall_s / measured.step_s - 1
    said += f"How its phases divide is that of a traced step of {traced.wall_s:.3g} s "
    said += f"({100 * slower:+.0f} % with the profiler on)."
    if high > 1.3 * low or slower < -0.1:
        said += " Steps differ much: other work on this machine, or answers of other lengths."
    return said


def time_table(rows: list[Row]) -> Table:
    table = grid("phase", "s a step", "share", "tokens/s")
    for row in rows:
        if row.path[1:] and row.name == "rest" and row.share < SMALL:
            continue
        speed = "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}"
        table.add_row("  " * (len(row.path) - 1) + row.name, seconds(row.seconds), f"{100 * row.share:.1f} %", speed)
    whole = [row for row in rows if len(row.path) == 1]
    table.add_row(
        "step", seconds(sum(row.seconds for row in whole)), f"{100 * sum(row.share for row in whole):.1f} %", ""
    )
    return table


def memory_table(memory: Memory) -> Table:
    table = grid("what", "bytes", "share")
    for row in memory.rows:
        table.add_row(row.name, readable(row.size), "" if row.share is None else f"{100 * row.share:.1f} %")
    return table


def phase_table(measured: Measured, traced: Traced) -> Table:
    """The peak of a whole phase, and how much its tensors and those of its parts grow."""
    table = grid("phase", "peak", "tensors made, alive at once")
    for phase in sorted(measured.phase_s, key=place):
        scope = traced.step.inner.get(phase)
        table.add_row(phase, readable(measured.peaks.get(phase, 0)), readable(scope.growth) if scope else "")
        for inner in sorted(scope.inner.values(), key=lambda x: place(x.name)) if scope else ():
            table.add_row(f"  {inner.name}", "", readable(inner.growth))
    return table


def operator_table(traced: Traced) -> Table:
    whole = traced.device_s if traced.device else traced.wall_s
    table = grid("operator", "s", "of GPU time" if traced.device else "share", "calls")
    for item in traced.operators[:MOST]:
        name = item.name.removeprefix(ENGINE_PREFIX)
        name = name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
        table.add_row(Text(name), seconds(item.seconds), f"{100 * item.seconds / whole:.1f} %", f"{item.calls:,}")
    if traced.device:
        idle = max(0.0, traced.wall_s - traced.device_s)
        table.add_row("(the GPU is idle)", seconds(idle), "", "")
    else:
        table.add_row("(in no operator)", seconds(traced.outside_s), f"{100 * traced.outside_s / whole:.1f} %", "")
    return table


def seconds(x: float) -> str:
    return f"{x:.4f}" if x < 1 else f"{x:.3f}"


def readable(size: int) -> str:
    for unit, divisor in (("GB", 1e9), ("MB", 1e6)):
        if size >= divisor:
            return f"{size / divisor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
