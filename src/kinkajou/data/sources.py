"""The one reader of training data: a file or a hub id -> checked records; a fault names file, line, field."""

import difflib
import hashlib
import importlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from kinkajou.data.containers import Records, faults_named, records, suffix_of
from kinkajou.data.formats import build_chat, build_pair, build_prompt
from kinkajou.data.judged import build_judged
from kinkajou.data.records import Chat, Judged, Message, Pair, Prompt, Role, RowFault, listed, shown
from kinkajou.errors import UserError, did_you_mean
from kinkajou.hub import answers, is_path

__all__ = [
    "BadRow",
    "Chat",
    "Judged",
    "Message",
    "Pair",
    "Prompt",
    "Role",
    "Rows",
    "describe_skipped",
    "read_chats",
    "read_judged",
    "read_pairs",
    "read_prompts",
]

R = TypeVar("R", covariant=True)
OnBadRow: TypeAlias = Literal["error", "skip", "skip_any"]
OR_SKIP = ", or pass --bad-rows skip"
"""The second way out of a bad row, for commands that have it."""
MAX_BAD_SHARE = 0.01
"""Of the rows read; one bad row may be skipped in any file.  Above this, what wrote the file is broken."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was skipped, and why."""

    place: str
    problem: str


@dataclass(frozen=True, slots=True)
class Rows(Generic[R]):
    """What a source holds; `sha256` is of the file's bytes (of the rows as read, for a hub id)."""

    rows: tuple[R, ...]
    skipped: tuple[BadRow, ...]
    sha256: str


def read_chats(
    source: str, *, subset: str | None = None, max_rows: int | None = None, bad_rows: OnBadRow = "error"
) -> Rows[Chat]:
    """Conversations to imitate.

    `source` is a .json, .jsonl, .ndjson or .csv file (each also .gz), a .parquet file, or a hub id
    "owner/name" where no such path exists. `subset` keeps the rows whose field "subset" says so; of a hub id
    it is the configuration, split or folder. `max_rows` keeps the first good rows. UserError for anything
    that is not sound data: with `bad_rows="skip"` bad rows are set aside instead, unless no row is good or more
    than 1 % of the rows (and more than one) are bad.
    """
    return _read(source, build_chat, subset, max_rows, bad_rows)


def read_pairs(
    source: str, *, subset: str | None = None, max_rows: int | None = None, bad_rows: OnBadRow = "error"
) -> Rows[Pair]:
    """Preferences: two answers to one prompt, the better one known. Arguments as in `read_chats`."""
    return _read(source, build_pair, subset, max_rows, bad_rows)


def read_judged(
    source: str, *, subset: str | None = None, max_rows: int | None = None, bad_rows: OnBadRow = "error"
) -> Rows[Judged | Pair]:
    """Answers that are known to be good or bad; a pair is one of each. Arguments as in `read_chats`."""
    return _read(source, build_judged, subset, max_rows, bad_rows)


def read_prompts(
    source: str, *, subset: str | None = None, max_rows: int | None = None, bad_rows: OnBadRow = "error"
) -> Rows[Prompt]:
    """What the policy is asked; answers in the rows are not used. Arguments as in `read_chats`."""
    return _read(source, build_prompt, subset, max_rows, bad_rows)


def describe_skipped(skipped: Sequence[BadRow]) -> str:
    """How many rows were skipped and the first five, in one paragraph; "" for none."""
    if not skipped:
        return ""
    places = "; ".join(f"{row.place} ({row.problem})" for row in skipped[:5])
    more = f"; and {len(skipped) - 5:,} more" if len(skipped) > 5 else ""
    return f"skipped {len(skipped):,} bad row{'s' * (len(skipped) > 1)}: {places}{more}"


def _read(
    source: str,
    build: Callable[[object, str], R],
    subset: str | None,
    max_rows: int | None,
    bad_rows: OnBadRow,
) -> Rows[R]:
    if max_rows is not None and max_rows < 1:
        raise UserError(f"max_rows is {max_rows}", fix="give 1 or more, or leave it out to read every row")
    opened = _file(source, subset) if _is_local(source) else _hub(source, subset)
    rows: list[R] = []
    skipped: list[BadRow] = []
    first: tuple[str, RowFault] | None = None
    with opened as (raw, sha256):
        for place, value in raw:
            try:
                if isinstance(value, RowFault):
                    raise value
                rows.append(build(value, place))
            except RowFault as fault:
                if bad_rows == "error":
                    raise _row_error(place, fault) from None
                first = first or (place, fault)
                skipped.append(BadRow(_exact(place, fault), fault.problem))
            if len(rows) == max_rows:
                break
        if not rows and first is not None:
            raise _all_bad(source, len(skipped), *first)
        if bad_rows == "skip" and len(skipped) > max(1, MAX_BAD_SHARE * (len(rows) + len(skipped))):
            raise UserError(
                f"{source}: {len(skipped):,} of {len(rows) + len(skipped):,} rows are bad; "
                f"{MAX_BAD_SHARE:.0%} may be skipped",
                evidence=describe_skipped(skipped),
                fix="is it the right file? --bad_rows skip_any skips any number of them",
            )
        if not rows:
            raise UserError(f"{source}: no rows", fix="the source is empty: look at what wrote it")
        return Rows(tuple(rows), tuple(skipped), sha256())


