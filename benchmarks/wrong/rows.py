"""Files with one bad row: what is refused by its place, and skipped and counted by `--bad_rows skip`."""

import copy
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from benchmarks.wrong.cases import Case, Draw, Good
from benchmarks.wrong.records import FORMS, KINDS, SCHEMAS, Form, Kind, Row, command, rows

NOT_TEXT = (None, 3, 2.5, True, [], [1], {}, {"a": 1}, [[]], [None])
NO_LABEL = (None, 2, 0.5, "maybe", [], {}, "")
SILENT = ("", " ", "\t\n ", "\u3000", "\xa0")
RAW = {
    "NaN": "NaN",
    "Infinity": "[Infinity]",
    "huge float": "1e999",
    "huge integer": "9" * 5000,
    "given twice": '1, "more": 2',
    "deep": "[" * 80 + "]" * 80,
    "deeper": "[" * 20_000 + "]" * 20_000,
    "single quotes": "'a'",
    "comment": "1 /* one */",
    "undefined": "undefined",
    "control character": '"a\tb"',
    "broken escape": '"\\x41"',
    "half a pair": '"\\ud83d"',
    "NUL": '"a\\u0000b"',
}


def bad_field(draw: Draw, form: Form, row: Row) -> Row:
    """A required field that is missing, of another type, or without words."""
    name = draw(st.sampled_from(form.needs))
    how = draw(st.sampled_from(["missing", "renamed", "type", "silent", "NUL", "surrogate"]))
    if how in ("missing", "renamed"):
        value = row.pop(name)
        if how == "renamed":
            row[f"{name[:2]}q{name[2:]}"] = value
    elif how == "type":
        row[name] = draw(st.sampled_from(NO_LABEL if name == "label" else NOT_TEXT))
    elif how == "silent":
        row[name] = draw(st.sampled_from(SILENT))
    else:
        row[name] = f"w3{chr(0) if how == 'NUL' else chr(0xD800 + draw(st.integers(0, 0x7FF)))}w4"
    return row


def bad_turns(draw: Draw, form: Form, row: Row) -> Row:
    """A conversation that is none."""
    name = next(name for name in form.needs if name != "label")
    said: list[Any] = row[name]
    at = draw(st.integers(0, len(said) - 1))
    keys = list(said[at])
    key = draw(st.sampled_from(keys))
    how = draw(st.sampled_from(["no turns", "no turn", "no key", "type", "silent", "role", "tool"]))
    if how == "no turns":
        row[name] = []
    elif how == "no turn":
        said[at] = draw(st.sampled_from([None, 3, "text", [], True]))
    elif how == "no key":
        del said[at][key]
    elif how == "type":
        said[at][key] = draw(st.sampled_from([None, 3, 2.5, True, {}, {"a": 1}, [1], []]))
    elif how == "silent":
        said[at][keys[1]] = draw(st.sampled_from(SILENT))
    elif how == "role":
        said[at][keys[0]] = draw(st.sampled_from(["USER ", "bot", "tool", "", "System"]))
    else:
        said[at]["tool_calls"] = [{"name": "rm"}]
    return row


def bad_row(draw: Draw, schema: str, form: Form, kind: Kind, row: Row) -> tuple[str, Row | str | list[Any]]:
    """What kind of bad, and the row (its text, where JSON has no value for it)."""
    how = draw(st.sampled_from(["field", "turns", "raw", "no object", "too long", "same", "swapped"]))
    if how == "turns" and not form.flat:
        return "a turn of a chat", bad_turns(draw, form, row)
    if how == "raw" and kind.raw:
        name = draw(st.sampled_from([*RAW]))
        return f"JSON: {name}", json.dumps(row)[:-1] + f', "more": {RAW[name]}}}'
    if how == "no object" and kind.raw:
        values = [None, 3, True, [], [row]] + (["text"] if schema != "prompts" else [])
        return "no object", json.dumps(draw(st.sampled_from(values)))
    if how == "too long":
        name = form.needs[0] if form.flat else "more"
        row[name] = draw(st.sampled_from(["x", "é", "w3 "])) * 1_000_001
        return "a row over a megabyte", row
    if how == "same" and schema == "pairs":
        row[form.needs[-1]] = copy.deepcopy(row[form.needs[-2]])
        return "both sides the same", row
    if how == "swapped" and not form.flat and schema != "prompts":
        name = next(name for name in form.needs if name != "label")
        row[name] = row[name][:1]  # the answer is gone
        return "no answer", row
    return "a field", bad_field(draw, form, row)


