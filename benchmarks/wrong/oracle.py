"""Whether the bytes of a file hold sound records, told by Python's own readers: the judge of random damage."""

import csv
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Sequence
from typing import Any

from benchmarks.wrong.records import Form


class Unsound(Exception):
    pass


def sound_rows(data: bytes, suffix: str, form: Form) -> int | None:
    """How many rows the file has, None if any of it is bad."""
    try:
        if suffix.endswith(".gz"):
            data = gzip.decompress(data)
        found = TABLES[suffix.removesuffix(".gz")](data)
    except (Unsound, EOFError, OSError, zlib.error, ValueError, RecursionError, csv.Error):
        return None
    return len(found) if found and all(sound(row, form) for row in found) else None


def sound(row: Any, form: Form) -> bool:
    if not isinstance(row, dict) or any(bad(text) for text in (*row, *row.values()) if isinstance(text, str)):
        return False
    texts = [row.get(name) for name in form.needs if name != "label"]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return False
    if "label" in form.needs and str(row.get("label")).strip().lower() not in ("true", "false"):
        return False
    return not ({"chosen", "response_j"} & {*form.needs} and texts[-1] == texts[-2])


def bad(text: str) -> bool:
    return "\0" in text or any(0xD800 <= ord(letter) <= 0xDFFF for letter in text)


def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise Unsound
    return dict(pairs)


def no_constant(word: str) -> None:
    raise Unsound


def parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=once, parse_constant=no_constant)


def of_lines(data: bytes) -> list[Any]:
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [parsed(line.decode().rstrip("\r\n")) for line in lines if line.strip()]


def of_document(data: bytes) -> list[Any]:
    found = parsed(data.decode("utf-8-sig"))
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        return list(found["data"])
    return found if isinstance(found, list) else [found]


def of_csv(data: bytes) -> list[Any]:
    lines = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    header, *rest = [line for line in lines if line] or [[]]
    names = [name.strip() for name in header]
    if any(len(row) != len(names) for row in rest) or len({*filter(None, names)}) < len([*filter(None, names)]):
        raise Unsound
    return [{name: cell for name, cell in zip(names, row, strict=True) if name} for row in rest]


def of_parquet(data: bytes) -> list[Any]:
    parquet: Any = importlib.import_module("pyarrow.parquet")
    try:
        return list(parquet.ParquetFile(io.BytesIO(data)).read().to_pylist())
    except Exception:
        # A damaged file comes out of Arrow as any of a dozen exceptions.
        raise Unsound from None


TABLES = {".jsonl": of_lines, ".ndjson": of_lines, ".json": of_document, ".csv": of_csv, ".parquet": of_parquet}
