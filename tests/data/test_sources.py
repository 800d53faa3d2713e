import builtins
import csv
import dataclasses
import gzip
import hashlib
import importlib
import json
import random
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from kinkajou.data.sources import (
    BadRow,
    Chat,
    Message,
    Prompt,
    Rows,
    describe_skipped,
    read_chats,
    read_pairs,
    read_prompts,
)
from kinkajou.errors import UserError

READERS = {"chats": read_chats, "pairs": read_pairs, "prompts": read_prompts}
GOOD = {"instruction": "Add 1 and 2.", "output": "3"}
PAIR = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_jsonl(path, *rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def packed(data):
    return gzip.compress(data, mtime=0)


def turns(messages):
    return [(message.role, message.content) for message in messages]


def only(reader, row):
    """The one record that `reader` makes of `row`."""
    (record,) = reader(write_jsonl("one.jsonl", row)).rows
    return record


def refused(reader, source, **options):
    with pytest.raises(UserError) as caught:
        reader(source, **options)
    return caught.value


def row_refused(reader, row):
    """The problem with `row` as the third line of a file whose other rows are good."""
    good = {read_chats: GOOD, read_pairs: PAIR, read_prompts: GOOD}[reader]
    error = refused(reader, write_jsonl("bad.jsonl", good, good, row, good))
    assert error.problem.startswith("bad.jsonl:3: ")
    assert "--bad-rows skip" in error.fix
    skipped = reader("bad.jsonl", bad_rows="skip")
    assert len(skipped.rows) == 3
    assert [bad.place for bad in skipped.skipped] == ["bad.jsonl:3"]
    return error.problem.removeprefix("bad.jsonl:3: ")


# --- formats: chats ---------------------------------------------------------------------------------------

USER, ANSWER = ("user", "Hi"), ("assistant", "Hello!")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Hi", "output": "Hello!"}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": "", "output": "Hello!"}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": None, "output": "Hello!"}, [USER, ANSWER]),
        ({"instruction": "Sum", "input": "1 2", "output": "3"}, [("user", "Sum\n\n1 2"), ("assistant", "3")]),
        (
            {"instruction": "Hi", "output": "Hello!", "system": "Be kind."},
            [("system", "Be kind."), USER, ANSWER],
        ),
        ({"instruction": "Hi", "output": "Hello!", "system": "", "history": []}, [USER, ANSWER]),
        (
            {"instruction": "Hi", "output": "Hello!", "history": [["a", "b"]]},
            [("user", "a"), ("assistant", "b"), USER, ANSWER],
        ),
        ({"instruction": "Hi", "instances": [{"input": "", "output": "Hello!"}]}, [USER, ANSWER]),
        (
            {
                "instruction": "Sum",
                "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": ""}],
            },
            [("user", "Sum\n\n1 2"), ("assistant", "3")],
        ),
        ({"prompt": "Hi", "response": "Hello!"}, [USER, ANSWER]),
        ({"prompt": "Hi", "completion": "Hello!"}, [USER, ANSWER]),
        ({"prompt": "Hi", "output": "Hello!"}, [USER, ANSWER]),
        ({"question": "Hi", "answer": "Hello!"}, [USER, ANSWER]),
        (
            {"prompt": "def f():", "completion": "    return 1"},
            [("user", "def f():"), ("assistant", "    return 1")],
        ),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Hello!"}, [USER, ANSWER]),
        (
            {
                "prompt": [{"role": "user", "content": "Hi"}],
                "completion": [{"role": "assistant", "content": "Hello!"}],
            },
            [USER, ANSWER],
        ),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
            [USER, ANSWER],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "H\n"}, {"type": "text", "text": "\n"}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "value": "Hello!"}]},
                ]
            },
            [("user", "H\n\n"), ANSWER],
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": " "},
                    {"role": "prompter", "content": "Hi"},
                    {"role": "chatbot", "content": "Hello!"},
                ]
            },
            [USER, ANSWER],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello!"},
                ]
            },
            [("system", "Be kind."), USER, ANSWER],
        ),
        ({"text": " Once upon a time ", "id": 3}, [("text", " Once upon a time ")]),
        ({"text": "a field without a name", "": 3}, [("text", "a field without a name")]),
    ],
)
def test_chat_formats(here, row, expected):
    chat = only(read_chats, row)
    assert turns(chat.messages) == expected
    assert chat.place == "one.jsonl:1"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"instruction": "Hi", "output": ""}, 'field "output" is empty'),
        ({"instruction": "Hi", "output": " \n\t"}, 'field "output" is empty'),
        ({"instruction": "", "output": "x"}, 'field "instruction" is empty'),
        ({"instruction": "Hi", "output": None}, 'field "output" is null'),
        ({"instruction": "Hi", "output": 3}, 'field "output" is a number, not text'),
        ({"instruction": "Hi", "output": True}, 'field "output" is a boolean, not text'),
        ({"instruction": "Hi", "output": ["a", "b"]}, 'field "output" is a list, not text'),
        ({"instruction": "Hi", "input": 3, "output": "x"}, 'field "input" is a number, not text'),
        ({"instruction": "Hi", "output": "x", "history": [["a"]]}, 'field "history[0]" has 1 items, not a '),
        ({"instruction": "Hi", "output": "x", "history": 3}, 'field "history" is a number, not a list'),
        ({"instruction": "Hi", "output": "x", "system": 3}, 'field "system" is a number, not text'),
        ({"instruction": "Hi", "instances": []}, 'field "instances" is an empty list'),
        ({"instruction": "Hi", "instances": [{"input": ""}]}, 'field "instances[0].output" is null'),
        ({"messages": []}, 'field "messages" is an empty list'),
        ({"messages": "Hi"}, 'field "messages" is text, not a list'),
        ({"messages": ["Hi"]}, 'field "messages[0]" is text, not an object'),
        ({"messages": [{"role": "user"}]}, 'field "messages[0]" has no "content" or "value"'),
        ({"messages": [{"content": "x"}]}, 'field "messages[0]" has no "role" or "from"'),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            'field "messages[0].role" is the unknown role "tool"',
        ),
        (
            {"conversations": [{"from": "function_call", "value": "x"}]},
            'field "conversations[0].from" is the unknown role "function_call"',
        ),
        ({"messages": [{"role": "user", "content": None}]}, 'field "messages[0].content" is null'),
        ({"messages": [{"role": "user", "content": " "}]}, 'field "messages[0].content" is empty'),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            'field "messages[0].content[0].text" is null',
        ),
        ({"messages": [{"role": "user", "content": []}]}, 'field "messages[0].content" is an empty list'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            'field "messages[0].content[0]" is a part of type "image_url", not "text"',
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]},
            'field "messages[0]" holds tool_calls',
        ),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "the conversation ends with the user"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "the conversation has no user message"),
        ({"messages": [{"role": "system", "content": ""}]}, 'field "messages" holds no message with text'),
        ({"text": ""}, 'field "text" is empty'),
        ({"text": None}, 'field "text" is null'),
        ({"text": "torn out", "role": "prompter"}, "none of the known fields"),
        ({"instruction": "Hi", "output": "a\0b"}, 'field "output" holds a NUL character'),
        (
            {"instruction": "Hi", "output": "a\ud800"},
            'field "output" holds half a character (lone surrogate \\ud800)',
        ),
        ({"instruction": "Hi", "output": "x", "\udc00": 1}, 'field "\\udc00" holds half a character'),
        ({}, "none of the known fields"),
        ([1, 2], "the record is a list, not an object with fields"),
        ("text", "the record is text, not an object with fields"),
        (None, "the record is null, not an object with fields"),
    ],
)
def test_chats_refused(here, row, problem):
    assert row_refused(read_chats, row).startswith(problem)


