"""What the model wrote: samples of a few steps, and the same prompts before and after."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kinkajou.report.folder import Stage, number
from kinkajou.report.scale import column, readable
from kinkajou.report.text import escape

MAX_STEPS = 5
ROWS_PER_STEP = 6
PROMPT_CHARS = 500
RESPONSE_CHARS = 900
_OWN_PLACE = ("step", "prompt", "response", "score", "gold", "ended")


def sample_browser(stage: Stage) -> str:
    """A table for each of a few steps; the page's script turns them into tabs."""
    if not stage.samples:
        return ""
    steps = chosen_steps(sorted(stage.samples), stage.best_step)
    shared = Counter(str(sample.get("prompt")) for step in steps for sample in stage.samples[step])
    # Prompts that come back at other steps lead, in one order: flipping the tabs shows each answer change.
    order = {prompt: index for index, (prompt, _) in enumerate(shared.most_common())}
    sections = []
    for step in steps:
        rows = sorted(stage.samples[step], key=lambda sample: order[str(sample.get("prompt"))])[:ROWS_PER_STEP]
        kept = " (kept)" if step == stage.best_step else ""
        sections.append(
            f'<section class="step" data-name="step {step:,}{kept}"><h4>Step {step:,}{kept}</h4>'
            f"{_table(rows)}</section>"
        )
    return f'<h3>What it wrote</h3><div class="samples">{"".join(sections)}</div>'


def chosen_steps(steps: Sequence[int], best: int | None, most: int = MAX_STEPS) -> list[int]:
    """The first, the last, and a few between; the best one always, where it is among them."""
    if len(steps) <= most:
        return list(steps)
    chosen = [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]
    if best is not None and best in steps and best not in chosen:
        _, nearest = min((abs(chosen[index] - best), index) for index in range(1, most - 1))
        chosen[nearest] = best
    return sorted(chosen)


def comparison(summary: Mapping[str, Any]) -> str:
    """The same prompts answered before and after, side by side."""
    given = summary.get("comparison")
    rows = given.get("rows") if isinstance(given, dict) else None
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not rows or not isinstance(given, dict):
        return ""
    before, after = escape(given.get("before", "before")), escape(given.get("after", "after"))
    body = "".join(
        f'<tr><td class="prompt">{_text(row.get("prompt"), PROMPT_CHARS)}</td>'
        f'<td data-label="{before}">{_text(row.get("before"), RESPONSE_CHARS)}'
        f"{_score(row.get('before_score'))}</td>"
        f'<td data-label="{after}">{_text(row.get("after"), RESPONSE_CHARS)}'
        f"{_score(row.get('after_score'), row.get('before_score'))}</td></tr>"
        for row in rows
    )
    pairs = [(number(row.get("before_score")), number(row.get("after_score"))) for row in rows]
    scored = [(old, new) for old, new in pairs if old is not None and new is not None]
    mean = ""
    if scored:
        old, new = (sum(side) / len(scored) for side in zip(*scored, strict=True))
        better = sum(b > a for a, b in scored)
        mean = (
            f"<p>Mean score {readable(old)} → <b>{readable(new)}</b>; "
            f"the second answer scores higher on {better} of {len(scored)}.</p>"
        )
    title = escape(given.get("title") or "The same prompts, before and after")
    return (
        f'<section class="comparison"><h2>{title}</h2>{mean}<table class="cards"><thead><tr><th>prompt</th>'
        f"<th>{before}</th><th>{after}</th></tr></thead><tbody>{body}</tbody></table></section>"
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head, columns = "", []
    for key in ("score", "gold"):
        values = [number(row.get(key)) for row in rows]
        if any(value is not None for value in values):
            head += f'<th class="n">{key}</th>'
            texts = iter(column([value for value in values if value is not None]))
            shown = ["n/a" if value is None else next(texts) for value in values]
            columns.append([f'<td class="n" data-label="{key}">{text}</td>' for text in shown])
    cells = list(zip(*columns, strict=True)) or [()] * len(rows)
    body = "".join(f"<tr>{_said(row)}{''.join(cell)}</tr>" for row, cell in zip(rows, cells, strict=True))
    return (
        f'<table class="cards"><thead><tr><th>prompt</th><th>response</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _said(row: Mapping[str, Any]) -> str:
    more = {key: number(value) for key, value in row.items() if key not in _OWN_PLACE}
    small = " · ".join(f"{escape(key, 40)} {readable(value)}" for key, value in more.items() if value is not None)
    if row.get("ended") is False:
        end = '<span class="cutoff" title="stopped by the length limit">cut off</span>'
    else:
        end = '<span class="end" title="ended by itself">end</span>' if row.get("ended") else ""
    return (
        f'<td class="prompt">{_text(row.get("prompt"), PROMPT_CHARS)}</td>'
        f'<td class="response">{_text(row.get("response"), RESPONSE_CHARS)} {end}'
        f"{f'<small>{small}</small>' if small else ''}</td>"
    )


def _text(value: object, most: int) -> str:
    if value is None or value == "":
        return '<i class="none">empty</i>'
    return f'<bdi class="said">{escape(value, most)}</bdi>'


def _score(value: object, before: object = None) -> str:
    score, old = number(value), number(before)
    if score is None:
        return ""
    trend = "" if old is None or score == old else " up" if score > old else " down"
    return f'<span class="score{trend}">{readable(score)}</span>'