def broken_rows(draw: Draw, folder: Path, good: Good) -> Case:
    """A file of good rows and a bad one: refused by its place, or skipped and named by it."""
    schema = draw(st.sampled_from(SCHEMAS))
    form = draw(st.sampled_from(FORMS[schema]))
    kind = draw(st.sampled_from([kind for kind in KINDS[:6] if kind.raw]))
    made: list[Any] = rows(draw, form)
    at = draw(st.integers(0, len(made) - 1))
    what, made[at] = bad_row(draw, schema, form, kind, made[at])
    texts = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=at % 2 == 0) for row in made]
    name = f"rows{kind.suffix}"
    (folder / name).write_bytes(kind.write(texts))
    arguments, place = command(draw, schema, good, name), f"{name}{kind.place(at)}"
    array = kind.place(0).startswith(":record")
    if array and (what in ENDS_AN_ARRAY or lone(texts[at])):
        return Case(f"row: {what}, in an array", arguments, [f"{name}:1:"])
    if draw(st.booleans()):
        skipping = f"skipped 1 bad row: {place}"
        return Case(f"row: {what}, skipped", [*arguments, "--bad_rows", "skip"], [skipping], expected="runs")
    return Case(f"row: {what}", arguments, [place])


ENDS_AN_ARRAY = tuple(
    f"JSON: {name}"
    for name in ("single quotes", "comment", "undefined", "control character", "broken escape", "deeper")
)
"""Nothing after it can be read: the file is refused at line and column."""


def lone(text: str) -> bool:
    """Whether the bytes of this text are no UTF-8, which breaks a whole document."""
    return any(0xD800 <= ord(letter) <= 0xDFFF for letter in text)


def broken_tables(draw: Draw, folder: Path, good: Good) -> Case:
    """The same for CSV and Parquet, whose cells are what their column allows."""
    schema = draw(st.sampled_from(SCHEMAS))
    form = draw(st.sampled_from([form for form in FORMS[schema] if form.flat]))
    kind = draw(st.sampled_from([kind for kind in KINDS if not kind.raw]))
    made = rows(draw, form)
    at = draw(st.integers(0, len(made) - 1))
    name = draw(st.sampled_from(form.needs))
    how = draw(st.sampled_from(["silent", "NUL", "null", "too long", "columns", "type", "missing column"]))
    place, file = kind.place(at), f"table{kind.suffix}"
    if how == "missing column":
        made, place = [{key: value for key, value in row.items() if key != name} for row in made], kind.place(0)
        if all(not row for row in made):
            made, place = [{"other": "w3"} for _ in made], kind.place(0)
    elif how == "type" and not kind.flat:
        made, place = [{**row, name: i + 7} for i, row in enumerate(made)], kind.place(0)
    elif how == "too long":
        made[at] = {**made[at], name: "w3 " * 400_000}
    elif how == "null" and not kind.flat:
        made[at] = {**made[at], name: None}
    elif name == "label":
        made = [{**row, "label": str(row["label"])} for row in made]
        made[at] = {**made[at], "label": "maybe"}
    else:
        made[at] = {**made[at], name: "a\0b" if how == "NUL" else draw(st.sampled_from(SILENT))}
    data = kind.write(made)
    if how == "columns" and kind.suffix == ".csv":
        lines = kind.write(rows(draw, form)).decode().split("\n")
        spot = draw(st.integers(1, len(lines) - 2))
        lines[spot] += ',"w3"'
        data, place = "\n".join(lines).encode(), f":{spot + 1}"
    (folder / file).write_bytes(data)
    return Case(f"table: {how}", command(draw, schema, good, file), [f"{file}{place}"])