@pytest.mark.parametrize(
    ("row", "missing", "fix"),
    [
        ({"instruction": "Hi", "outputs": "x"}, "output", 'rename "outputs" to "output"'),
        ({"txt": "Hi"}, "text", 'rename "txt" to "text"'),
        ({"mesages": []}, "messages", 'rename "mesages" to "messages"'),
        ({"instruction": "Hi", "id": 3}, "output", "a row needs one of: messages; "),
    ],
)
def test_missing_field_is_named_with_its_likely_misspelling(here, row, missing, fix):
    error = refused(read_chats, write_jsonl("d.jsonl", GOOD, row))
    assert error.problem == f'd.jsonl:2: missing field "{missing}"'
    assert error.evidence == "the row has: " + ", ".join(row)
    assert error.fix.startswith(fix)


# --- formats: pairs ---------------------------------------------------------------------------------------

HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant: "


def said(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        (PAIR, [USER], [ANSWER], [("assistant", "Go away.")]),
        (
            {"instruction": "Sum", "input": "1 2", "output": "3", "chosen": "3", "rejected": "4"},
            [("user", "Sum\n\n1 2")],
            [("assistant", "3")],
            [("assistant", "4")],
        ),
        (
            {"prompt": "Hi", "chosen": said(USER, ANSWER), "rejected": said(USER, ("assistant", "No."))},
            [USER],
            [ANSWER],
            [("assistant", "No.")],
        ),
        (
            {"prompt": said(USER), "chosen": said(ANSWER), "rejected": said(("assistant", "No."))},
            [USER],
            [ANSWER],
            [("assistant", "No.")],
        ),
        (
            {
                "chosen": said(USER, ANSWER),
                "rejected": said(USER, ("assistant", "No.")),
                "system": "Be kind.",
            },
            [("system", "Be kind."), USER],
            [ANSWER],
            [("assistant", "No.")],
        ),
        (
            {"chosen": HH + "Because.", "rejected": HH + " No."},
            [USER, ANSWER, ("user", "Why?")],
            [("assistant", "Because.")],
            [("assistant", "No.")],
        ),
        (
            {"prompt": HH.rstrip(), "chosen": " Because.", "rejected": " No.", "response": " Because."},
            [USER, ANSWER, ("user", "Why?")],
            [("assistant", "Because.")],
            [("assistant", "No.")],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello!"},
                "rejected": {"from": "gpt", "value": "No."},
            },
            [USER],
            [ANSWER],
            [("assistant", "No.")],
        ),
        (
            {"question": "Hi", "response_j": "Hello!", "response_k": "No."},
            [USER],
            [ANSWER],
            [("assistant", "No.")],
        ),
        # The dialogues part at an earlier turn of the user: all after the last common question counts.
        (
            {"chosen": HH + "Because.", "rejected": HH.replace("Why", "How") + "So."},
            [USER],
            [ANSWER, ("user", "Why?"), ("assistant", "Because.")],
            [ANSWER, ("user", "How?"), ("assistant", "So.")],
        ),
    ],
)
def test_pair_formats(here, row, prompt, chosen, rejected):
    pair = only(read_pairs, row)
    assert (turns(pair.prompt), turns(pair.chosen), turns(pair.rejected)) == (prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (PAIR | {"rejected": "Hello!"}, 'fields "chosen" and "rejected" are the same'),
        ({"chosen": HH + "a", "rejected": HH + " a "}, 'fields "chosen" and "rejected" are the same'),
        (PAIR | {"rejected": " "}, 'field "rejected" is empty'),
        (PAIR | {"chosen": None}, 'field "chosen" is null'),
        ({"prompt": "Hi", "chosen": "x"}, 'missing field "rejected"'),
        ({"chosen": "x", "rejected": "y"}, 'missing field "prompt"'),
        (
            {"chosen": HH + "a\n\nHuman: b", "rejected": HH + "c"},
            'field "chosen" ends with the user, not with an answer',
        ),
        ({"chosen": HH, "rejected": HH + "c"}, 'field "chosen": turn 4 of the dialogue (Assistant) is empty'),
        (
            {"chosen": "Well\n\nHuman: Hi\n\nAssistant: a", "rejected": HH + "c"},
            'field "chosen" is a dialogue that does not begin with "\\n\\nHuman:"',
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            'fields "chosen" and "rejected" have no prompt in common',
        ),
        (
            {"prompt": "Bye", "chosen": said(USER, ANSWER), "rejected": said(USER, ("assistant", "No."))},
            'field "chosen" is a dialogue that does not repeat the field "prompt"',
        ),
        (
            {"prompt": "Hi", "chosen": said(USER, ANSWER), "rejected": said(("tool", "x"))},
            'field "rejected[0].role" is the unknown role "tool"',
        ),
        (
            {"question": "Hi", "response_j": "x", "response_k": "x"},
            'fields "response_j" and "response_k" are',
        ),
    ],
)
def test_pairs_refused(here, row, problem):
    assert row_refused(read_pairs, row).startswith(problem)


