"""A data file -> its raw records, each with its place; what a record means is not known here."""

import csv
import gzip
import importlib
import io
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeAlias

from kinkajou.data.records import MAX_ROW_BYTES, RowFault, listed, shown, too_long
from kinkajou.data.strict_json import JSONFault, decode, line_column, parse, skip_space
from kinkajou.errors import UserError

Records: TypeAlias = Iterator[tuple[str, object]]
"""Places ("file.jsonl:12") with rows; a RowFault stands where a row could not be read."""

MAX_DOCUMENT_BYTES = 1 << 30
CSV_QUOTES = 'quote text that holds a comma, a quote or a line end, and double the quotes inside ("")'
BOM = b"\xef\xbb\xbf"
SIGNATURES = {
    b"\x1f\x8b": ("gzip data", "name it with .gz at the end"),
    b"PAR1": ("a parquet file", "name it .parquet"),
    b"PK\x03\x04": ("a zip archive", "unpack it first"),
    b"\x28\xb5\x2f\xfd": ("zstd data", "unpack it first"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
}


@contextmanager
def faults_named(name: str) -> Iterator[None]:
    """What reading can raise while rows are drawn, as a UserError."""
    try:
        yield
    except EOFError:
        raise UserError(f"{name}: the gzip data ends too early", fix="fetch or write the file again") from None
    except (gzip.BadGzipFile, zlib.error) as exc:
        raise UserError(f"{name}: corrupt gzip data", evidence=str(exc), fix="fetch or write it again") from None
    except OSError as exc:
        raise UserError(f"{name}: cannot be read", evidence=exc.strerror or str(exc)) from None


def suffix_of(name: str) -> str:
    """The suffix that names the format, without .gz; UserError when it is none of ours."""
    base = os.path.basename(name).lower()
    plain = base.removesuffix(".gz")
    suffix = os.path.splitext(plain)[1]
    if suffix not in READERS or (suffix == ".parquet" and plain != base):
        known = f"{' '.join(READERS)}, all but .parquet also with .gz"
        raise UserError(f"{name}: unknown kind of data file", fix=f"known: {known}")
    return suffix


def records(file: io.BufferedReader, name: str) -> Records:
    """The raw records of an open file, which `name` gives the format and the places."""
    suffix = suffix_of(name)
    if suffix != ".parquet":
        if name.lower().endswith(".gz"):
            file = io.BufferedReader(gzip.GzipFile(fileobj=file))
        _refuse_binary(file.peek(4096)[:4096], name)
    yield from READERS[suffix](file, name)


def _refuse_binary(head: bytes, name: str) -> None:
    for start, (what, fix) in SIGNATURES.items():
        if head.startswith(start):
            raise UserError(f"{name}: this is {what}", evidence=f"it begins with {start.hex(' ')}", fix=fix)
    control = sum(byte < 9 or 13 < byte < 32 for byte in head)
    if control * 20 > len(head):
        raise UserError(f"{name}: binary data, not text", evidence=f"it begins with {head[:16].hex(' ')}")


# --- text -------------------------------------------------------------------------------------------------


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as exc:
        column = len(line[: exc.start].decode()) + 1
        seen = line[exc.start : exc.start + 4].hex(" ")
        raise RowFault(f"not UTF-8: bytes {seen}", fix="save the file as UTF-8", column=column) from None


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; None for one over the limit, which is never held in memory."""
    number, limit = 0, len(BOM) + MAX_ROW_BYTES + len(b"\r\n")
    while line := file.readline(limit):
        number += 1
        rest = line
        while len(rest) == limit and not rest.endswith(b"\n"):
            rest = file.readline(limit)
        whole = rest is line
        if number == 1:
            line = line.removeprefix(BOM)
        yield number, line if whole and len(line.rstrip(b"\r\n")) <= MAX_ROW_BYTES else None


def _full_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    return ((number, line) for number, line in _lines(file) if line is None or line.strip())


def _parsed_line(line: bytes | None) -> object:
    if line is None:
        return too_long()
    try:
        text = _decoded(line.rstrip(b"\r\n"))
        return parse(text)
    except RowFault as fault:
        return fault
    except JSONFault as fault:
        return RowFault(fault.problem, evidence=_around(text, fault.pos), column=fault.pos + 1)


def _around(text: str, pos: int) -> str:
    return repr(text[max(0, pos - 30) : pos + 10])


def _json_lines(file: BinaryIO, name: str) -> Records:
    for index, (number, line) in enumerate(_full_lines(file)):
        if index == 0 and line is not None and line.lstrip().startswith(b"["):
            raise UserError(
                f"{name}:{number}: a JSON array, not one object a line",
                evidence=repr(line[:40].decode(errors="replace")),
                fix="end the name in .json",
            )
        yield f"{name}:{number}", _parsed_line(line)


# --- json -------------------------------------------------------------------------------------------------


def _json(file: BinaryIO, name: str) -> Records:
    data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"{name}: over {MAX_DOCUMENT_BYTES:,} bytes", fix="write it as .jsonl, which is read line by line"
        )
    if _is_json_lines(data):
        return _json_lines(io.BytesIO(data), name)
    return _json_document(_document_text(data.removeprefix(BOM), name), name)


def _is_json_lines(data: bytes) -> bool:
    """Whether the first line is an object by itself: then a fault costs a line, not the file."""
    first = next(_full_lines(io.BytesIO(data)), (0, None))[1]
    value = _parsed_line(first) if first is not None else None
    return isinstance(value, dict) and not isinstance(value.get("data"), list)


def _document_text(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        start = data.rfind(b"\n", 0, exc.start) + 1
        line, column = data.count(b"\n", 0, start) + 1, len(data[start : exc.start].decode()) + 1
        seen = data[exc.start : exc.start + 4].hex(" ")
        raise UserError(f"{name}:{line}:{column}: not UTF-8: bytes {seen}", fix="save the file as UTF-8") from None


def _json_document(text: str, name: str) -> Records:
    """One array, or one {"data": [...]}, or values one after the other."""
    pos = skip_space(text, 0)
    if text.startswith("[", pos):
        pos = yield from _array(text, pos, name)
        if pos < len(text):
            raise _broken(text, JSONFault("invalid JSON: extra data after the array", pos), name)
        return
    line = 1 + text.count("\n", 0, pos)
    while pos < len(text):
        start, (value, end) = pos, _value(text, pos, name)
        pos = skip_space(text, end)
        inner = value.get("data") if isinstance(value, dict) else None
        if isinstance(inner, list) and pos == len(text):
            yield from ((f"{name}:record {number}", item) for number, item in enumerate(inner, start=1))
        elif isinstance(value, RowFault) and pos == len(text) and (inside := _data_at(text, start)):
            yield from _array(text, inside, name)  # one bad record does not cost the others
        else:
            yield f"{name}:{line}", too_long() if end - start > MAX_ROW_BYTES else value
        line += text.count("\n", start, pos)


def _data_at(text: str, pos: int) -> int | None:
    """Where the array of `{..., "data": [...]}` begins; None where the value at `pos` is nothing like it."""
    while text[pos : pos + 1] in ("{", ","):
        key, end = decode(text, skip_space(text, pos + 1))
        value = skip_space(text, skip_space(text, end) + 1)  # after the colon
        if key == "data":
            return value if text.startswith("[", value) else None
        try:
            _, end = decode(text, value)
        except JSONFault as fault:
            end = fault.end or len(text)
        pos = skip_space(text, end)
    return None


def _array(text: str, pos: int, name: str) -> Generator[tuple[str, object], None, int]:
    """The records of the array that begins at `pos`; returns the first position after it and its space."""
    pos = skip_space(text, pos + 1)
    number = 0
    while not text.startswith("]", pos):
        number += 1
        if number > 1:
            if not text.startswith(",", pos):
                raise _broken(text, JSONFault("invalid JSON: expecting ',' or ']' after a record", pos), name)
            pos = skip_space(text, pos + 1)
        start, (value, pos) = pos, _value(text, pos, name)
        yield f"{name}:record {number}", too_long() if pos - start > MAX_ROW_BYTES else value
        pos = skip_space(text, pos)
    return skip_space(text, pos + 1)


def _value(text: str, pos: int, name: str) -> tuple[object, int]:
    """A value, or the RowFault that stands for it; UserError where the text itself is broken."""
    try:
        return decode(text, pos)
    except JSONFault as fault:
        if fault.end is None:
            raise _broken(text, fault, name) from None
        return RowFault(fault.problem), fault.end


def _broken(text: str, fault: JSONFault, name: str) -> UserError:
    line, column = line_column(text, fault.pos)
    return UserError(
        f"{name}:{line}:{column}: {fault.problem}",
        evidence=_around(text, fault.pos),
        fix="mend the file at that place (one broken spot makes the rest of an array unreadable)",
    )


# --- csv and parquet --------------------------------------------------------------------------------------


def _csv(file: BinaryIO, name: str) -> Records:
    # The limit is global to the process and 131,072 by default: a long prompt would be an error.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    unreadable: list[tuple[int, RowFault]] = []
    reader = csv.reader(_csv_lines(file, unreadable), strict=True)
    header: list[str] | None = None
    done = False
    while not done:
        line = reader.line_num + 1
        fault, cells = None, None
        unreadable.clear()
        try:
            cells = next(reader, None)
            done = cells is None
        except csv.Error as exc:
            # One lost quote swallows lines up to the next quote: say which.
            fault = RowFault(f"invalid csv in lines {line} to {reader.line_num}: {exc}", fix=CSV_QUOTES)
        if unreadable:
            line, fault = unreadable[0]
        if header is None:
            header = _csv_header(cells, fault, f"{name}:{line}") if cells or fault else None
        elif fault is not None:
            yield f"{name}:{line}", fault
        elif cells:
            yield f"{name}:{line}", _csv_row(header, cells)


def _csv_lines(file: BinaryIO, unreadable: list[tuple[int, RowFault]]) -> Iterator[str]:
    # A generator that raises is dead and would end the file: so faults go aside, and the line goes on mended.
    for number, line in _lines(file):
        text = "\n"
        try:
            if line is None:
                raise too_long()
            text = line.decode(errors="replace")
            _decoded(line)
        except RowFault as fault:
            unreadable.append((number, fault))
        yield text


def _csv_header(cells: list[str] | None, fault: RowFault | None, place: str) -> list[str]:
    names = [cell.strip() for cell in cells or ()]
    problem = fault.problem if fault else ""
    if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        problem = f"column {shown(twice[0])} is given twice"
    if problem:
        evidence = f"the header is: {listed(names)}"
        raise UserError(f"{place}: {problem}", evidence=evidence, fix="the first line must name the columns")
    return names


def _csv_row(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        return RowFault(f"the row has {len(cells)} columns, the header {len(header)}", fix=CSV_QUOTES)
    # A column without a name is the row number that pandas writes.
    return {name: cell for name, cell in zip(header, cells, strict=True) if name}


def _parquet(file: BinaryIO, name: str) -> Records:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{name}: reading parquet needs pyarrow", fix="pip install kinkajou[data]") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}:record {number}", row
    except Exception as exc:
        # A damaged file comes out of Arrow as any of a dozen exceptions, a KeyError among them.
        where = f" after record {number}" if number else ""
        seen = str(exc).splitlines()[0][:200] if str(exc) else type(exc).__name__
        raise UserError(f"{name}: not a readable parquet file{where}", evidence=seen) from None


READERS: dict[str, Callable[[BinaryIO, str], Records]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
