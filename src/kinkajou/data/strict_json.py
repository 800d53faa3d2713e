"""JSON from strangers: what Python's parser forgives is refused here."""

import json
from collections import Counter
from typing import Any

MAX_DEPTH = 64
MAX_DIGITS = 4300


class JSONFault(ValueError):
    """`pos` is where in the text; `end` is where reading can go on, None when the text itself is broken."""

    def __init__(self, problem: str, pos: int, end: int | None = None) -> None:
        self.problem, self.pos, self.end = problem, pos, end
        super().__init__(problem)


def parse(text: str) -> Any:
    """The one value of `text`; JSONFault for anything that is not exactly that."""
    value, end = decode(text, skip_space(text, 0))
    if (rest := skip_space(text, end)) < len(text):
        raise JSONFault("invalid JSON: extra data after the value", rest)
    return value


def decode(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends.

    Refused as well: NaN and Infinity, numbers beyond float64, integers over 4,300 digits, keys given twice
    (Python would keep the last), more than 64 levels.
    """
    faults: list[str] = []
    try:
        value, end = _decoder(faults).raw_decode(text, start)
    except json.JSONDecodeError as exc:
        what = exc.msg.removesuffix(" at").removesuffix(" starting")
        raise JSONFault(f"invalid JSON: {what[0].lower()}{what[1:]}", exc.pos) from None
    except RecursionError:
        raise JSONFault(f"nested deeper than {MAX_DEPTH} levels", start) from None
    brackets = text.count("[", start, end) + text.count("{", start, end)
    if brackets > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        faults.append(f"nested deeper than {MAX_DEPTH} levels")
    if faults:
        raise JSONFault(faults[0], start, end)
    return value, end


def skip_space(text: str, pos: int) -> int:
    """The first position at or after `pos` that is not JSON white space."""
    while pos < len(text) and text[pos] in " \t\n\r":
        pos += 1
    return pos


def line_column(text: str, pos: int) -> tuple[int, int]:
    """Both counted from 1."""
    return text.count("\n", 0, pos) + 1, pos - text.rfind("\n", 0, pos)


def _decoder(faults: list[str]) -> json.JSONDecoder:
    # The hooks note a fault and go on instead of raising: so the end of the value stays known, and a reader
    # of an array can refuse one record and still find the next.
    def constant(word: str) -> None:
        faults.append(f"{word} is not JSON")

    def integer(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_DIGITS:
            faults.append(f"an integer of {len(digits.lstrip('-')):,} digits; the limit is {MAX_DIGITS:,}")
            return 0
        return int(digits)

    def real(digits: str) -> float:
        number = float(digits)
        if number in (float("inf"), float("-inf")):
            faults.append("a number too large for a 64-bit float")
        return number

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice, _ = (Counter(name for name, _ in pairs)).most_common(1)[0]
            faults.append(f'field "{repr(twice)[1:-1][:60]}" is given twice')
        return made

    return json.JSONDecoder(object_pairs_hook=table, parse_constant=constant, parse_int=integer, parse_float=real)


def _depth(value: Any) -> int:
    # By levels, not by recursion: the text decides how deep this goes.
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth
