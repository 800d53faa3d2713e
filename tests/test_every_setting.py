"""Every setting of every command in every wrong way: exit code 2, and the setting is named."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from benchmarks.wrong.cases import Case, tried
from benchmarks.wrong.settings import (
    COMMANDS,
    EVERY,
    INFINITE,
    NEEDS,
    NUMBER,
    RANGES,
    WHOLE,
    WRONG_TOML,
    WRONG_WORDS,
    Setting,
    given,
    range_of,
    spelt,
    wrong_recipe,
)

from kinkajou.cli import STAGES, main


def other_types(setting: Setting) -> Iterator[str]:
    yield from WRONG_WORDS.get(setting.kind, ())


def beyond(setting: Setting) -> Iterator[str]:
    """Just outside of each end, and what is no number."""
    if setting.kind not in (WHOLE, NUMBER):
        return
    low, high = range_of(setting)
    yield "nan" if setting.kind == NUMBER else str(10**30)
    if setting.kind == NUMBER and setting.name not in INFINITE:
        yield from ("inf", "-inf")
    if low > -math.inf:
        yield str(math.floor(low) - 1) if setting.kind == WHOLE else repr(low - 0.5)
    if high < math.inf:
        yield str(math.ceil(high) + 1) if setting.kind == WHOLE else repr(high + 0.5)


def unanswered(setting: Setting, case: Case, folder: Path) -> list[tuple[str, object]]:
    answer = tried(case, main, folder)
    faults = [fault for fault in answer.faults if not fault.endswith(" s") or fault.startswith("still")]
    return [(f"{setting.command} {setting.name}", (*faults, *case.arguments, answer.said))] if faults else []


def test_each_name_in_one_wrong_way(tmp_path: Path) -> None:
    """Of every name one command and one word or number; the slow tests below are all of them."""
    names = {one.name: one for one in EVERY}
    assert len(names) > 100
    for number, one in enumerate(names.values()):
        words = [*other_types(one), *beyond(one)]
        word = words[number % len(words)] if words else ""
        case = Case("", given(one, word), [spelt(one.name)])
        if not words and one.command in STAGES:
            value = WRONG_TOML[one.kind][number % len(WRONG_TOML[one.kind])]
            case = wrong_recipe(lambda strategy, value=value: value, one, tmp_path)
        if words or one.command in STAGES:
            assert unanswered(one, case, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("words", [other_types, beyond])
def test_flags(words: Callable[[Setting], Iterator[str]], command: str, tmp_path: Path) -> None:
    own = [setting for setting in EVERY if setting.command == command]
    cases = [(one, Case("", given(one, word), [spelt(one.name)])) for one in own for word in words(one)]
    assert cases
    assert [fault for one, case in cases for fault in unanswered(one, case, tmp_path)] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", STAGES)
def test_recipes(command: str, tmp_path: Path) -> None:
    own = [one for one in EVERY if one.command == command]
    for one in own:
        for value in WRONG_TOML[one.kind]:
            if (one.name in INFINITE) and value == "inf":
                continue
            case = wrong_recipe(lambda strategy, value=value: value, one, tmp_path)
            assert f"{one.name} = {value}\n" in (tmp_path / "given.toml").read_text()
            assert unanswered(one, case, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_names_that_are_none(command: str, tmp_path: Path) -> None:
    """Each name with a letter too many, as a flag, and in the recipe of a stage as a key."""
    needs = NEEDS.get(command, {})
    for one in (one for one in EVERY if one.command == command):
        name = f"{one.name}q"
        flags = [*COMMANDS[command][1], *(f"--{key}={word}" for key, word in needs.items()), f"--{name}", "1"]
        assert unanswered(one, Case("", flags, [spelt(name)]), tmp_path) == []
        if command in STAGES:
            text = "".join(f'{key} = "{word}"\n' for key, word in needs.items())
            (tmp_path / "given.toml").write_text(f"[{command}]\n{text}{name} = 1\n")
            case = Case("", [command, "given.toml"], ["given.toml", spelt(name)])
            assert unanswered(one, case, tmp_path) == []


def test_every_number_has_its_range_written_down() -> None:
    """A new setting is not left out of these tests."""
    numbers = {one.name for one in EVERY if one.kind in (WHOLE, NUMBER)}
    assert numbers <= set(RANGES)
    assert len(EVERY) > 300
    assert all(range_of(one)[0] <= range_of(one)[1] for one in EVERY if one.name in numbers)
