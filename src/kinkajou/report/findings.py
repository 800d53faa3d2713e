"""What the diagnosis found in a run, as the page says it."""

import re
from collections.abc import Iterable

from kinkajou.report.folder import Found, Stage, number
from kinkajou.report.scale import readable
from kinkajou.report.text import escape, prose


def finding_cards(stage: Stage) -> str:
    """A card for each name: cause, numbers, what to do.  Empty where nothing was found."""
    if not stage.findings:
        return ""
    cards = "".join(map(_card, stage.findings))
    return f'<h3>What its numbers show</h3><div class="findings">{cards}</div>'


def count_of(stage: Stage) -> str:
    """For the overview: how many names were found."""
    count = len(stage.findings)
    return f"{count} finding{'' if count == 1 else 's'}" if count else ""


def steps_of(stage: Stage, keys: Iterable[str]) -> list[tuple[int, str]]:
    """(first step, name) of the findings that speak of one of these metrics."""
    wanted = set(keys)
    return [(one.step, one.name) for one in stage.findings if wanted & set(one.metrics)]


def _card(one: Found) -> str:
    often = "" if one.seen == 1 else f", {one.seen:,} times"
    numbers = [(key, x, number(x)) for key, x in one.evidence.items()]
    seen = " · ".join(
        f"{escape(key, 80)} <b>{escape(x, 400) if value is None else readable(value)}</b>" for key, x, value in numbers
    )
    lines = {"": prose(_sentence(one.cause)), "seen": seen, "do": _action(one.action) if one.action else ""}
    said = "".join(f'<p class="{role}">{text}</p>' for role, text in lines.items() if text)
    title = f"<h4><code>{escape(one.name, 80)}</code> step {one.step:,}{often}</h4>"
    return f'<article class="finding">{title}{said}</article>'


def _action(text: str) -> str:
    """Flags are set as code."""
    return prose(re.sub(r"(?<!`)(--\w+)", r"`\1`", _sentence(text)))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")
