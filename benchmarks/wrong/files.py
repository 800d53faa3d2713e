"""Whole files that are not what they seem, and files with damage at random places."""

import os
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

from benchmarks.wrong.cases import Case, Draw, Good
from benchmarks.wrong.oracle import sound_rows
from benchmarks.wrong.records import FORMS, KINDS, SCHEMAS, Form, Kind, as_lines, command, packed, rows

BOM = b"\xef\xbb\xbf"
Remade = Callable[[Draw, bytes], bytes]
SPACE = (b"", b"\n", b" \n\n \t\n", b"\r\n\r\n", BOM, BOM + b"\n")


def cut(draw: Draw, data: bytes) -> bytes:
    return data[: draw(st.integers(1, len(data) - 1))]


def flipped(draw: Draw, data: bytes) -> bytes:
    """A byte in the body, which a checksum notices."""
    at = draw(st.integers(10, len(data) - 9))
    return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]


def noise(draw: Draw, data: bytes) -> bytes:
    return bytes(range(256)) + draw(st.binary(min_size=64, max_size=2000))


# Name -> the file's name, the bytes made of good lines, and whether that is a file to train on.
WHOLE: dict[str, tuple[str, Remade, bool]] = {
    "empty or blank": ("f.jsonl", lambda draw, data: draw(st.sampled_from(SPACE)), False),
    "empty document": ("f.json", lambda draw, data: draw(st.sampled_from([*SPACE, b"[]", b" [ ] \n"])), False),
    "empty table": ("f.csv", lambda draw, data: draw(st.sampled_from([*SPACE, b"prompt,n\n"])), False),
    "empty inside gz": ("f.jsonl.gz", lambda draw, data: packed(draw(st.sampled_from(SPACE))), False),
    "truncated gz": ("f.jsonl.gz", lambda draw, data: cut(draw, packed(data)), False),
    "corrupt gz": ("f.jsonl.gz", lambda draw, data: flipped(draw, packed(data)), False),
    "text named .gz": ("f.jsonl.gz", lambda draw, data: data, False),
    "gz without its suffix": ("f.jsonl", lambda draw, data: packed(data), False),
    "gz in gz": ("f.jsonl.gz", lambda draw, data: packed(packed(data)), False),
    "UTF-16": (
        "f.jsonl",
        lambda draw, data: data.decode().encode(draw(st.sampled_from(["utf-16", "utf-16-le", "utf-16-be", "utf-32"]))),
        False,
    ),
    "UTF-16 table": ("f.csv", lambda draw, data: "prompt,response\nw3,w4\n".encode("utf-16"), False),
    "Latin-1": ("f.jsonl", lambda draw, data: data + '{"prompt": "é", "response": "é"}\n'.encode("latin-1"), False),
    "NUL bytes": ("f.jsonl", lambda draw, data: data + bytes(draw(st.integers(1, 5000))), False),
    "only NUL bytes": ("f.csv", lambda draw, data: bytes(draw(st.integers(1, 5000))), False),
    "noise": ("f.jsonl", noise, False),
    "noise named .json": ("f.json", noise, False),
    "noise named .csv": ("f.csv", noise, False),
    "noise named .parquet": ("f.parquet", noise, False),
    "text named .parquet": ("f.parquet", lambda draw, data: data, False),
    "zip": ("f.jsonl", lambda draw, data: b"PK\x03\x04" + data, False),
    "zstd": ("f.jsonl", lambda draw, data: b"\x28\xb5\x2f\xfd" + data, False),
    "web page": ("f.jsonl", lambda draw, data: b"<!DOCTYPE html>\n<html><body>404</body></html>\n", False),
    "git lfs pointer": (
        "f.jsonl",
        lambda draw, data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        False,
    ),
    "lfs pointer named .csv": ("f.csv", lambda draw, data: b"version https://git-lfs.github.com/spec/v1\n", False),
    "an array named .jsonl": ("f.jsonl", lambda draw, data: b"[" + data.replace(b"\n", b",\n") + b"{}]", False),
    "cut in the last line": ("f.jsonl", lambda draw, data: data[: -draw(st.integers(2, 15))], False),
    "cut array": ("f.json", lambda draw, data: array(data)[: -draw(st.integers(1, 15))], False),
    "trailing comma": ("f.json", lambda draw, data: array(data)[:-1] + b",]", False),
    "two arrays": ("f.json", lambda draw, data: array(data) * 2, False),
    "bare words": ("f.json", lambda draw, data: b"hello", False),
    "JSON of another thing": (
        "f.json",
        lambda draw, data: draw(st.sampled_from([b"3", b"null", b'"text"', b"{}"])),
        False,
    ),
    "deep document": ("f.json", lambda draw, data: b"[" * draw(st.integers(70, 300_000)), False),
    "deep lines": ("f.jsonl", lambda draw, data: data + b'{"a":' * draw(st.integers(70, 190_000)) + b"\n", False),
    "a line of 50 MB": ("f.jsonl", lambda draw, data: data + b'{"prompt": "' + b"x" * 50_000_000 + b'"}\n', False),
    "50 MB without a line end": ("f.jsonl", lambda draw, data: b" w3" * 17_000_000, False),
    "a line of 50 MB in gz": ("f.jsonl.gz", lambda draw, data: packed(data + b'"' + b"x" * 50_000_000), False),
    "a string of 50 MB": ("f.json", lambda draw, data: b'["' + b"x" * 50_000_000 + b'"]', False),
    "a cell of 50 MB": ("f.csv", lambda draw, data: b'prompt,response\n"' + b"x" * 50_000_000 + b'",w3\n', False),
    "an open quote over 20 MB": (
        "f.csv",
        lambda draw, data: b'prompt,response\n"w3,w4\n' + b"w5,w6\n" * 3_000_000,
        False,
    ),
    "a header twice": ("f.csv", lambda draw, data: b"prompt,prompt\nw3,w4\n", False),
    "no header": ("f.csv", lambda draw, data: b"w3,w4\nw5,w6\n", False),
    "semicolons": ("f.csv", lambda draw, data: b"prompt;response\nw3;w4\n", False),
    "BOM": ("f.jsonl", lambda draw, data: BOM + data, True),
    "BOM in gz": ("f.jsonl.gz", lambda draw, data: packed(BOM + data), True),
    "Windows line ends": ("f.jsonl", lambda draw, data: data.replace(b"\n", b"\r\n"), True),
    "blank lines": ("f.jsonl", lambda draw, data: b"\n \n" + data.replace(b"\n", b"\n\n"), True),
    "no last line end": ("f.jsonl", lambda draw, data: data.rstrip(b"\n"), True),
    "BOM before an array": ("f.json", lambda draw, data: BOM + b"\n " + array(data), True),
    "lines named .json": ("f.json", lambda draw, data: data, True),
    "gz in two parts": ("f.jsonl.gz", lambda draw, data: packed(data) * 2, True),
}


