"""The countdown task: reach a target from given numbers by + - * /, in exact fractions and without `eval`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from kinkajou.data.records import shown
from kinkajou.errors import UserError
from kinkajou.rewards.answer import Answer, Rule, field

MAX_EQUATION, MAX_DEPTH = 300, 30
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})  # noqa: RUF001


class Unsound(Exception):
    """The text is no arithmetic."""


@dataclass
class Reader:
    """Recursive descent over tokens; `used` collects the numbers in the order they stand."""

    tokens: Sequence[str]
    used: list[int]
    at: int = 0
    depth: int = 0

    def take(self, wanted: str) -> str | None:
        """The next token, if it is among the characters wanted; "0" stands for any number."""
        if self.at == len(self.tokens):
            return None
        token = self.tokens[self.at]
        if token in wanted or ("0" in wanted and token.isdigit()):
            self.at += 1
            return token
        return None

    def sum(self) -> Fraction:
        value = self.product()
        while sign := self.take("+-"):
            other = self.product()
            value = value + other if sign == "+" else value - other
        return value

    def product(self) -> Fraction:
        value = self.factor()
        while sign := self.take("*/"):
            other = self.factor()
            if sign == "/" and not other:
                raise Unsound("division by 0")
            value = value * other if sign == "*" else value / other
        return value

    def factor(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unsound("too deep")
        if sign := self.take("+-"):
            value = self.factor() * (-1 if sign == "-" else 1)
        elif self.take("("):
            value = self.sum()
            if not self.take(")"):
                raise Unsound("a bracket is open")
        elif digits := self.take("0"):
            self.used.append(int(digits))
            value = Fraction(int(digits))
        else:
            raise Unsound("a number is missing")
        self.depth -= 1
        return value


def calculate(text: str) -> tuple[Fraction, list[int]]:
    """The value of an expression and the whole numbers in it; Unsound for anything else."""
    text = text.translate(SIGNS)
    if len(text) > MAX_EQUATION or not re.fullmatch(r"[0-9+\-*/()\s]+", text):
        raise Unsound("something else than numbers and + - * / ( )")
    reader = Reader(re.findall(r"[0-9]+|[^\s0-9]", text), [])
    value = reader.sum()
    if reader.at < len(reader.tokens):
        raise Unsound("something follows")
    return value, reader.used


def countdown(argument: str) -> Rule:
    """1 if the last `<answer>` reaches the row's `target` with each of its `nums` exactly once (TinyZero)."""

    def rule(answer: Answer) -> float:
        target, numbers = task_of(answer)
        found = re.findall(r"<answer>([^<]*)</answer>", answer.text)
        try:
            value, used = calculate(found[-1] if found else "")
        except Unsound:
            return 0.0
        return float(value == target and sorted(used) == sorted(numbers))

    return rule


def task_of(answer: Answer) -> tuple[int, list[int]]:
    name = "nums" if "nums" in answer.prompt.meta or "numbers" not in answer.prompt.meta else "numbers"
    target, numbers = field(answer, "target", "rule:countdown"), field(answer, name, "rule:countdown")
    whole = isinstance(numbers, list) and all(type(number) is int for number in (target, *numbers))
    if not whole:
        raise UserError(
            f"{answer.prompt.place}: rule:countdown needs a whole number as target and a list of them",
            evidence=f"target {shown(str(target))}, {name} {shown(str(numbers))}",
        )
    return target, numbers