# --- formats: prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected", "meta"),
    [
        ({"instruction": "Sum", "input": "1 2", "answer": 3}, [("user", "Sum\n\n1 2")], {"answer": 3}),
        ({"prompt": "Hi", "target": [1, 2]}, [USER], {"target": [1, 2]}),
        ({"prompt": said(USER), "data_source": "x"}, [USER], {"data_source": "x"}),
        ({"messages": said(USER, ANSWER), "id": 1}, [USER], {"id": 1}),
        ({"messages": said(USER, ANSWER, ("user", "Why?"))}, [USER, ANSWER, ("user", "Why?")], {}),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, [USER], {}),
        ({"question": "Hi", "answer": "#### 3"}, [USER], {"answer": "#### 3"}),
        ({"turns": ["Hi", "And then?"], "question_id": 1}, [USER], {"question_id": 1}),
        (PAIR, [USER], {"chosen": "Hello!", "rejected": "Go away."}),
        ({"chosen": HH + "a", "rejected": HH + "a", "k": 1}, [USER, ANSWER, ("user", "Why?")], {"k": 1}),
        ("Hi", [USER], {}),
        ({"prompt": "Hi", "system": "Be kind."}, [("system", "Be kind."), USER], {}),
    ],
)
def test_prompt_formats(here, row, expected, meta):
    prompt = only(read_prompts, row)
    assert turns(prompt.messages) == expected
    assert prompt.meta == meta


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": ""}, 'field "prompt" is empty'),
        ("", 'field "prompt" is empty'),
        ({"turns": []}, 'field "turns" is an empty list'),
        ({"turns": [3]}, 'field "turns[0]" is a number, not text'),
        ({"promt": "Hi"}, 'missing field "prompt"'),
        ({"messages": said(ANSWER)}, 'field "messages" ends with nobody, not with the user'),
        ({"messages": said(("system", "x"))}, 'field "messages" ends with the system, not with the user'),
        ({"prompt": "Hi", "answer": "\ud800"}, 'field "answer" holds half a character'),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            'field "chosen" ends with nobody, not with the user',
        ),
    ],
)
def test_prompts_refused(here, row, problem):
    assert row_refused(read_prompts, row).startswith(problem)


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


