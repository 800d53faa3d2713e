"""Figures of the report: the small charts of a stage, and the lead picture of score against truth."""

import json
from collections.abc import Sequence

from kinkajou.report.catalogue import band_of, panels_of, title_of
from kinkajou.report.curves import Frame, Line, chart, frame, is_noisy, smooth, thin
from kinkajou.report.findings import steps_of
from kinkajou.report.folder import Points, Stage
from kinkajou.report.panels import Panel
from kinkajou.report.scale import column, readable
from kinkajou.report.text import escape, prose

PANEL_HEIGHT = 112
WIDE_HEIGHT = 168
_ROLES = ("train", "second", "third", "fourth")
_LEAD_NAMES = {"score": "The reward model's score", "eval_gold": "The truth, on held-out prompts"}


def stage_figures(stage: Stage) -> str:
    """Every metric of the stage, in titled groups of small charts with one step axis."""
    blocks = []
    for index, (title, panels) in enumerate(panels_of(stage.kind, stage.series)):
        alone = index == 0 and len(panels) == 1 and panels[0].known
        figures = "".join(_panel_figure(stage, panel, WIDE_HEIGHT if alone else PANEL_HEIGHT) for panel in panels)
        blocks.append(f'<h3>{escape(title)}</h3><div class="panels{" alone" if alone else ""}">{figures}</div>')
    steps = f"{stage.first_step},{stage.last_step}"
    return f'<div class="curves" data-steps="{steps}">{"".join(blocks)}</div>'


def lead_picture(stage: Stage, picture: dict[str, object]) -> str:
    """Two metrics of one stage, one above the other on the same steps, each on its own axis.

    Two curves on two y axes in one plot would cross wherever the axes are made to; stacked, they cannot lie.
    """
    keys = [str(picture.get("left", "score")), str(picture.get("right", "eval_gold"))]
    if not all(sum(value is not None for _, value in stage.series.get(key, [])) > 1 for key in keys):
        return ""
    given = picture.get("mark")
    mark = _inside(stage, given if isinstance(given, int) else stage.best_step)
    names = [_LEAD_NAMES.get(key) or _sentence(title_of(stage.kind, key)) for key in keys]
    figures = []
    for key, name, role in zip(keys, names, ("score", "truth"), strict=True):
        line = _line(stage, key, "", role)
        on = frame([line], (stage.first_step, stage.last_step), height=WIDE_HEIGHT)
        assert on is not None  # there is a finite value in each
        unit = "raw and smoothed" if is_noisy(line.points) and not line.dotted else ""
        said = f"step {mark:,}, kept" if role == "score" and mark is not None else " "
        figures.append(_figure([line], on, title=name, unit=unit, note="", mark=mark, said=said))
    title = escape(picture.get("title") or "The reward model's score against the truth")
    note = f"<p>{prose(picture['note'])}</p>" if picture.get("note") else ""
    table = _compared(stage, keys, names, mark) if mark is not None else ""
    curves = f'<div class="curves lead" data-steps="{stage.first_step},{stage.last_step}">{"".join(figures)}</div>'
    return f'<section class="picture"><h2>{title}</h2>{note}{curves}{table}</section>'


def value_near(points: Points, step: int) -> float | None:
    """The finite value nearest to a step."""
    finite = [(abs(at - step), value) for at, value in points if value is not None]
    return min(finite)[1] if finite else None


def _inside(stage: Stage, step: int | None) -> int | None:
    return step if step is not None and stage.first_step <= step <= stage.last_step else None


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _compared(stage: Stage, keys: Sequence[str], names: Sequence[str], mark: int) -> str:
    cells = []
    for key, name in zip(keys, names, strict=True):
        points = stage.series[key]
        # A noisy training number is read off its smoothed line, an evaluation as it is.
        averaged = is_noisy(points) and not key.startswith("eval_")
        line = smooth(points) if averaged else points
        start, kept, end = (value_near(line, at) for at in (stage.first_step, mark, stage.last_step))
        assert start is not None
        assert kept is not None
        assert end is not None
        values = column([start, kept, end, end - kept])
        values[3] = f"{'+' if end > kept else ''}{values[3]}" if mark < stage.last_step else "n/a"
        smoothed = " <small>smoothed</small>" if averaged else ""
        cells.append(
            f'<tr><th scope="row">{escape(name)}{smoothed}</th>'
            + "".join(f"<td>{f'<b>{value}</b>' if index == 1 else value}</td>" for index, value in enumerate(values))
            + "</tr>"
        )
    head = (
        f"<th></th><th>step {stage.first_step:,}</th><th>step {mark:,}, kept</th>"
        f"<th>step {stage.last_step:,}</th><th>change since kept</th>"
    )
    return f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{"".join(cells)}</tbody></table>'