def array(lines: bytes) -> bytes:
    return b"[" + b",".join(lines.strip().split(b"\n")) + b"]"


def whole_files(draw: Draw, folder: Path, good: Good) -> Case:
    kind = draw(st.sampled_from([*WHOLE]))
    name, remade, sound = WHOLE[kind]
    form = FORMS["chats"][1]
    (folder / name).write_bytes(remade(draw, as_lines(rows(draw, form))))
    arguments = command(draw, "chats", good, name)
    skips = not sound and kind not in COSTS_A_ROW and draw(st.booleans())
    if skips:
        arguments += ["--bad_rows", "skip"]
    return Case(f"file: {kind}", arguments, () if sound else [name], expected="runs" if sound else "refused")


COSTS_A_ROW = (
    "Latin-1",
    "NUL bytes",
    "cut in the last line",
    "deep lines",
    "a line of 50 MB",
    "an open quote over 20 MB",
)
"""The rows before it are good: with `--bad_rows skip` they are trained on."""


def no_file(draw: Draw, folder: Path, good: Good) -> Case:
    """Names of what cannot be read."""
    schema = draw(st.sampled_from(SCHEMAS))
    (folder / "set").mkdir(exist_ok=True)
    (folder / "set.jsonl").mkdir(exist_ok=True)
    (folder / "near.jsonl").write_text("{}")
    for name, target in (("gone.jsonl", "nowhere.jsonl"), ("loop.jsonl", "loop.jsonl")):
        if not os.path.lexists(folder / name):
            (folder / name).symlink_to(target)
    if not (folder / "pipe.jsonl").exists():
        os.mkfifo(folder / "pipe.jsonl")
    places = ["set", "set.jsonl", "gone.jsonl", "loop.jsonl", "pipe.jsonl", "/dev/null", "/dev/zero", "/proc/self/mem"]
    places += [
        "naer.jsonl",
        "no/such/near.jsonl",
        "near.txt",
        "near",
        "~/near.jsonl",
        "near.jsonl/more.jsonl",
        ".",
        "/",
    ]
    places += [
        "x" * 300 + ".jsonl",
        "some/body",
        "http://127.0.0.1:1/near.jsonl",
        "near.jsonl.zip",
        "*.jsonl",
        "$HOME/a",
    ]
    place = draw(st.sampled_from(places))
    return Case("file: none to read", command(draw, schema, good, place), [place[:50]])


def damaged(draw: Draw, folder: Path, good: Good) -> Case:
    """Bytes changed, put in, taken out or doubled at random; whether that is a good file, Python's readers say."""
    schema = draw(st.sampled_from(SCHEMAS))
    form: Form = draw(st.sampled_from([form for form in FORMS[schema] if form.flat]))
    kind: Kind = draw(st.sampled_from(KINDS))
    data = kind.write(rows(draw, form))
    for _ in range(draw(st.integers(1, 3))):
        at, size = draw(st.integers(0, len(data))), draw(st.sampled_from([1, 1, 1, 2, 7, 40]))
        new = draw(st.one_of(st.binary(min_size=size, max_size=size), st.sampled_from([b"\n", b'"', b",", b"{", b"]"])))
        how = draw(st.sampled_from(["change", "insert", "delete", "double", "cut"]))
        end = min(len(data), at + size)
        data = {
            "change": data[:at] + new + data[end:],
            "insert": data[:at] + new + data[at:],
            "delete": data[:at] + data[end:],
            "double": data[:end] + data[at:],
            "cut": data[:at],
        }[how]
    name = f"hurt{kind.suffix}"
    (folder / name).write_bytes(data)
    arguments = command(draw, schema, good, name)
    count = sound_rows(data, kind.suffix, form)
    if count is not None and count < 2:
        return Case(f"damage: {kind.suffix}, too short", arguments, expected="refused")
    if count is None:
        return Case(f"damage: {kind.suffix}", arguments, [name])
    return Case(f"damage: {kind.suffix}, still sound", arguments, expected="runs")
