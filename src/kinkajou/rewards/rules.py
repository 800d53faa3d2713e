"""Rules that score an answer by looking at it, named in a recipe as `rule:NAME` or `rule:NAME:ARGUMENT`."""

import re
from collections.abc import Callable

from kinkajou.data.records import shown
from kinkajou.data.world import check
from kinkajou.errors import UserError, did_you_mean
from kinkajou.rewards.answer import Answer, Rule
from kinkajou.rewards.countdown import countdown
from kinkajou.rewards.forms import pattern, repetition, tags, whole_number
from kinkajou.rewards.ifeval import ifeval
from kinkajou.rewards.truths import boxed, exact, number, sequence

__all__ = ["RULES", "Answer", "Rule", "parse_rule"]


def mentions(argument: str) -> Rule:
    """1 if any of the comma-separated words stands in the answer, whatever its case."""
    words = [re.escape(word.strip()) for word in argument.split(",") if word.strip()]
    if not words:
        raise UserError("rule:mentions needs words", fix="rule:mentions:happy,glad")
    pattern = re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)
    return lambda answer: float(bool(pattern.search(answer.text)))


def length(argument: str) -> Rule:
    """1 at the wanted number of words, falling linearly to 0 at none and at twice as many."""
    wanted = whole_number(argument, most=10**9)
    if wanted is None:
        raise UserError("rule:length needs a number of words", evidence=shown(argument), fix="rule:length:40")
    return lambda answer: max(0.0, 1 - abs(len(answer.text.split()) - wanted) / wanted)


def words(argument: str) -> Rule:
    """1 if the answer has as many words as asked: `20-50`, `20-` or `-50`."""
    low, dash, high = argument.partition("-")
    sound = dash and (low or high) and all(end.isdecimal() and len(end) < 10 for end in (low, high) if end)
    least, most = (int(low or 0), int(high or 10**9)) if sound else (1, 0)
    if least > most:
        raise UserError("rule:words needs a range", evidence=repr(argument), fix="rule:words:20-50")
    return lambda answer: float(least <= len(answer.text.split()) <= most)


def ended(argument: str) -> Rule:
    """1 if the answer ended by itself."""
    return lambda answer: float(answer.ended)


def world(argument: str) -> Rule:
    """The toy world's checker, which knows the truth (data/world.py)."""
    return lambda answer: check(answer.prompt.meta, answer.text, ended=answer.ended).score


RULES: dict[str, Callable[[str], Rule]] = {
    "mentions": mentions,
    "length": length,
    "words": words,
    "ended": ended,
    "repetition": repetition,
    "exact": exact,
    "number": number,
    "boxed": boxed,
    "countdown": countdown,
    "sequence": sequence,
    "format": tags,
    "regex": pattern,
    "ifeval": ifeval,
    "world": world,
}
BARE = ("ended", "countdown", "sequence", "world")


def parse_rule(spec: str) -> Rule:
    """The rule that `rule:NAME[:ARGUMENT]` names."""
    _, _, rest = spec.partition(":")
    name, _, argument = rest.partition(":")
    if name not in RULES:
        raise UserError(f"unknown rule {name!r}", fix=f"{did_you_mean(name, tuple(RULES))} (docs/rewards.md)")
    if argument and name in BARE:
        raise UserError(f"rule:{name} takes no argument", evidence=repr(argument), fix=f"rule:{name}")
    return RULES[name](argument)
