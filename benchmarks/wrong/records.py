"""Good records of every schema and form, in every kind of file, each with the place of its rows."""

import csv
import gzip
import importlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from benchmarks.wrong.cases import Draw, Good

Row = dict[str, Any]
WORDS = [f"w{i}" for i in range(3, 90)]
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)
spoken = st.one_of(
    words, words, st.sampled_from(["naïve \U0001f43e", "日本 w5", "a\u2028b w7", "<end> w3", '"w4", w5'])
)


def turn(role: str, text: str) -> Row:
    return {"role": role, "content": text}


@dataclass(frozen=True)
class Form:
    """`needs` are the fields that a row must have; of a flat form each is text (or a label)."""

    needs: tuple[str, ...]
    make: Callable[[str, str, str, bool], Row]
    """From three texts, the last two never the same, and a label."""
    flat: bool = True


FORMS: dict[str, tuple[Form, ...]] = {
    "chats": (
        Form(("instruction", "output"), lambda a, b, c, good: {"instruction": a, "output": b}),
        Form(("prompt", "response"), lambda a, b, c, good: {"prompt": a, "response": b, "n": 1}),
        Form(("question", "answer"), lambda a, b, c, good: {"question": a, "answer": b}),
        Form(("messages",), lambda a, b, c, good: {"messages": [turn("user", a), turn("assistant", b)]}, flat=False),
        Form(
            ("conversations",),
            lambda a, b, c, good: {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]},
            flat=False,
        ),
    ),
    "pairs": (
        Form(("prompt", "chosen", "rejected"), lambda a, b, c, good: {"prompt": a, "chosen": b, "rejected": c}),
        Form(
            ("question", "response_j", "response_k"),
            lambda a, b, c, good: {"question": a, "response_j": b, "response_k": c},
        ),
        Form(
            ("chosen", "rejected"),
            lambda a, b, c, good: {
                "chosen": [turn("user", a), turn("assistant", b)],
                "rejected": [turn("user", a), turn("assistant", c)],
            },
            flat=False,
        ),
    ),
    "judged": (
        Form(
            ("prompt", "completion", "label"),
            lambda a, b, c, good: {"prompt": a, "completion": b, "label": good},
        ),
        Form(
            ("messages", "label"),
            lambda a, b, c, good: {"messages": [turn("user", a), turn("assistant", b)], "label": good},
            flat=False,
        ),
    ),
    "prompts": (
        Form(("prompt",), lambda a, b, c, good: {"prompt": a, "answer": 3}),
        Form(("question",), lambda a, b, c, good: {"question": a}),
        Form(("messages",), lambda a, b, c, good: {"messages": [turn("user", a)]}, flat=False),
    ),
}
SCHEMAS = tuple(FORMS)


def rows(draw: Draw, form: Form, *, least: int = 5, most: int = 8) -> list[Row]:
    """Both labels are among them, and no two rows are the same."""
    count = draw(st.integers(least, most))
    made = []
    for i in range(count):
        first, second, third = draw(spoken), draw(spoken), draw(words)
        made.append(form.make(f"w{i + 3} {first}", f"w30 {second}", f"w31 {third}", i % 2 == 0))
    return made


# --- files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of file: bytes of rows (text per row where rows are lines of their own), and where a row stands."""

    suffix: str
    write: Callable[[Sequence[Row]], bytes]
    place: Callable[[int], str]
    flat: bool = False
    """Takes flat rows alone."""
    raw: bool = False
    """Rows may be given as JSON text."""


def dumped(row: Row | str) -> str:
    return row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)


def as_lines(rows: Sequence[Row | str]) -> bytes:
    return "".join(f"{dumped(row)}\n" for row in rows).encode(errors="surrogatepass")


def as_array(rows: Sequence[Row | str]) -> bytes:
    return f"[{', '.join(map(dumped, rows))}]\n".encode(errors="surrogatepass")


def as_csv(rows: Sequence[Row]) -> bytes:
    file = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = csv.DictWriter(file, names, lineterminator="\n")
    out.writeheader()
    out.writerows(rows)
    return file.getvalue().encode()


def as_parquet(rows: Sequence[Row]) -> bytes:
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    sink = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def line(i: int) -> str:
    return f":{i + 1}"


def record(i: int) -> str:
    return f":record {i + 1}"


KINDS = (
    Kind(".jsonl", as_lines, line, raw=True),
    Kind(".ndjson", as_lines, line, raw=True),
    Kind(".jsonl.gz", lambda rows: packed(as_lines(rows)), line, raw=True),
    Kind(".json", as_array, record, raw=True),
    Kind(".json", lambda rows: b'{"data": ' + as_array(rows) + b"}", record, raw=True),
    Kind(".json.gz", lambda rows: packed(as_array(rows)), record, raw=True),
    Kind(".csv", as_csv, lambda i: f":{i + 2}", flat=True),
    Kind(".csv.gz", lambda rows: packed(as_csv(rows)), lambda i: f":{i + 2}", flat=True),
    Kind(".parquet", as_parquet, record),
)


# --- commands that read them ------------------------------------------------------------------------------

COMMON = ["--template", "plain", "--max_len", "48"]
ROLLOUT = ["--steps", "1", "--prompts_per_step", "2", "--max_new_tokens", "4", "--minibatch_size"]


def command(draw: Draw, schema: str, good: Good, source: str) -> list[str]:
    """One of those that read this schema, over a file of it."""
    policy = ["--model", good.policy, *COMMON]
    step = ["--data", source, "--output", "run", "--batch_size", "2", "--epochs", "0.3"]
    asked = ["--prompts", source, "--reward", "rule:ended", "--output", "run"]
    found = {
        "chats": [["sft", *policy, *step], ["check", "sft", *policy, "--data", source, "--batch_size", "2"]],
        "pairs": [
            ["reward", *policy, *step],
            ["prefer", *policy, *step],
            ["eval", "reward", "--model", good.judge, *COMMON, "--data", source],
        ],
        "judged": [["prefer", *policy, *step, "--loss", "kto"]],
        "prompts": [
            ["ppo", *policy, *asked, *ROLLOUT, "2"],
            ["grpo", *policy, *asked, *ROLLOUT, "4", "--group_size", "2"],
            [
                *["sample", "--model", good.policy, *COMMON, "--prompts", source, "--reward", "rule:ended"],
                *["--output", "out.jsonl", "--group_size", "2", "--max_new_tokens", "4"],
            ],
        ],
    }[schema]
    return list(draw(st.sampled_from(found)))
