"""Rules about an answer's form: tags, a pattern, repetition."""

import re
import warnings
from collections.abc import Iterable
from re import _constants as ops  # type: ignore[attr-defined]  # the parser is the only one who knows the syntax
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from kinkajou.errors import UserError
from kinkajou.rewards.answer import Answer, Rule

MAX_SEARCHED = 10_000
"""Characters of an answer that a pattern is searched in."""

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
    """1 if the regular expression is found in the answer's first 10,000 characters."""
    compiled = compile_safely(argument)
    return lambda answer: float(bool(compiled.search(answer.text[:MAX_SEARCHED])))


def compile_safely(text: str) -> re.Pattern[str]:
    """The pattern; UserError where it is unsound, or holds a repetition inside a repetition, which can take forever."""
    fix = r"rule:regex:(?i)answer: \d+"
    if not text:
        raise UserError("rule:regex needs a pattern", fix=fix)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what will change its meaning is refused too
            compiled = re.compile(text)
            nested = repeats_inside(parser.parse(text))
    except (re.error, OverflowError, RecursionError, Warning) as fault:
        raise UserError("rule:regex: the pattern is unsound", evidence=f"{text!r}: {fault}", fix=fix) from None
    if nested:
        raise UserError(
            "rule:regex: a repetition or choice inside a repetition can take forever",
            evidence=repr(text),
            fix="write it without, as [ab]+ for (a|b+)+; or use a Python function, which has a timeout",
        )
    return compiled


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


def repetition(argument: str) -> Rule:
    """Minus the share of n-grams of words that stood before: 0 without repetition, never below -1."""
    text = argument or "3"
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise UserError("rule:repetition needs a number of words", evidence=repr(argument), fix="rule:repetition:3")
    size = int(text)

    def rule(answer: Answer) -> float:
        said = WORD.findall(answer.text.casefold())
        grams = [tuple(said[i : i + size]) for i in range(len(said) - size + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return rule
