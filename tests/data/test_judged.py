"""Answers with a label: which rows make one, and which are refused."""

import pytest
from reading import ANSWER, HH, PAIR, USER, only, refused, said, turns, write_jsonl

from kinkajou.data.sources import Judged, Pair, read_judged

GOOD = {"prompt": "Hi", "completion": "Hello!", "label": True}


@pytest.mark.parametrize(
    ("row", "good"),
    [
        (GOOD, True),
        (GOOD | {"label": False}, False),
        ({"prompt": said(USER), "completion": said(ANSWER), "label": True}, True),
        ({"messages": said(USER, ANSWER), "label": False}, False),
        ({"messages": said(USER, ANSWER), "kto_tag": True}, True),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}], "kto_tag": False},
            False,
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello!", "kto_tag": True}, True),
        ({"instruction": "Hi", "output": "Hello!", "tag": False}, False),
        ({"question": "Hi", "answer": "Hello!", "label": "True"}, True),
        ({"prompt": "Hi", "response": "Hello!", "label": " false"}, False),
    ],
)
def test_formats(here, row, good):
    record = only(read_judged, row)
    assert isinstance(record, Judged)
    assert (turns(record.prompt), turns(record.answer), record.good) == ([USER], [ANSWER], good)
    assert record.place == "one.jsonl:1"


def test_only_the_last_answer_is_judged(here):
    record = only(read_judged, {"prompt": HH.rstrip(), "completion": " Because.", "label": True})
    assert turns(record.prompt) == [USER, ANSWER, ("user", "Why?")]
    assert turns(record.answer) == [("assistant", "Because.")]


@pytest.mark.parametrize("row", [PAIR, PAIR | {"label": 1}, {"chosen": HH + "a", "rejected": HH + "b"}])
def test_a_pair_stays_a_pair(here, row):
    assert isinstance(only(read_judged, row), Pair)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Hi", "completion": "Hello!"}, 'missing field "label"'),
        ({"prompt": "Hi", "label": True}, 'missing field "'),
        (GOOD | {"label": 1}, 'field "label" is a number, not true or false'),
        (GOOD | {"label": None}, 'field "label" is null, not true or false'),
        (GOOD | {"label": "good"}, 'field "label" is "good", not true or false'),
        ({"instruction": "Hi", "output": "x", "tag": "maths"}, 'field "tag" is "maths", not true or false'),
        (GOOD | {"completion": " "}, 'field "completion" is empty'),
        ({"messages": said(USER), "label": True}, "the conversation ends with the user, not with an answer"),
        ({"messages": said(ANSWER), "label": True}, "the answer follows nobody, not the user"),
        ({"messages": said(USER, ANSWER, ANSWER), "label": True}, "the answer follows the assistant, not the user"),
        (PAIR | {"rejected": "Hello!"}, 'fields "chosen" and "rejected" are the same'),
        ("text", "the record is text, not an object with fields"),
    ],
)
def test_refused(here, row, problem):
    error = refused(read_judged, write_jsonl("bad.jsonl", GOOD, row))
    assert error.problem.startswith(f"bad.jsonl:2: {problem}")
    assert "--bad-rows skip" in error.fix
    assert len(read_judged("bad.jsonl", bad_rows="skip").rows) == 1


@pytest.mark.parametrize(("name", "count"), [("kto_en_demo.json", 300), ("kto-mix-test.json", 1092)])
def test_public_files(shared_data, name, count):
    rows = read_judged(str(shared_data / "preference" / "llamafactory" / name))
    assert len(rows.rows) == count
    assert not rows.skipped
    assert sum(row.good for row in rows.rows) == count // 2
