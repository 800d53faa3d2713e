"""Writes the report of a run, or of the runs of a whole pipeline, as one HTML file."""

import base64
import hashlib
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from kinkajou.errors import UserError
from kinkajou.report.catalogue import STAGE_TITLES, title_of
from kinkajou.report.figures import lead_picture, stage_figures, value_near
from kinkajou.report.findings import count_of, finding_cards
from kinkajou.report.folder import Stage, number, read_stages
from kinkajou.report.samples import comparison, sample_browser
from kinkajou.report.scale import column, duration, readable
from kinkajou.report.text import escape, prose

# What each kind of stage is judged by: the first of these that was measured.
_HEADLINES = {
    "sft": ("eval_loss", "loss"),
    "reward": ("eval_accuracy", "accuracy"),
    "prefer": ("eval_accuracy", "accuracy", "eval_loss", "loss"),
    "grpo": ("eval_gold", "gold", "eval_score", "score"),
    "ppo": ("eval_gold", "gold", "eval_score", "score"),
}
_ANY_HEADLINE = ("eval_gold", "eval_accuracy", "eval_score", "score", "eval_loss", "loss")


def write_report(folder: Path) -> Path:
    """Writes `folder`/report.html and returns its path.

    `folder` is a run folder, or holds run folders. Raises UserError where there is nothing to report.
    """
    folder = Path(folder)
    stages, summary, notes = read_stages(folder)
    page = _page(folder, stages, summary, notes)
    target, aside = folder / "report.html", folder / f".report.html.{os.getpid()}"
    try:
        # Written aside first, so that a browser never loads half a page while a run goes on.
        aside.write_bytes(page.encode())
        os.replace(aside, target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {target}", evidence=str(error), fix="make the folder writable, or free some space"
        ) from error
    return target


