"""Rules that know the truth: each by a table of cases, and against the shared data where it is here."""

import json
from pathlib import Path
from typing import Any

import pytest
from answers import answer

from kinkajou.data.sources import read_prompts
from kinkajou.errors import UserError
from kinkajou.rewards.countdown import Unsound, calculate
from kinkajou.rewards.rules import Answer, parse_rule


@pytest.mark.parametrize(
    ("text", "truth", "score"),
    [
        ("  New\nYork ", "new york", 1),
        ("New York.", "new york", 0),
        ("b", ["a", "B"], 1),
        ("4", 4, 1),
        ("", "x", 0),
    ],
)
def test_exact(text: str, truth: Any, score: float) -> None:
    assert parse_rule("rule:exact")(answer(text, answer=truth)) == score


@pytest.mark.parametrize(
    ("text", "truth", "score"),
    [
        ("so 72.", "48/2 = <<48/2=24>>24\n#### 72", 1),
        ("#### 72\nor 73", "72", 1),  # what follows on further lines does not count
        ("#### 1\n#### 72", "72", 1),
        ("#### 72 of 90", "72", 1),
        ("####", "72", 0),
        ("72 ####", "72", 1),
        (r"\boxed{72}, not 73", "72", 1),
        (r"\boxed{\text{about } 72}", "72", 1),
        (r"\boxed{1} \boxed{72} \boxed{", "72", 1),
        ("1 then 72", 72, 1),
        ("72 then 1", 72, 0),
        ("no number", 72, 0),
        ("$1,234,567.50", "1234567.5", 1),
        ("1,2", "12", 0),  # a list
        ("12,3456", "123456", 0),
        ("-3", "-3", 1),
        ("\N{MINUS SIGN}3", "-3", 1),
        ("10-3", "3", 1),  # a difference, not a sign
        ("x = -$5", "-5", 1),
        ("+5", "5", 1),
        (".5", "0.5", 1),
        ("1e3", "1000", 1),
        ("0.1", 0.1, 1),
        ("0.30000000000000004", "0.3", 0),
        ("2/4", "0.5", 1),
        ("1 1/2", "1.5", 1),
        ("-1 1/2", "-1.5", 1),
        ("1/0", "1", 0),
        (r"\frac{1}{2}", "0.5", 1),
        (r"-\dfrac{1}{2}", "-1/2", 1),
        (r"\frac12", "1/2", 1),
        (r"3\frac{1}{2}", "3.5", 1),
        ("50%", "0.5", 1),
        ("50 %", "50", 1),
        (r"50\%", "50%", 1),
        ("50%", "5", 0),
        ("5", "50%", 0),
        ("9" * 5_000, "9", 0),
        ("7" + "0" * 5_000 + " and 9", "9", 1),
    ],
)
def test_number(text: str, truth: Any, score: float) -> None:
    assert parse_rule("rule:number")(answer(text, answer=truth)) == score


@pytest.mark.parametrize(
    ("text", "truth", "score"),
    [
        (r"\boxed{x^2 + 1}", "x^2+1", 1),
        (r"\boxed {\frac{1}{2}}", "0.5", 1),
        (r"\boxed{\dfrac{a}{b}}", r"\frac{a}{b}", 1),
        (r"\boxed{\left( 1, 2 \right)}", "(1,2)", 1),
        (r"\boxed{\{1,2\}}", r"\{1, 2\}", 1),
        (r"\boxed{1,000}", "1000", 1),
        (r"\boxed{1{,}000}", r"thus \boxed{1000}", 1),
        (r"\boxed{2} and \boxed{3}", "2", 0),
        (r"\boxed{2 or 3}", "3", 0),
        (r"\boxed{}", "", 0),
        (r"\boxed{a \boxed{b}}", "b", 1),
        (r"\boxed{3} }{ \boxed{4", "3", 1),
        ("3", "3", 0),
    ],
)
def test_boxed(text: str, truth: str, score: float) -> None:
    assert parse_rule("rule:boxed")(answer(text, answer=truth)) == score


def test_the_argument_names_another_field() -> None:
    for rule in ("exact", "number", "boxed"):
        assert parse_rule(f"rule:{rule}:label")(answer(r"\boxed{7}" if rule == "boxed" else "7", label=7)) == 1


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7,2,6,1", 8 / 8),
        ("7,2,6,", 6 / 8),
        ("7,2,6,2", 6 / 8),
        ("7,2,6,1,5", 7 / 8),
        ("7,3,6,1", 2 / 8),
        (" 7,2,6,1", 0),
        ("", 0),
    ],
)
def test_sequence(text: str, score: float) -> None:
    assert parse_rule("rule:sequence")(answer(text, "8,3:9,4")) == score


