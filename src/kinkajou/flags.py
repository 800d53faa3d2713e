"""From fields of settings to flags: names without a prefix, numbers read as what they are."""

import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args

import cyclopts
from cyclopts import Parameter

from kinkajou import config


def grouped(kind: type[Any]) -> type[Any]:
    """Marks every nested group so that its fields become flags without a prefix, and numbers as what they are."""
    for item in fields(kind):
        if isinstance(item.type, type) and is_dataclass(item.type):
            kind.__annotations__[item.name] = Annotated[grouped(item.type), Parameter(name="*")]
        elif item.type is int:
            kind.__annotations__[item.name] = Annotated[int, Parameter(converter=whole)]
        elif item.type == int | None:
            kind.__annotations__[item.name] = Annotated[int | None, Parameter(converter=whole_or_none)]
        elif item.type in (float, float | None):
            read = number if item.name in config.UNBOUNDED else finite
            kind.__annotations__[item.name] = Annotated[item.type, Parameter(converter=read)]
        elif item.type == tuple[str, ...]:  # --stop-on A B, or --stop-on A --stop-on B
            kind.__annotations__[item.name] = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]
    return kind


def names_of(kind: type[Any]) -> set[str]:
    """The flags of a config class, those of its groups included."""
    found = set[str]()
    for item in fields(kind):
        found |= names_of(item.type) if isinstance(item.type, type) and is_dataclass(item.type) else {item.name}
    return found


def whole(kind: Any, tokens: Sequence[cyclopts.Token]) -> int:
    """A whole number of 64 bits, 1e3 included; cyclopts alone would make 2 of 2.5."""
    word, value = tokens[0].value, None
    with contextlib.suppress(ValueError):
        value = float(word)
        value = int(word)
    if value is not None and -(2**63) <= value < 2**63 and value == int(value):
        return int(value)
    raise unreadable(tokens[0], "int")


def number(kind: Any, tokens: Sequence[cyclopts.Token], *, most: float = math.inf) -> float | None:
    word = tokens[0].value
    if type(None) in get_args(kind) and word.lower() in ("none", "null"):
        return None
    with contextlib.suppress(ValueError):
        if abs(value := float(word)) <= most:  # which NaN is not
            return value
    raise unreadable(tokens[0], "float" if most == math.inf else "a finite number")


def finite(kind: Any, tokens: Sequence[cyclopts.Token]) -> float | None:
    """Infinity is refused where it means nothing: a learning rate of it would train garbage."""
    return number(kind, tokens, most=sys.float_info.max)


def unreadable(token: cyclopts.Token, kind: str) -> ValueError:
    place = "" if token.source in ("", "cli") else f" from {token.source}"
    return ValueError(f'unable to convert "{token.value}"{place} into {kind}')


def whole_or_none(kind: Any, tokens: Sequence[cyclopts.Token]) -> int | None:
    return None if tokens[0].value.lower() in ("none", "null") else whole(kind, tokens)