def _page(folder: Path, stages: list[Stage], summary: dict[str, Any], notes: list[str]) -> str:
    style, script = (files("kinkajou.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    alone = len(stages) == 1 and not summary
    title = escape(summary.get("title") or (_title(stages[0]) if alone else folder.resolve().name), 200)
    lead = f'<p class="intro">{prose(summary["lead"])}</p>' if summary.get("lead") else ""
    body = [
        f'<header><p class="name">Kinkajou run report</p><h1>{title}</h1>{lead}'
        f"{'' if alone else _overview(stages)}{_notices(notes)}</header>",
        _picture(stages, summary),
        comparison(summary),
        *_tables(summary),
        f'<section class="next"><h2>Next</h2><p>{prose(summary["next"])}</p></section>' if summary.get("next") else "",
        *(_stage(index, stage, alone=alone) for index, stage in enumerate(stages, 1)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{title} · Kinkajou</title><style>{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main><script>{script}</script></body></html>\n"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _title(stage: Stage) -> str:
    title = STAGE_TITLES.get(stage.kind, "")
    return " · ".join(part for part in (title, "" if stage.name == stage.kind and title else stage.name) if part)


def _notices(notes: list[str]) -> str:
    return "".join(f'<p class="notice">{escape(note)}</p>' for note in notes)


def _state(stage: Stage) -> str:
    planned = stage.planned_steps
    if not stage.series:
        return "no step recorded yet"
    if planned is None:
        return f"recorded up to step {stage.last_step:,}"
    if stage.last_step >= planned:
        return "complete"
    return f"{stage.last_step:,} of {planned:,} steps: still running, or stopped early"


def _overview(stages: list[Stage]) -> str:
    items = []
    for index, stage in enumerate(stages, 1):
        items.append(
            f'<li><a href="#stage-{index}">{escape(_title(stage))}</a>{_headline(stage)}'
            f"<small>{_extent(stage)}</small>{_found(stage)}</li>"
        )
    return f'<ol class="overview">{"".join(items)}</ol>'


def _found(stage: Stage) -> str:
    return f'<small class="warning">{count_of(stage)}</small>' if stage.findings else ""


def _extent(stage: Stage) -> str:
    steps = f"{stage.num_steps:,} step{'' if stage.num_steps == 1 else 's'}"
    state = "" if stage.last_step >= (stage.planned_steps or 0) else f" of {stage.planned_steps:,}"
    return f"{steps}{state} · {duration(stage.time_s)}"


def _headline(stage: Stage) -> str:
    for key in _HEADLINES.get(stage.kind, _ANY_HEADLINE):
        points = stage.series.get(key, [])
        finite = [value for _, value in points if value is not None]
        if not finite:
            continue
        kept = value_near(points, stage.best_step) if stage.best_step is not None else None
        end = finite[-1] if kept is None else kept
        where = "" if kept is None else f", kept at step {stage.best_step:,}"
        return (
            f'<span class="headline"><span>{escape(title_of(stage.kind, key))}{where}</span>'
            f"{readable(finite[0]) + ' → ' if len(finite) > 1 else ''}<b>{readable(end)}</b></span>"
        )
    return ""


def _picture(stages: list[Stage], summary: Mapping[str, Any]) -> str:
    given = summary.get("picture")
    picture = given if isinstance(given, dict) else {}
    wanted = picture.get("stage")
    for stage in reversed(stages):
        if wanted in (None, stage.name) and (drawn := lead_picture(stage, picture)):
            return drawn
    return ""


def _tables(summary: Mapping[str, Any]) -> list[str]:
    given = summary.get("tables")
    tables = [table for table in given if isinstance(table, dict)] if isinstance(given, list) else []
    return [_table(table) for table in tables]


def _table(table: Mapping[str, Any]) -> str:
    given, names = table.get("rows"), table.get("columns")
    rows = [row for row in given if isinstance(row, list)] if isinstance(given, list) else []
    head = "".join(f"<th>{escape(name)}</th>" for name in names) if isinstance(names, list) else ""
    width = max((len(row) for row in rows), default=0)
    columns = [_cells([row[index] if index < len(row) else None for row in rows]) for index in range(width)]
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in zip(*columns, strict=True))
    title = f"<h2>{escape(table['title'])}</h2>" if table.get("title") else ""
    note = f"<p>{prose(table['note'])}</p>" if table.get("note") else ""
    return (
        f'<section>{title}<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}</section>"
    )


def _cells(values: list[object]) -> list[str]:
    plain = [None if isinstance(value, bool) else number(value) for value in values]
    texts = iter(column([value for value in plain if value is not None]))
    return [
        f'<td class="n">{next(texts)}</td>'
        if value is not None
        else f"<td>{'n/a' if cell is None else escape(cell)}</td>"
        for cell, value in zip(values, plain, strict=True)
    ]


def _stage(index: int, stage: Stage, *, alone: bool) -> str:
    facts = {
        "state": _state(stage),
        "steps": f"{stage.num_steps:,}",
        "wall time": duration(stage.time_s),
        "folder": escape(stage.name),
    }
    if stage.best_step is not None:
        value, metric = (
            number(stage.best.get("value")),
            title_of(stage.kind, str(stage.best.get("metric", ""))),
        )
        facts["kept"] = f"step {stage.best_step:,}"
        facts["kept"] += f" ({escape(metric)} {readable(value)})" if value is not None else ""
    listed = "".join(f"<div><dt>{name}</dt><dd>{said}</dd></div>" for name, said in facts.items())
    heading = "" if alone else f"<h2>{escape(_title(stage))}</h2>"
    return (
        f'<section class="stage" id="stage-{index}">{heading}<dl>{listed}</dl>'
        f"{_notices(stage.notes)}{finding_cards(stage)}{stage_figures(stage)}{sample_browser(stage)}{_settings(stage.config)}</section>"
    )


def _settings(config: Mapping[str, Any]) -> str:
    loose = {key: value for key, value in config.items() if not isinstance(value, dict)}
    tables = {"": loose} if loose else {}
    tables |= {key: value for key, value in config.items() if isinstance(value, dict)}
    blocks = []
    for name, table in tables.items():
        rows = "".join(
            f'<tr><th scope="row">{escape(key)}</th><td>{escape(value, 400)}</td></tr>' for key, value in table.items()
        )
        caption = f"<caption>[{escape(name)}]</caption>" if name else ""
        blocks.append(f"<table>{caption}<tbody>{rows}</tbody></table>")
    count = sum(len(table) for table in tables.values())
    if not count:
        return ""
    return (
        f'<details class="settings"><summary>Settings <small>config.toml, {count} values</small></summary>'
        f'<div class="tables">{"".join(blocks)}</div></details>'
    )