def test_csv_rows_refused(here):
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


# --- where there is no such file --------------------------------------------------------------------------


def test_missing_file_names_its_neighbours(here):
    write_jsonl("train.jsonl", GOOD)
    error = refused(read_chats, "tran.jsonl")
    assert error.problem == "tran.jsonl: no such file"
    assert error.fix == "did you mean train.jsonl?"
    assert refused(read_chats, "zzzzzzzz.csv").fix == "in . there is: train.jsonl"
    assert refused(read_chats, "no/such.json").fix == "the folder no does not exist either"
    for source in ("", "a\0b.json", "x" * 5000 + ".json", "https://example.org/a.json"):
        assert refused(read_chats, source).problem


def test_folder(here):
    Path("set").mkdir()
    assert refused(read_chats, "set").evidence == "it holds no data files"
    write_jsonl("set/train.jsonl", GOOD)
    error = refused(read_chats, "set")
    assert error.problem == "set: a folder, not a file"
    assert error.evidence == "it holds train.jsonl"
    Path("set.json").mkdir()
    assert refused(read_chats, "set.json").problem == "set.json: a folder, not a file"


def test_unreadable_file(here, monkeypatch):
    source = write_jsonl("a.jsonl", GOOD)

    def denied(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    # Not by chmod: the tests may run as root.
    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(builtins, "open", denied)
    error = refused(read_chats, source)
    assert (error.problem, error.evidence) == ("a.jsonl: cannot be read", "Permission denied")


def test_special_and_dangling_files(here):
    Path("gone.jsonl").symlink_to("nowhere.jsonl")
    assert refused(read_chats, "gone.jsonl").problem == "gone.jsonl: no such file"
    mkfifo = pytest.importorskip("os").mkfifo
    mkfifo("pipe.jsonl")
    assert refused(read_chats, "pipe.jsonl").problem == "pipe.jsonl: not a regular file"


# --- bad rows, limits, subsets ----------------------------------------------------------------------------


def test_no_good_row_shows_the_first(here):
    error = refused(read_chats, write_jsonl("a.jsonl", {"instruction": "Hi"}, {}, {}), bad_rows="skip")
    assert error.problem == 'a.jsonl: no good row among 3; the first: a.jsonl:1: missing field "output"'
    assert error.evidence == "the row has: instruction"


def test_max_rows_counts_good_rows_and_stops_reading(here):
    rows = [GOOD | {"output": str(number)} for number in range(5)]
    source = write_jsonl("a.jsonl", rows[0], {}, *rows[1:], {})
    found = read_chats(source, max_rows=2, bad_rows="skip")
    assert [chat.messages[1].content for chat in found.rows] == ["0", "1"]
    assert len(found.skipped) == 1
    assert found.sha256 == read_chats(source, bad_rows="skip").sha256
    assert len(read_chats(source, max_rows=1).rows) == 1
    assert "max_rows is 0" in refused(read_chats, source, max_rows=0).problem


def test_subset_of_a_file(here):
    rows = [PAIR | {"subset": name} for name in ("helpful", "harmless", "helpful")]
    source = write_jsonl("a.jsonl", *rows, {"subset": "harmless"})
    assert [pair.place for pair in read_pairs(source, subset="helpful").rows] == ["a.jsonl:1", "a.jsonl:3"]
    error = refused(read_pairs, source, subset="helpfull")
    assert error.problem == 'a.jsonl: no rows of the subset "helpfull"'
    assert error.evidence == "present: helpful (2), harmless (2)"
    assert error.fix == "did you mean 'helpful'?"
    error = refused(read_pairs, write_jsonl("b.jsonl", PAIR), subset="helpful")
    assert error.problem == 'b.jsonl:1: missing field "subset"'
    assert error.fix.startswith("leave --subset out")


def test_describe_skipped():
    bad = [BadRow(f"a.jsonl:{number}", "broken") for number in range(1, 8)]
    assert describe_skipped([]) == ""
    assert describe_skipped(bad[:1]) == "skipped 1 bad row: a.jsonl:1 (broken)"
    assert describe_skipped(tuple(bad)) == (
        "skipped 7 bad rows: a.jsonl:1 (broken); a.jsonl:2 (broken); a.jsonl:3 (broken); a.jsonl:4 (broken); "
        "a.jsonl:5 (broken); and 2 more"
    )


def test_records_are_frozen_and_complete():
    message = Message("user", "Hi")
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.role = "text"  # type: ignore[misc]
    assert Chat((message,), "a:1") == Chat((Message("user", "Hi"),), "a:1")
    assert Rows((), (), "") == Rows((), (), "")
    assert Prompt((message,), {"a": 1}, "a:1").meta["a"] == 1


# --- the hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(here, monkeypatch):
    """A stand-in for the package `datasets`; the calls of load_dataset end up in `hub.calls`."""
    module = types.ModuleType("datasets")
    module.calls = []

    def load_dataset(name, config=None, **options):
        module.calls.append((name, config, options))
        if name == "no/body":
            raise ConnectionError("Couldn't reach the hub\nsecond line")
        return [PAIR, PAIR | {"chosen": "Good day!"}]

    module.load_dataset = load_dataset
    module.get_dataset_config_names = lambda name: ["default"] if "hh" in name else ["easy", "hard"]
    module.get_dataset_split_names = lambda _name, _config: ["train", "test"]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize(
    ("source", "subset", "call"),
    [
        ("Anthropic/hh-rlhf", None, (None, {"split": "train"})),
        ("Anthropic/hh-rlhf", "harmless-base", (None, {"data_dir": "harmless-base", "split": "train"})),
        ("Anthropic/hh-rlhf", "test", (None, {"split": "test"})),
        ("some/tasks", "hard", ("hard", {"split": "train"})),
    ],
)
def test_hub_id(hub, source, subset, call):
    found = read_pairs(source, subset=subset)
    assert hub.calls == [(source, *call)]
    assert [pair.place for pair in found.rows] == [f"{source}:record 1", f"{source}:record 2"]
    assert found.sha256 == read_pairs(source, subset=subset).sha256
    assert found.sha256 != read_pairs(source, subset=subset, max_rows=1).sha256


def test_hub_id_that_cannot_be_loaded(hub):
    error = refused(read_pairs, "no/body")
    assert error.problem == "no/body: no such file, and as a hub id it could not be loaded"
    assert error.evidence == "ConnectionError: Couldn't reach the hub"


def test_local_path_wins_over_the_hub(hub):
    Path("Dahoas").mkdir()
    write_jsonl("Dahoas/rm-static.jsonl", PAIR)
    assert len(read_pairs("Dahoas/rm-static.jsonl").rows) == 1
    Path("Dahoas/rm-static").mkdir()
    assert "a folder" in refused(read_pairs, "Dahoas/rm-static").problem
    assert "no such file" in refused(read_pairs, "Dahoas/rm_static.jsonl").problem
    assert hub.calls == []


# --- real files -------------------------------------------------------------------------------------------


def real(path):
    for folder in Path(__file__).resolve().parents:
        if (found := folder / "shared" / "data" / path).exists():
            return str(found)
    pytest.skip(f"the shared data folder with {path} is not beside this checkout")


@pytest.mark.parametrize(
    ("kind", "path", "good", "bad"),
    [
        ("pairs", "preference/hh/hh_dev.jsonl.gz", 6724, {"is empty": 12, "ends with the user": 2}),
        ("pairs", "preference/rasbt/rasbt_dev.json", 889, {"are the same": 5}),
        ("chats", "preference/rasbt/rasbt_dev.json", 894, {}),
        ("pairs", "preference/llamafactory/dpo_en_demo.json", 300, {}),
        ("pairs", "preference/llamafactory/dpo_zh_demo.json", 300, {}),
        ("pairs", "preference/open_instruct_sample/preference_sample.jsonl", 100, {}),
        ("pairs", "preference/stack_exchange_tiny/stack_exchange_paired_tiny.json", 25, {}),
        ("chats", "sft/alpaca_5k/alpaca_5000.json", 4998, {'field "output" is empty': 2}),
        ("chats", "sft/llamafactory_demo/alpaca_zh_demo.json", 1000, {}),
        ("chats", "sft/llamafactory_demo/glaive_toolcall_en_demo.json", 147, {'role "function_call"': 153}),
        ("chats", "sft/llamafactory_demo/v1_sft_demo.jsonl", 500, {}),
        ("chats", "sft/multiturn_fixtures/conversations.jsonl", 128, {}),
        ("chats", "sft/multiturn_fixtures/dummy_conversation.json", 500, {}),
        ("chats", "sft/multiturn_fixtures/sft_sample.jsonl", 100, {}),
        ("chats", "sft/oasst_zh/oaast_sft_zh.json", 766, {}),
        ("chats", "sft/seed_tasks/belle_dev1K.json", 1000, {}),
        ("chats", "sft/seed_tasks/seed_tasks.jsonl", 175, {}),
        ("prompts", "sft/oasst_zh/oaast_rm_zh.json", 775, {}),
        ("prompts", "prompts/instructionwild/user_1.jsonl", 429, {}),
        ("prompts", "prompts/instructionwild/user_2.jsonl", 246, {"invalid JSON": 2}),
        ("prompts", "prompts/instructionwild/user_3.jsonl", 198, {"invalid JSON": 3}),
        ("prompts", "prompts/awesome_chatgpt/prompts.csv", 204, {"invalid csv": 5}),
        ("prompts", "prompts/vicuna/vicuna_bench_question.jsonl", 80, {}),
        ("prompts", "prompts/gsm8k_train/train.jsonl", 7473, {}),
        ("prompts", "prompts/arithmetic_sequence/train.parquet", 800, {}),
        ("prompts", "prompts/countdown_train/train.parquet", 8001, {}),
    ],
)
def test_real_file(kind, path, good, bad):
    if path.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    found = READERS[kind](real(path), bad_rows="skip")
    assert len(found.rows) == good
    assert len(found.skipped) == sum(bad.values())
    for phrase, count in bad.items():
        assert sum(phrase in row.problem for row in found.skipped) == count


def test_real_refusals():
    message = refused(read_chats, real("sft/oasst_100/en_100_message.jsonl.gz")).problem
    assert message.endswith("en_100_message.jsonl.gz:1: none of the known fields")
    message = refused(read_chats, real("sft/oasst_zh/oaast_rm_zh.json")).problem
    assert message.endswith('oaast_rm_zh.json:record 1: field "output" is a list, not text')
    message = refused(read_prompts, real("prompts/instructionwild/user_2.jsonl")).problem
    assert message.endswith("user_2.jsonl:134:455: invalid JSON: invalid \\escape")


def test_real_hh_pairs_are_sound():
    found = read_pairs(real("preference/hh/hh_dev.jsonl.gz"), subset="harmless-base", bad_rows="skip")
    assert 1000 < len(found.rows) < 6000
    for pair in found.rows:
        assert pair.prompt[-1].role == "user"
        assert pair.chosen[-1].role == pair.rejected[-1].role == "assistant"
        assert pair.chosen != pair.rejected


def test_real_gsm8k_keeps_the_answer():
    prompt = read_prompts(real("prompts/gsm8k_train/train.jsonl"), max_rows=1).rows[0]
    assert prompt.meta["answer"].endswith("#### 72")


# --- the whole --------------------------------------------------------------------------------------------


def mutated(data, rng):
    """`data` after one to three random accidents."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, size = rng.randrange(len(out) + 1), rng.randint(1, 12)
        accident = rng.randrange(6)
        if accident == 0:
            del out[at : at + size]
        elif accident == 1:
            out[at:at] = rng.randbytes(size)
        elif accident == 2 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif accident == 3:
            del out[at:]
        elif accident == 4:
            word = rng.choice(
                [b"null", b"NaN", b'"', b"{", b"[", b"}", b"]", b",", b"\\ud800", b"\0", b"\xff", b"1e999"]
            )
            out[at:at] = word
        else:
            other = rng.randrange(len(out) + 1)
            out[at:at] = out[other : other + 40]
    return bytes(out)


FUZZED = [
    (
        "chats",
        "a.jsonl",
        "".join(json.dumps(row) + "\n" for row in [GOOD, {"messages": said(USER, ANSWER)}] * 3),
    ),
    ("pairs", "a.json", json.dumps([PAIR, {"chosen": HH + "a", "rejected": HH + "b"}] * 3, indent=1)),
    ("prompts", "a.csv", 'prompt,answer\n"a, b",1\n"c\nd",2\nsay ""e"",3\n'),
    ("prompts", "a.json", json.dumps({"data": [{"messages": said(USER)}, {"turns": ["a"]}]})),
]


def attempt(reader, source, **options):
    try:
        return reader(source, **options)
    except UserError as error:
        return error


@pytest.mark.parametrize(("kind", "name", "text"), FUZZED)
@pytest.mark.parametrize("zipped", [False, True])
def test_fuzz_ends_in_rows_or_a_user_error(here, kind, name, text, zipped):
    rng = random.Random(f"{kind} {name} {zipped}")
    name += ".gz" if zipped else ""
    outcomes = set()
    for turn in range(150):
        # Of the zipped files one half is damaged before zipping, the other after.
        if not zipped:
            data = mutated(text.encode(), rng)
        elif turn % 2:
            data = mutated(packed(text.encode()), rng)
        else:
            data = packed(mutated(text.encode(), rng))
        Path(name).write_bytes(data)
        result = attempt(READERS[kind], name, bad_rows="skip" if turn % 3 else "error")
        outcomes.add(type(result))
        # What is shown can be printed; the problem is one line that names the file.
        assert f"{result} {result!r}".encode()
        assert result.problem.startswith(name) if isinstance(result, UserError) else result.rows
        assert "\n" not in getattr(result, "problem", "")
    assert outcomes == {Rows, UserError}


def test_fuzz_parquet(here):
    arrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([{"prompt": f"Hi {n}", "n": n} for n in range(20)]), "good.parquet")
    whole, rng = Path("good.parquet").read_bytes(), random.Random(7)
    for _ in range(60):
        Path("a.parquet").write_bytes(mutated(whole, rng))
        result = attempt(read_prompts, "a.parquet", bad_rows="skip")
        assert isinstance(result, UserError) or result.rows


def test_reading_needs_the_standard_library_only(here):
    source = write_jsonl("a.jsonl", GOOD)
    code = (
        "import sys; from kinkajou.data.sources import read_chats; "
        f"assert len(read_chats({source!r}).rows) == 1; "
        "heavy = {'torch', 'numpy', 'pyarrow', 'datasets', 'transformers'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
