"""What a data file is read into, and what is refused in any row whatever its format."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, TypeAlias

Role = Literal["system", "user", "assistant", "text"]
MAX_ROW_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; the role "text" is raw text to train on as it is.

    `ended` False marks an answer that was cut off: no end token follows it.
    """

    role: Role
    content: str
    ended: bool = True


Messages: TypeAlias = tuple[Message, ...]
Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chat:
    """Ends with an assistant message, or is one "text" message."""

    messages: Messages
    place: str


@dataclass(frozen=True, slots=True)
class Pair:
    """`prompt` ends with the user; `chosen` and `rejected` follow it and end with the assistant.

    `meta` is what else the row holds (its subset or source, say).
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    place: str
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Judged:
    """`prompt` ends with the user; `answer` follows it, and somebody said whether it is good."""

    prompt: Messages
    answer: Messages
    good: bool
    place: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ends with the user; `meta` is what else the row holds (an answer to check against, say)."""

    messages: Messages
    meta: Mapping[str, Any]
    place: str


class RowFault(Exception):
    """Why one row is refused; `column` (from 1) where the fault has one."""

    def __init__(self, problem: str, *, evidence: str = "", fix: str = "", column: int = 0) -> None:
        self.problem, self.evidence, self.fix, self.column = problem, evidence, fix, column
        super().__init__(problem)


def as_row(value: object) -> Row:
    """The row itself, once it is known to be an object of sound text and sane size."""
    if not isinstance(value, dict):
        raise RowFault(f"the record is {kind(value)}, not an object with fields")
    size = 0
    for name, content in value.items():
        for text in _texts([name, content]):
            try:
                size += len(text.encode())
            except UnicodeEncodeError as exc:
                code = f"\\u{ord(text[exc.start]):04x}"
                raise RowFault(f"field {shown(name)} holds half a character (lone surrogate {code})") from None
            if "\0" in text:
                raise RowFault(f"field {shown(name)} holds a NUL character")
    if size > MAX_ROW_BYTES:
        raise too_long()
    return value


def too_long() -> RowFault:
    return RowFault(f"the row is longer than {MAX_ROW_BYTES:,} bytes", fix="split or drop the row")


def shown(text: str, limit: int = 60) -> str:
    """In double quotes, cut, and with nothing a terminal or an encoder could stumble over."""
    safe = repr(text[:limit])[1:-1]
    return f'"{safe}..."' if len(text) > limit else f'"{safe}"'


def listed(names: Iterable[str]) -> str:
    """The first twelve names, as safe to print as `shown`."""
    return ", ".join(shown(name)[1:-1] for name in islice(names, 12))


def kind(value: object) -> str:
    """What a JSON user would call it."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _texts(value: object) -> Iterator[str]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            stack += item
