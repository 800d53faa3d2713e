"""Rows of one answer and a label that says whether it is good; a row -> one record."""

from typing import Any

from kinkajou.data.formats import CHATS, PAIRS, Format, build_pair, match
from kinkajou.data.records import Judged, Messages, Pair, RowFault, as_row, kind, shown

LABELS = ("label", "kto_tag", "tag")
"""TRL's name and LLaMA-Factory's two."""
WORDS = {"true": True, "false": False}
"""CSV has no booleans."""
JUDGED: tuple[Format[Messages], ...] = tuple(
    Format((*form.needs, "label"), form.build, unless="rejected") for form in CHATS if form.needs != ("text",)
)


def build_judged(value: object, place: str) -> Judged | Pair:
    """RowFault when the row is neither an answer with its label nor a pair."""
    row = as_row(value)
    label = next((name for name in LABELS if name in row), "label")
    if label in row:
        row = {**row, "label": row[label]}
    known: tuple[Format[Any], ...] = (*JUDGED, *PAIRS)
    found = match(row, known)
    if found in PAIRS:
        return build_pair(value, place)
    messages: Messages = found.build(row)
    if messages[-1].role != "assistant":
        raise RowFault(f"the conversation ends with the {messages[-1].role}, not with an answer")
    prompt = messages[:-1]
    if not prompt or prompt[-1].role != "user":
        last = f"the {prompt[-1].role}" if prompt else "nobody"
        raise RowFault(f"the answer follows {last}, not the user")
    return Judged(prompt, messages[-1:], _good(row["label"], label), place)


def _good(value: object, label: str) -> bool:
    found = WORDS.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        said = shown(value) if isinstance(value, str) else kind(value)
        raise RowFault(f'field "{label}" is {said}, not true or false')
    return found