def _panel_figure(stage: Stage, panel: Panel, height: int) -> str:
    roles = iter(_ROLES)
    lines = [
        _line(stage, key, name, "held" if key.startswith("eval_") else next(roles, "fourth"))
        for key, name in panel.series.items()
    ]
    on = frame(
        lines,
        (stage.first_step, stage.last_step),
        height=height,
        include=panel.include,
        min_span=panel.min_span,
        may_be_log=panel.may_be_log,
    )
    unit = panel.unit + (", log scale" if on and on.log else "")
    if on is None:
        steps = max(line.num_gaps for line in lines)
        where = "its only step" if steps == 1 else f"all {steps} steps"
        return (
            f'<figure class="panel empty"><figcaption><b>{escape(panel.title)}</b></figcaption>'
            f'<p class="warning">Not a number at {where}.</p>'
            "</figure>"
        )
    return _figure(
        lines,
        on,
        title=panel.title,
        unit=unit,
        note=panel.read,
        mark=_inside(stage, stage.best_step),
        reference=panel.reference,
        known=panel.known,
        found=[(step, name) for step, name in steps_of(stage, panel.keys) if _inside(stage, step) is not None],
    )


def _figure(
    lines: list[Line],
    on: Frame,
    *,
    title: str,
    unit: str,
    note: str,
    mark: int | None,
    said: str = "",
    reference: tuple[float, str] | None = None,
    known: bool = True,
    found: Sequence[tuple[int, str]] = (),
) -> str:
    remarks = [remark for line in lines for remark in _remarks(line, on)]
    remarks += [
        f'<span class="warning"><code>{escape(name, 80)}</code> at step {step:,}.</span>' for step, name in found
    ]
    lines = [line for line in lines if line.values]
    named = len(lines) > 1 or lines[0].name == "held-out"
    legend = "".join(
        (f'<span class="key {line.role}">{escape(line.name)} ' if named else '<span><small class="last">last</small> ')
        + f"<output>{readable(line.values[-1])}</output></span>"
        for line in lines
    )
    points = [_hover_points(line) for line in lines]
    label = escape(f"{title}: " + "; ".join(_in_words(line) for line in lines))
    shown = f"<b>{escape(title)}</b>" if known else f"<code>{escape(title, 60)}</code>"
    drawing = chart(
        lines, on, label=label, reference=reference, mark=mark, said=said, found=[step for step, _ in found]
    )
    read = " ".join([escape(note), *remarks]).strip()
    return (
        f'<figure class="panel" data-points="{json.dumps(points, separators=(",", ":"))}">'
        f"<figcaption><span>{shown} <small>{escape(unit)}</small></span>"
        f'<span class="now">{legend}</span></figcaption>'
        f"{drawing}{f'<p>{read}</p>' if read else ''}</figure>"
    )


def _line(stage: Stage, key: str, name: str, role: str) -> Line:
    low, high = band_of(key)
    points = stage.series[key]
    # Evaluations are few and each is a measurement: they get a dot each and are not averaged.
    return Line(
        name=name,
        role=role,
        points=points,
        low=stage.series.get(low, []),
        high=stage.series.get(high, []),
        dotted=key.startswith("eval_"),
    )


def _hover_points(line: Line) -> list[list[float | None]]:
    kept = thin(line.points)
    steps = [step for step, _ in kept]
    # Differences are a third of the length.
    jumps = [float(b - a) for a, b in zip([0, *steps], steps, strict=False)]
    values = [None if value is None else float(f"{value:.4g}") for _, value in kept]
    return [[_whole(jump) for jump in jumps], [_whole(value) for value in values]]


def _whole(value: float | None) -> float | None:
    return int(value) if value is not None and abs(value) < 1e15 and value == int(value) else value


def _in_words(line: Line) -> str:
    finite = [(value, step) for step, value in line.points if value is not None]
    name = f"{line.name} " if line.name else ""
    (first, _), (last, end), (low, at_low), (high, at_high) = finite[0], finite[-1], min(finite), max(finite)
    return (
        f"{name}from {readable(first)} to {readable(last)} at step {end}, "
        f"lowest {readable(low)} at step {at_low}, highest {readable(high)} at step {at_high}"
    )


def _remarks(line: Line, on: Frame) -> list[str]:
    remarks = []
    if line.num_gaps:
        steps = f"{line.num_gaps} step{'s' if line.num_gaps > 1 else ''}"
        remarks.append(f'<span class="warning">Not a number at {steps} (red ticks).</span>')
    if line.low and line.high:
        remarks.append("The band is its confidence interval.")
    outside = [value for value in line.values if not on.low <= value <= on.high]
    if outside:
        extreme = max(outside, key=abs)
        count = "1 value lies" if len(outside) == 1 else f"{len(outside)} values lie"
        remarks.append(f"{count} off this axis, as far as {readable(extreme)}.")
    return remarks