def _exact(place: str, fault: RowFault) -> str:
    return f"{place}:{fault.column}" if fault.column else place


def _row_error(place: str, fault: RowFault) -> UserError:
    fix = f"{fault.fix or 'mend the row'}{OR_SKIP}"
    return UserError(f"{_exact(place, fault)}: {fault.problem}", evidence=fault.evidence, fix=fix)


def _all_bad(source: str, count: int, place: str, fault: RowFault) -> UserError:
    problem = f"{source}: no good row among {count:,}; the first: {_exact(place, fault)}: {fault.problem}"
    return UserError(problem, evidence=fault.evidence, fix=fault.fix or "mend the rows")


# --- files ------------------------------------------------------------------------------------------------


def _is_local(source: str) -> bool:
    """False for a hub id: owner/name, with no such path or folder and no suffix of a data file."""
    if os.path.lexists(source) or is_path(source) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source):
        return True
    try:
        suffix_of(source)
    except UserError:
        return False
    return True


@contextmanager
def _file(source: str, subset: str | None) -> Iterator[tuple[Records, Callable[[], str]]]:
    with faults_named(source), _open(source) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        raw = records(file, source)
        yield raw if subset is None else _only(raw, subset, source), lambda: digest


def _open(source: str) -> io.BufferedReader:
    path = Path(source)
    if not source or "\0" in source or not path.exists():
        raise UserError(f"{source or repr('')}: no such file", fix=_near_files(path))
    if path.is_dir():
        here = ", ".join(_data_files(path)[:8]) or "no data files"
        raise UserError(f"{source}: a folder, not a file", evidence=f"it holds {here}", fix="name one file")
    suffix_of(source)
    if not path.is_file():
        raise UserError(f"{source}: not a regular file", fix="copy the data to a file first: it is read twice")
    return path.open("rb")


def _data_files(folder: Path) -> list[str]:
    """Names in `folder` that look like data; none where it cannot be listed."""
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []
    return [name for name in names if re.search(r"\.(jsonl?|ndjson|csv)(\.gz)?$|\.parquet$", name.lower())]


def _near_files(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return f"the folder {path.parent} does not exist either"
    names = _data_files(path.parent)
    if near := difflib.get_close_matches(path.name, names, n=3, cutoff=0.5):
        return "did you mean " + " or ".join(str(path.parent / name) for name in near) + "?"
    return f"in {path.parent} there is: {', '.join(names[:8])}" if names else "check the path"


def _only(raw: Records, subset: str, source: str) -> Records:
    """The rows of one subset; faults pass, for nobody knows where they belong."""
    others: Counter[str] = Counter()
    found = False
    for place, value in raw:
        if not isinstance(value, dict):
            yield place, value
        elif not isinstance(name := value.get("subset"), str):
            yield place, RowFault('missing field "subset"', fix="leave --subset out")
        elif name == subset:
            found = True
            yield place, value
        else:
            others[name] += 1
    if others and not found:
        names = [shown(name)[1:-1] for name, _ in others.most_common(12)]
        present = listed(f"{name} ({count:,})" for name, count in others.most_common())
        problem = f"{source}: no rows of the subset {shown(subset)}"
        raise UserError(problem, evidence=f"present: {present}", fix=did_you_mean(subset, names))


# --- the hub ----------------------------------------------------------------------------------------------


@contextmanager
def _hub(source: str, subset: str | None) -> Iterator[tuple[Records, Callable[[], str]]]:
    table = _hub_table(source, subset)
    digest = hashlib.sha256()

    def raw() -> Records:
        for number, row in enumerate(table, start=1):
            digest.update(repr(row).encode(errors="backslashreplace"))
            yield f"{source}:record {number}", row

    yield raw(), digest.hexdigest


def _hub_table(source: str, subset: str | None) -> Any:
    either = f"{source}: no such file, and as a hub id "
    if not answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: then the cache alone is asked, not a minute of retries
    try:
        hub: Any = importlib.import_module("datasets")
    except ImportError:
        fix = "correct the path, or pip install kinkajou[data] for the hub"
        raise UserError(f"{either}it needs the package datasets", fix=fix) from None
    try:
        if subset is None:
            return hub.load_dataset(source, split="train")
        configs = hub.get_dataset_config_names(source)
        if subset in configs:
            return hub.load_dataset(source, subset, split="train")
        if len(configs) == 1 and subset in hub.get_dataset_split_names(source, configs[0]):
            return hub.load_dataset(source, split=subset)
        return hub.load_dataset(source, data_dir=subset, split="train")
    except Exception as exc:
        # The hub client lets through errors of a dozen libraries; none of them is a fault of ours.
        seen = f"{type(exc).__name__}: {next(iter(str(exc).splitlines()), '')[:200]}"
        part = f" (subset {shown(subset)})" if subset else ""
        fix = "correct the path, or the id and subset; is the network there?"
        raise UserError(f"{either}it could not be loaded{part}", evidence=seen, fix=fix) from exc
