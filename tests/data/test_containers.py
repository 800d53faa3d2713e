"""Files of every kind, and broken ones: json, jsonl, csv, gz, parquet; strict JSON; bytes."""

import csv
import hashlib
import importlib
import json
import time
from pathlib import Path

import pytest
from reading import GOOD, USER, packed, refused, said, turns, write_jsonl

from kinkajou.data import sources
from kinkajou.data.sources import (
    BadRow,
    read_chats,
    read_prompts,
)

# --- containers -------------------------------------------------------------------------------------------

TWO = [{"prompt": "é\u2028 1"}, {"prompt": "Zwei 2"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO).encode()
ARRAY = json.dumps(TWO, ensure_ascii=False, indent=1).encode()
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "data", "places"),
    [
        ("a.jsonl", JSONL, [1, 2]),
        ("A.NDJSON", JSONL, [1, 2]),
        ("a.jsonl", JSONL.rstrip(b"\n"), [1, 2]),
        ("a.jsonl", BOM + JSONL.replace(b"\n", b"\r\n"), [1, 2]),
        ("a.jsonl", b"\n  \n" + JSONL.replace(b"\n", b"\n\n"), [3, 5]),
        ("a.jsonl.gz", packed(BOM + JSONL), [1, 2]),
        ("a.json", ARRAY, ["record 1", "record 2"]),
        ("a.json", BOM + b" \n" + ARRAY + b"\n", ["record 1", "record 2"]),
        ("a.json.gz", packed(ARRAY), ["record 1", "record 2"]),
        ("a.json", b'{"version": 1, "data": ' + ARRAY + b"}", ["record 1", "record 2"]),
        ("a.json", json.dumps({"data": TWO}).encode(), ["record 1", "record 2"]),
        ("a.json", JSONL, [1, 2]),
        ("a.json", BOM + JSONL, [1, 2]),
        ("a.json", b"\n".join(json.dumps(row, indent=1).encode() for row in TWO), [1, 4]),
        ("a.json", JSONL.replace(b"\n", b""), [1, 1]),
        ("a.csv", "prompt\né\u2028 1\nZwei 2\n".encode(), [2, 3]),
        ("a.csv", BOM + 'n,prompt\r\n1,"é\u2028 1"\r\n\r\n2,Zwei 2'.encode(), [2, 4]),
        ("a.csv.gz", packed(',prompt\n0,"é\u2028 1"\n1,Zwei 2\n'.encode()), [2, 3]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_containers(here, name, data, places):
    Path(name).write_bytes(data)
    found = read_prompts(name)
    assert [prompt.messages[0].content for prompt in found.rows] == ["é\u2028 1", "Zwei 2"]
    assert [prompt.place for prompt in found.rows] == [f"{name}:{place}" for place in places]
    assert found.skipped == ()
    assert found.sha256 == hashlib.sha256(data).hexdigest()


def test_places_use_the_path_as_given(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", GOOD)
    assert read_chats(source).rows[0].place == f"{source}:1"


def test_json_list_of_strings(here):
    Path("p.json").write_text('["Hi", "Why?"]')
    assert [turns(prompt.messages) for prompt in read_prompts("p.json").rows] == [[USER], [("user", "Why?")]]


def test_csv_with_quoted_line_ends_and_a_long_cell(here):
    long = "x" * 500_000
    with open("a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "n"], ['a\n"b", c', "1"], [long, "2"]])
    first, second = read_prompts("a.csv").rows
    assert first.messages[0].content == 'a\n"b", c'
    assert first.meta == {"n": "1"}
    assert (first.place, second.place) == ("a.csv:2", "a.csv:4")
    assert second.messages[0].content == long


def test_parquet(here):
    arrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    rows = [
        {"prompt": said(USER), "n": 1},
        {"prompt": said(("user", "Why?")), "n": 2},
        {"prompt": None, "n": 3},
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), "a.parquet")
    found = read_prompts("a.parquet", bad_rows="skip")
    assert [(turns(prompt.messages), prompt.meta) for prompt in found.rows] == [
        ([USER], {"n": 1}),
        ([("user", "Why?")], {"n": 2}),
    ]
    assert found.skipped == (BadRow("a.parquet:record 3", 'field "prompt" is null'),)

    whole = Path("a.parquet").read_bytes()
    for broken in (b"", b"PAR1", whole[: len(whole) // 2], whole[:-9] + b"\xff" * 5 + b"PAR1"):
        Path("b.parquet").write_bytes(broken)
        assert refused(read_prompts, "b.parquet").problem == "b.parquet: not a readable parquet file"


def test_packages_that_are_missing(here, monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name.split(".")[0] in ("pyarrow", "datasets"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    Path("a.parquet").write_bytes(b"PAR1")
    error = refused(read_prompts, "a.parquet")
    assert error.problem == "a.parquet: reading parquet needs pyarrow"
    assert error.fix == "pip install kinkajou[data]"
    error = refused(read_prompts, "Anthropic/hh-rlhf")
    assert error.problem.startswith("Anthropic/hh-rlhf: no such file, and as a hub id it needs the package datasets")
    assert "pip install kinkajou[data]" in error.fix
    assert "correct the path" in error.fix


# --- strict JSON ------------------------------------------------------------------------------------------

DEEP = "[" * 70 + "]" * 70


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("NaN", "NaN is not JSON"),
        ("[Infinity]", "Infinity is not JSON"),
        ("-Infinity", "-Infinity is not JSON"),
        ("1e999", "a number too large for a 64-bit float"),
        ("9" * 4301, "an integer of 4,301 digits; the limit is 4,300"),
        ("-" + "9" * 100_000, "an integer of 100,000 digits"),
        ('{"a": 1, "b": 2, "a": 3}', 'field "a" is given twice'),
        (DEEP, "nested deeper than 64 levels"),
        ('{"a":' * 64 + "1" + "}" * 64, "nested deeper than 64 levels"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 64 levels"),
        ("[" * 100_000, "nested deeper than 64 levels"),
    ],
)
def test_what_python_forgives_is_refused(here, value, problem):
    good, bad = json.dumps(GOOD), '{"instruction": "Hi", "output": "x", "more": ' + value + "}"
    Path("a.jsonl").write_text(f"{good}\n{bad}\n{good}\n")
    error = refused(read_chats, "a.jsonl")
    assert error.problem.startswith("a.jsonl:2:")
    assert problem in error.problem
    assert len(read_chats("a.jsonl", bad_rows="skip").rows) == 2

    Path("a.json").write_text(f"[{good},\n{bad},\n{good}]")
    error = refused(read_chats, "a.json")
    assert problem in error.problem
    if len(value) < 100_000 or "9" in value:
        assert error.problem.startswith("a.json:record 2: ")
        assert [bad.place for bad in read_chats("a.json", bad_rows="skip").skipped] == ["a.json:record 2"]
    else:
        assert error.problem.startswith("a.json:2:1: ")


def test_nesting_of_64_levels_and_4300_digits_pass(here):
    more = "[" * 63 + "9" * 4300 + "]" * 63
    Path("a.jsonl").write_text('{"prompt": "Hi", "more": ' + more + "}")
    assert len(read_prompts("a.jsonl").rows) == 1


@pytest.mark.parametrize(
    ("line", "column", "problem"),
    [
        ('{"instruction": "Hi", "output": "x', 33, "invalid JSON: unterminated string"),
        ('{"instruction": "Hi" "output": "x"}', 22, "invalid JSON: expecting ',' delimiter"),
        ('{"instruction": "Hi"} {', 23, "invalid JSON: extra data after the value"),
        ('{"instruction": "\\escape"}', 18, "invalid JSON: invalid \\escape"),
        ('{"instruction": "a\tb"}', 19, "invalid JSON: invalid control character"),
        ("hello", 1, "invalid JSON: expecting value"),
        ("{'a': 1}", 2, "invalid JSON: expecting property name enclosed in double quotes"),
    ],
)
def test_broken_line_is_named_by_line_and_column(here, line, column, problem):
    good = json.dumps(GOOD)
    Path("a.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    error = refused(read_chats, "a.jsonl")
    assert error.problem.startswith(f"a.jsonl:2:{column}: {problem}")
    assert error.evidence
    found = read_chats("a.jsonl", bad_rows="skip")
    assert len(found.rows) == 2
    assert found.skipped[0].place == f"a.jsonl:2:{column}"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"prompt": "a"},\n {"prompt": "b"\n  "c": 1}]', "3:3: invalid JSON: expecting ',' delimiter"),
        ('[{"prompt": "a"}\n {"prompt": "b"}]', "2:2: invalid JSON: expecting ',' or ']' after a record"),
        ('[{"prompt": "a"},\n]', "2:1: invalid JSON: expecting value"),
        ('[{"prompt": "a"}', "1:17: invalid JSON: expecting ',' or ']' after a record"),
        ('[{"prompt": "a"}]\nmore', "2:1: invalid JSON: extra data after the array"),
        ('{"data": [\n{"prompt": "a"},,]}', "2:17: invalid JSON: expecting value"),
    ],
)
def test_broken_array_is_fatal_even_when_rows_are_skipped(here, text, place):
    Path("a.json").write_text(text)
    assert refused(read_prompts, "a.json", bad_rows="skip").problem.startswith(f"a.json:{place}")


def test_array_named_jsonl(here):
    Path("a.jsonl").write_bytes(ARRAY)
    error = refused(read_prompts, "a.jsonl", bad_rows="skip")
    assert error.problem == "a.jsonl:1: a JSON array, not one object a line"
    assert error.fix == "end the name in .json"


# --- bytes ------------------------------------------------------------------------------------------------


def test_bad_utf8_is_named_by_place_and_bytes(here):
    good = json.dumps({"prompt": "Hi"}).encode()
    bad = '{"prompt": "é'.encode() + b'\xff\xfeA"}'
    Path("a.jsonl").write_bytes(good + b"\n" + bad + b"\n" + good)
    assert refused(read_prompts, "a.jsonl").problem == "a.jsonl:2:14: not UTF-8: bytes ff fe 41 22"
    assert read_prompts("a.jsonl", bad_rows="skip").skipped[0].place == "a.jsonl:2:14"
    Path("a.json").write_bytes(b"[" + good + b",\n" + bad + b"]")
    assert refused(read_prompts, "a.json").problem == "a.json:2:14: not UTF-8: bytes ff fe 41 22"
    Path("a.csv").write_bytes('prompt,n\nok,1\n"line\né'.encode() + b'\xff",2\nok,3\n')
    assert refused(read_prompts, "a.csv").problem == "a.csv:4:2: not UTF-8: bytes ff 22 2c 32"
    assert len(read_prompts("a.csv", bad_rows="skip").rows) == 2


def test_rows_over_a_million_bytes(here):
    good, long = json.dumps({"prompt": "Hi"}), json.dumps({"prompt": "é" * 500_000}, ensure_ascii=False)
    Path("a.jsonl").write_text(f"{good}\n{long}\n{good}")
    Path("a.json").write_text(f"[{good},{long},{good}]")
    Path("w.json").write_text(f'{{"data": [{good},{long},{good}]}}')
    Path("a.csv").write_text(f'prompt\nHi\n"{"é" * 500_000}"\nHi\n')
    for name, place in {"a.jsonl": "2", "a.json": "record 2", "w.json": "record 2", "a.csv": "3"}.items():
        assert refused(read_prompts, name).problem == f"{name}:{place}: the row is longer than 1,000,000 bytes"
        assert len(read_prompts(name, bad_rows="skip").rows) == 2


def test_row_of_exactly_the_limit_passes(here):
    row = json.dumps({"prompt": ""})
    row = row.replace('""', '"' + "x" * (1_000_000 - len(row)) + '"')
    for data in (row.encode(), BOM + row.encode() + b"\r\n", b"{}\n" + row.encode() + b"\n"):
        Path("a.jsonl").write_bytes(data)
        assert len(read_prompts("a.jsonl", bad_rows="skip").rows) == 1
    Path("a.jsonl").write_bytes(row.encode() + b" ")
    assert "longer than" in refused(read_prompts, "a.jsonl").problem


def test_line_of_50_megabytes_is_refused_in_no_time(here):
    with open("a.jsonl", "wb") as file:
        file.write(b'{"prompt": "' + b"x" * 50_000_000 + b'"}\n{"prompt": "Hi"}\n')
    began = time.monotonic()
    found = read_prompts("a.jsonl", bad_rows="skip")
    assert [prompt.place for prompt in found.rows] == ["a.jsonl:2"]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.jsonl", bytes(range(256)) * 40, "a.jsonl: binary data, not text"),
        ("a.csv", b"\0" * 100, "a.csv: binary data, not text"),
        ("a.json", packed(ARRAY), "a.json: this is gzip data"),
        ("a.jsonl", b"PAR1\x15\x04", "a.jsonl: this is a parquet file"),
        ("a.jsonl", JSONL.decode().encode("utf-16"), "a.jsonl: this is UTF-16 text"),
        ("a.jsonl.gz", JSONL, "a.jsonl.gz: corrupt gzip data"),
        ("a.jsonl.gz", packed(JSONL * 50)[:-20], "a.jsonl.gz: the gzip data ends too early"),
        ("a.jsonl.gz", packed(JSONL)[:-6] + b"\0\0\0\0\0\0", "a.jsonl.gz: corrupt gzip data"),
        ("a.jsonl.gz", packed(JSONL)[:10] + b"\xff" * 40, "a.jsonl.gz: corrupt gzip data"),
        ("a.jsonl.gz", packed(packed(JSONL)), "a.jsonl.gz: this is gzip data"),
        ("a.jsonl", b"", "a.jsonl: no rows"),
        ("a.jsonl", b"\n \r\n\t\n", "a.jsonl: no rows"),
        ("a.jsonl", BOM, "a.jsonl: no rows"),
        ("a.json", b"", "a.json: no rows"),
        ("a.json", b" \n ", "a.json: no rows"),
        ("a.json", b"[ ]", "a.json: no rows"),
        ("a.json", b'{"data": []}', "a.json: no rows"),
        ("a.csv", b"", "a.csv: no rows"),
        ("a.csv", b"prompt\n\n", "a.csv: no rows"),
        ("a.csv", b"prompt,a,prompt\n1,2,3\n", 'a.csv:1: column "prompt" is given twice'),
        ("a.csv", b'"prompt" x,a\n1,2\n', "a.csv:1: invalid csv in lines 1 to 1: "),
        ("a.jsonl.gz", packed(b""), "a.jsonl.gz: no rows"),
        ("a.txt", b"Hi", "a.txt: unknown kind of data file"),
        ("a.parquet.gz", b"Hi", "a.parquet.gz: unknown kind of data file"),
        ("data", b"Hi", "data: unknown kind of data file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whole_file_refused(here, name, data, problem):
    Path(name).write_bytes(data)
    for mode in ("error", "skip"):
        assert refused(read_prompts, name, bad_rows=mode).problem.startswith(problem)


def test_csv_rows_refused(here, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BAD_SHARE", 1.0)
    Path("a.csv").write_text('prompt,n\nok,1\none, two,2\nthree\n"lost,4\nok,5\nsix"x,6\nok,7\nx\0,8\n')
    found = read_prompts("a.csv", bad_rows="skip")
    assert [prompt.place for prompt in found.rows] == ["a.csv:2", "a.csv:8"]
    assert [(bad.place, bad.problem) for bad in found.skipped] == [
        ("a.csv:3", "the row has 3 columns, the header 2"),
        ("a.csv:4", "the row has 1 columns, the header 2"),
        ("a.csv:5", "invalid csv in lines 5 to 7: ',' expected after '\"'"),
        ("a.csv:9", 'field "prompt" holds a NUL character'),
    ]
    Path("b.csv").write_text('prompt,n\nok,1\n"lost,4\nok,5\n')
    assert refused(read_prompts, "b.csv").problem == "b.csv:3: invalid csv in lines 3 to 4: unexpected end of data"


def test_a_json_document_too_large_to_hold(here, monkeypatch):
    monkeypatch.setattr("kinkajou.data.containers.MAX_DOCUMENT_BYTES", 20)
    Path("a.json").write_bytes(ARRAY)
    error = refused(read_prompts, "a.json")
    assert error.problem == "a.json: over 20 bytes"
    assert error.fix == "write it as .jsonl, which is read line by line"


def test_errors_hold_nothing_that_moves_the_terminal(here):
    clear = "\x1b[2J\u202e\n"
    rows = [{clear: 1}, {"messages": [{"role": clear, "content": "x"}]}, {"messages": [{clear: "x"}]}]
    for row in rows:
        text = "".join(vars(refused(read_chats, write_jsonl("a.jsonl", row)))[part] for part in ("problem", "evidence"))
        assert text.isprintable()
    Path("a.csv").write_text('"a\x1b[2J","a\x1b[2J"\n' + "x,y\n" * 20)
    error = refused(read_chats, "a.csv")
    assert (error.problem + error.evidence).isprintable()
