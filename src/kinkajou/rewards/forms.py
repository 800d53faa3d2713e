"""Rules about an answer's form: tags, a pattern, repetition."""

import math
import re
import warnings
from collections.abc import Iterable

# Private, but what `*` is depends on escapes, classes, comments and flags: only the parser knows it all.
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from kinkajou.data.records import shown
from kinkajou.errors import UserError
from kinkajou.rewards.answer import Answer, Rule

MAX_SEARCHED, LEAST_SEARCHED = 10_000, 100
"""Characters of an answer that a pattern is searched in; one that could not go as far as the least is refused."""
STEPS = 600_000
"""Places that a search may try: less than a tenth of a second at worst."""
MOST_REPEATS = 2
SHORT = 8
"""Times up to which a repetition counts as so many choices."""

REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT)
# Kana and Han are written without spaces: there each character counts as a word.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")


def tags(argument: str) -> Rule:
    """1 if the answer is `<a>..</a><b>..</b>`: each tag once, in order, nothing but white space around.

    A first tag that the prompt has opened at its end is taken as open.
    """
    names = [name.strip() for name in argument.split(",") if name.strip()]
    if not names or len(set(names)) < len(names) or not all(re.fullmatch(r"[A-Za-z_][\w-]*", name) for name in names):
        raise UserError("rule:format needs different tags", evidence=repr(argument), fix="rule:format:think,answer")

    def rule(answer: Answer) -> float:
        first = f"<{names[0]}>"
        opened = answer.question.rstrip().endswith(first)
        return float(tagged((first if opened else "") + answer.text, names))

    return rule


def tagged(text: str, names: Iterable[str]) -> bool:
    rest = text
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        if text.count(opening) != 1 or text.count(closing) != 1 or not rest.lstrip().startswith(opening):
            return False
        _, closed, rest = rest.partition(closing)
        if not closed:
            return False
    return not rest.strip()


def pattern(argument: str) -> Rule:
    """1 if the regular expression is found in the answer's beginning, as much of it as can be searched at once."""
    compiled, searched = compile_safely(argument)
    asks_for_end = "$" in argument or r"\Z" in argument

    def rule(answer: Answer) -> float:
        found = compiled.search(answer.text[:searched])
        if found and asks_for_end and found.end() == searched < len(answer.text):
            return 0.0  # the end of what is searched is not the answer's
        return float(bool(found))

    return rule


def compile_safely(text: str) -> tuple[re.Pattern[str], int]:
    """The pattern and how many characters it is searched in; UserError where it is unsound or could take forever."""
    fix = r"rule:regex:(?i)answer: \d+"
    if not text:
        raise UserError("rule:regex needs a pattern", fix=fix)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what will change its meaning is refused too
            compiled, parsed = re.compile(text), parser.parse(text)
            nested, (repeats, choices) = repeats_inside(parsed), ways(parsed, at_end=True)
    except (re.error, OverflowError, RecursionError, Warning) as fault:
        raise UserError("rule:regex: the pattern is unsound", evidence=f"{text!r}: {fault}", fix=fix) from None
    other = "or use a Python function, which has a timeout"
    if nested:
        raise UserError(
            "rule:regex: a repetition or choice inside a repetition can take forever",
            evidence=repr(text),
            fix=f"write it without, as [ab]+ for (a|b+)+; {other}",
        )
    free = repeats + (not begins_at_start(parsed))  # ends that move: n characters have n^free / free! places for them
    steps = STEPS * math.factorial(free) / (choices * (1 + len(text) // 32))
    searched = min(MAX_SEARCHED, int(steps ** (1 / max(1, free))))
    if repeats > MOST_REPEATS or searched < LEAST_SEARCHED:
        raise UserError(
            "rule:regex: so many repetitions or choices one after another can take forever",
            evidence=f"{repeats} repetitions before the end, {choices:,} choices: {text!r}",
            fix=f"at most {MOST_REPEATS} such as * and +, and few such as ? and |; {other}",
        )
    return compiled, searched


def begins_at_start(parsed: Any) -> bool:
    """Whether a match can begin nowhere but at the text's beginning."""
    first = parsed[0] if len(parsed) else None
    starts = [(ops.AT, ops.AT_BEGINNING_STRING)]
    if not parsed.state.flags & re.MULTILINE:
        starts.append((ops.AT, ops.AT_BEGINNING))
    return first in starts


def ways(node: Any, *, at_end: bool) -> tuple[int, int]:
    """How a match may be tried: long repetitions, and the product of short choices.

    At the pattern's end a repetition cannot fail once it has its least: there only that counts.
    """
    last = len(node) - 1
    found = [ways_of(op, value, at_end=at_end and i == last) for i, (op, value) in enumerate(node)]
    return sum(repeats for repeats, _ in found), math.prod(choices for _, choices in found)


def ways_of(op: Any, value: Any, *, at_end: bool) -> tuple[int, int]:
    if op in REPEATS:
        low, high, below = value
        repeats, choices = ways(below, at_end=at_end)
        most = low if at_end else high
        return (repeats + 1, choices) if most > SHORT else (repeats, choices * (most - low + 1))
    if op is ops.BRANCH:
        found = [ways(below, at_end=at_end) for below in value[1]]
        return max(repeats for repeats, _ in found), sum(choices for _, choices in found)
    if op is ops.GROUPREF:  # as long as what it repeats
        return 1, 1
    found = [ways(below, at_end=at_end and op is not ops.ASSERT_NOT) for below in below_of(value)]
    return sum(repeats for repeats, _ in found), math.prod(choices for _, choices in found)


def repeats_inside(node: Any, repeated: bool = False) -> bool:
    """Whether something of variable length or a choice stands below a repetition."""
    for op, value in node:
        if op in REPEATS:
            low, high, below = value
            found = (repeated and low != high) or repeats_inside(below, repeated or high > 1)
        else:
            found = (repeated and op is ops.BRANCH) or any(repeats_inside(x, repeated) for x in below_of(value))
        if found:
            return True
    return False


def below_of(value: Any) -> list[Any]:
    """The sub-patterns among an operation's arguments."""
    if isinstance(value, parser.SubPattern):
        return [value]
    return [part for item in value for part in below_of(item)] if isinstance(value, list | tuple) else []


def whole_number(text: str, *, most: int) -> int | None:
    """1 to `most`, written in the digits 0 to 9; None for anything else."""
    if not re.fullmatch(r"[0-9]{1,10}", text):
        return None
    return number if 1 <= (number := int(text)) <= most else None


def repetition(argument: str) -> Rule:
    """Minus the share of n-grams of words that stood before: 0 without repetition, never below -1."""
    size = whole_number(argument or "3", most=100)
    if size is None:
        raise UserError("rule:repetition needs a number of words", evidence=shown(argument), fix="rule:repetition:3")

    def rule(answer: Answer) -> float:
        said = WORD.findall(answer.text.casefold())
        grams = [tuple(said[i : i + size]) for i in range(len(said) - size + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return rule