def test_sequence_without_an_end_or_with_nothing_to_say() -> None:
    rule = parse_rule("rule:sequence")
    assert rule(answer("7,2,6,1", "8,3:9,4", ended=False)) == 7 / 8
    assert rule(answer("", "5,8:9,0")) == 1
    assert rule(answer("1", "5,8:9,0")) == 0


COUNTDOWN = {"target": 98, "nums": [44, 19, 35]}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<answer>44 + 19 + 35</answer>", 1),
        ("<answer>1</answer> no: <answer> (44+19)+35 </answer>", 1),
        ("<answer>44 + 19 + 35 = 98</answer>", 0),
        ("<answer>44 + 35 + 19 + 0</answer>", 0),  # a number of its own
        ("<answer>98</answer>", 0),
        ("<answer>44 + 19</answer>", 0),
        ("<answer>44 + 19 + 35", 0),
        ("44 + 19 + 35", 0),
        ("<answer>__import__('os')</answer>", 0),
        ("<answer>44**19</answer>", 0),
        ("<answer></answer>", 0),
    ],
)
def test_countdown(text: str, score: float) -> None:
    assert parse_rule("rule:countdown")(answer(text, **COUNTDOWN)) == score


@pytest.mark.parametrize(
    ("text", "value", "used"),
    [
        ("1 + 2 * 3", "7", [1, 2, 3]),
        ("(1 + 2) / 4", "3/4", [1, 2, 4]),
        ("8 / 3 / 2 - 1", "1/3", [8, 3, 2, 1]),
        ("-(2 - 5) * +3", "9", [2, 5, 3]),
        ("6 × 2 ÷ 4 − 1", "2", [6, 2, 4, 1]),  # noqa: RUF001
    ],
)
def test_arithmetic(text: str, value: str, used: list[int]) -> None:
    found, numbers = calculate(text)
    assert (str(found), numbers) == (value, used)


@pytest.mark.parametrize("text", ["", "1 +", "(1", "1)", "1 2", "1 / (2 - 2)", "1.5", "a", "(" * 200, "-" * 250 + "1"])
def test_what_is_no_arithmetic(text: str) -> None:
    with pytest.raises(Unsound):
        calculate(text)


@pytest.mark.parametrize(
    ("rule", "given", "words"),
    [
        ("exact", answer("x", label=1), ('needs the row\'s field "answer"', "label")),
        ("number", answer("x", answer=None), ('field "answer"',)),
        ("number", answer("x", answer="many"), ("no number", "many")),
        ("number", answer("x", answer=True), ("no number", "True")),
        ("countdown", answer("x", nums=[1]), ('field "target"',)),
        ("countdown", answer("x", target=1), ('field "nums"',)),
        ("countdown", answer("x", target="1", nums=[1]), ("whole number",)),
        ("sequence", answer("x", "8,3:0,4"), ("first,second:modulus,count", "8,3:0,4")),
        ("sequence", answer("x", "tell me"), ("tell me",)),
    ],
)
def test_a_row_without_its_truth_is_named(rule: str, given: Answer, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        parse_rule(f"rule:{rule}")(given)
    for word in ("prompts.jsonl:7", *words):
        assert word in str(caught.value)


def test_every_row_of_the_shared_data_has_a_truth(shared_data: Path) -> None:
    folder = shared_data / "prompts"
    number, sequence, countdown = (parse_rule(f"rule:{name}") for name in ("number", "sequence", "countdown"))
    for line in (folder / "gsm8k_train" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert number(answer(row["answer"], answer=row["answer"])) == 1
        assert number(answer(row["answer"].rpartition("####")[2] + " dollars.", answer=row["answer"])) == 1
    for prompt in read_prompts(str(folder / "arithmetic_sequence" / "train.parquet")).rows:
        first, rest = prompt.messages[-1].content.split(":")
        previous, last = map(int, first.split(","))
        modulus, count = map(int, rest.split(","))
        numbers = []
        for _ in range(count):
            previous, last = last, (2 * last - previous) % modulus
            numbers.append(str(last))
        assert sequence(Answer(prompt, ",".join(numbers), True)) == 1
    for prompt in read_prompts(str(folder / "countdown_train" / "train.parquet"), max_rows=200).rows:
        assert countdown(Answer(prompt, f"<answer>{prompt.meta['target']}</answer>", True)) == 0
