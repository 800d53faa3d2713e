"""Settings as flat tables: recipes are read from TOML and every run writes its own."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kinkajou.errors import UserError


def flat(config: Any) -> dict[str, Any]:
    """A config's fields by flag name, groups dissolved: what a recipe holds."""
    rows: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        rows |= flat(value) if dataclasses.is_dataclass(value) else {item.name: value}
    return rows


def from_flat(kind: type[Any], table: dict[str, Any]) -> Any:
    """A config from what `flat` has made of it, and TOML of that; keys that no group knows are refused."""
    left = dict(table)

    def made(kind: type[Any]) -> Any:
        given: dict[str, Any] = {}
        for item in dataclasses.fields(kind):
            if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
                given[item.name] = made(item.type)
            elif item.name in left:
                value = left.pop(item.name)
                given[item.name] = tuple(value) if isinstance(value, list) else value
        return kind(**given)

    config = made(kind)
    if left:
        raise UserError(f"unknown setting {min(left)!r}", evidence=f"given: {shown_value(left[min(left)])}")
    return config


def jsonable(x: Any) -> Any:
    """A setting as it comes back from JSON or TOML."""
    return list(x) if isinstance(x, tuple) else x


def to_toml(tables: dict[str, dict[str, Any]]) -> str:
    """TOML of flat tables; None is left out, since it means 'not given'."""
    lines: list[str] = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {toml_value(value)}" for key, value in table.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def check_texts(path: Path, stage: str, table: dict[str, Any], kind: type[Any]) -> None:
    """UserError for a value of another kind where text belongs: a reader of flags would take 3 for "3"."""
    hints = dict(texts_of(kind))
    for key, value in table.items():
        name = key.replace("-", "_")
        several = isinstance(value, list) and hints.get(name) == "texts"
        wrong = [item for item in (value if several else [value]) if not isinstance(item, str)]
        if name in hints and wrong:
            what = "texts in brackets" if hints[name] == "texts" else "one text"
            raise UserError(
                f"{path}: [{stage}] {key} must be {what}",
                evidence=f"{key} = {shown_value(wrong[0])}",
                fix=f'{key} = "..."' + (f' or {key} = ["...", "..."]' if hints[name] == "texts" else ""),
            )


def texts_of(kind: type[Any]) -> Iterator[tuple[str, str]]:
    """Settings that are text, or several texts, those of the groups included."""
    for item in dataclasses.fields(kind):
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            yield from texts_of(item.type)
        elif item.type in (str, str | None):
            yield item.name, "text"
        elif item.type == tuple[str, ...]:
            yield item.name, "texts"


def shown_value(value: Any) -> str:
    return toml_value(value) if isinstance(value, bool | int | float) else f"{str(value)[:60]}"


def read_recipe(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a recipe file, one a stage."""
    import tomllib

    if not path.is_file():
        raise UserError(f"no recipe at {path}", fix="recipes/ has one for each stage")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise UserError(f"{path} is not valid TOML", evidence=str(fault)) from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(
                f"{path}: key {name!r} stands before any table",
                fix="put it under the stage's name, such as [sft]",
            )
    return tables
