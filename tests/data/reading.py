"""Readers and how they are tried: shared by the tests of formats, containers and sources."""

import gzip
import json
from pathlib import Path

import pytest

from kinkajou.data.sources import (
    read_chats,
    read_pairs,
    read_prompts,
)
from kinkajou.errors import UserError

READERS = {"chats": read_chats, "pairs": read_pairs, "prompts": read_prompts}
GOOD = {"instruction": "Add 1 and 2.", "output": "3"}
PAIR = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}
USER, ANSWER = ("user", "Hi"), ("assistant", "Hello!")
HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant: "


def write_jsonl(path, *rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def packed(data):
    return gzip.compress(data, mtime=0)


def said(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


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
