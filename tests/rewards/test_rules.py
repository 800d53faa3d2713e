"""Rules about words and form, each by a table of cases; and how rules are named."""

import time
from pathlib import Path

import pytest
from answers import answer

from kinkajou.errors import UserError
from kinkajou.rewards.rules import RULES, parse_rule


@pytest.mark.parametrize(
    ("rule", "text", "score"),
    [
        ("mentions:happy,so glad", "I am So  glad", 0),
        ("mentions:happy,so glad", "I am So glad.", 1),
        ("mentions:happy", "unhappy", 0),
        ("length:4", "a b c d", 1),
        ("length:4", "a b c", 0.75),
        ("length:4", "", 0),
        ("length:4", "a " * 9, 0),
        ("words:2-3", "a", 0),
        ("words:2-3", "a b", 1),
        ("words:2-3", "a b c d", 0),
        ("words:2-", "a b c d", 1),
        ("words:-2", "", 1),
        ("ended", "", 1),
        ("repetition:2", "a b a b a", 2 / 4 - 1),
        ("repetition:2", "a b A B", 2 / 3 - 1),
        ("repetition:3", "one two", 0),
        ("repetition", "a a a a a", 1 / 3 - 1),
        ("repetition:1", "好好好好", 1 / 4 - 1),
        ("regex:(?i)answer: \\d+", "The ANSWER: 12", 1),
        ("regex:^a*$", "aaab", 0),
        ("regex:a:b", "xa:b", 1),
        ("regex:b", "a" * 10_000 + "b", 0),  # beyond what is searched
        ("regex:b +", "a" * 9_998 + "b ", 1),  # a repetition at the end costs nothing
        ("regex:a$", "a" * 10_000, 1),
        ("regex:a$", "a" * 10_001, 0),
        ("regex:b +c", "a" * 1_000 + "b c", 1),
        ("regex:b +c", "a" * 1_200 + "b c", 0),
        ("regex:b +c *d", "a" * 130 + "b c d", 1),
        ("regex:b +c *d", "a" * 160 + "b c d", 0),
        ("regex:^[ab]+c *d", "a" * 1_000 + "b" + "c d", 1),
        ("format:think,answer", "<think>x</think>\n<answer>y</answer>\n", 1),
        ("format:think,answer", "<think>x</think><answer>y</answer> so", 0),
        ("format:think,answer", "so <think>x</think><answer>y</answer>", 0),
        ("format:think,answer", "<answer>y</answer><think>x</think>", 0),
        ("format:think,answer", "<think>x</think><think>x</think><answer>y</answer>", 0),
        ("format:think,answer", "<think>x<answer>y</answer></think>", 0),
        ("format:think,answer", "<think>x</think><answer>y", 0),
        ("format:think,answer", "x</think><answer>y</answer>", 0),
        ("format:a", "<a></a>", 1),
    ],
)
def test_scores(rule: str, text: str, score: float) -> None:
    assert parse_rule(f"rule:{rule}")(answer(text)) == pytest.approx(score, abs=1e-12)


def test_a_tag_that_the_prompt_opened_is_open() -> None:
    rule = parse_rule("rule:format:think,answer")
    assert rule(answer("x</think><answer>y</answer>", "Solve it.\n<think>")) == 1
    assert rule(answer("<think>x</think><answer>y</answer>", "Solve it.\n<think>")) == 0


def test_ended_and_the_toy_world_look_at_the_sample() -> None:
    assert parse_rule("rule:ended")(answer("x", ended=False)) == 0
    with pytest.raises(UserError):
        parse_rule("rule:world")(answer("x"))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_takes_any_text(name: str) -> None:
    fitting = {"mentions": "a", "length": "3", "words": "1-2", "format": "a", "regex": "a"}
    meta = {"answer": "42", "target": 3, "nums": [1, 2], "instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
    if name == "world":
        meta = {"kind": "capital", "subject": "France", "answer": "Paris"}
    rule = parse_rule(f"rule:{name}:{fitting[name]}" if name in fitting else f"rule:{name}")
    for text in (
        "",
        " ",
        "\n",
        "x" * 20_000,
        "(" * 5_000,
        "9" * 9_000,
        r"\boxed{" * 3_000,
        "<answer>" * 2_000,
        "#### ",
        "é",
    ):
        assert -1 <= rule(answer(text, "8,3:9,4", ended=False, **meta)) <= 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("rule:lenght:3", "did you mean 'length'?"),
        ("rule:", "unknown rule ''"),
        ("rule", "unknown rule ''"),
        ("rule:mentions:, ,", "rule:mentions needs words"),
        ("rule:length:0", "number of words"),
        ("rule:length:\u00b2", "number of words"),  # a digit to Python, and no number
        ("rule:length:\u0664", "number of words"),
        ("rule:length:" + "9" * 5_000, "number of words"),
        ("rule:repetition:101", "number of words"),
        ("rule:repetition:\u0664", "number of words"),
        ("rule:repetition:" + "9" * 5_000, "number of words"),
        ("rule:words:5", "needs a range"),
        ("rule:words:5-2", "needs a range"),
        ("rule:words:-", "needs a range"),
        ("rule:ended:now", "takes no argument"),
        ("rule:repetition:x", "number of words"),
        ("rule:repetition:0", "number of words"),
        ("rule:format", "different tags"),
        ("rule:format:a,a", "different tags"),
        ("rule:format:a b", "different tags"),
        ("rule:regex", "needs a pattern"),
        ("rule:regex:(", "unsound"),
        ("rule:regex:[[a]", "unsound"),  # Python warns that its meaning will change
        ("rule:regex:a{99999999999999999999}", "unsound"),
        ("rule:regex:(a+)+$", "can take forever"),
        ("rule:regex:(?:\\w+\\s?)*$", "can take forever"),
        ("rule:regex:(?:a|ab)*c", "can take forever"),
        ("rule:regex:(?:a?){30}a{30}", "can take forever"),
        ("rule:regex:(?=(a*)+)b", "can take forever"),
        ("rule:regex:.*a.*b.*c.*d$", "4 repetitions before the end"),
        ("rule:regex:" + "a?" * 30 + "a{30}", "1,073,741,824 choices"),
        ("rule:regex:" + "(a|aa)" * 20 + "b", "1,048,576 choices"),
        ("rule:regex:(?:a{0,999}|b)c{9}(?!.*x)", "3 repetitions"),
        ("rule:ifeval:all", "no argument but skip"),
    ],
)
def test_what_is_refused_before_anything_starts(spec: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_rule(spec)
    assert words in str(caught.value)


@pytest.mark.parametrize("pattern", ["(?:ab)+", "[ab]*c{2,3}", "(a|bc)d", "(?:\\d{3}-)+", "a(?:b+)?", "<t>.*?</t>"])
def test_harmless_patterns_are_taken(pattern: str) -> None:
    parse_rule(f"rule:regex:{pattern}")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"\w*\d$", "1" * 9_999 + "!"),
        (r"[^\W\d]++!", "x" * 10_000),
        (r".*a.*b$", "ab" * 5_000 + "!"),
        (r"(?i)[a-z]*[b-y]*\d", "k" * 10_000),
        (r"(.*)\1x", "a" * 10_000),
        ("a?" * 5 + "a{5}b", "a" * 10_000),
        ("[ab]" * 100 + ".*c", "a" * 10_000),
        (r"(?m)^\s*\w*x", "\n" * 10_000),
    ],
)
def test_no_pattern_takes_long(pattern: str, text: str) -> None:
    """A tenth of a second of this process, asleep times left out; the quickest of three, for machines under load."""
    rule, times = parse_rule(f"rule:regex:{pattern}"), []
    for _ in range(3):
        start = time.process_time()
        assert rule(answer(text)) == 0
        times.append(time.process_time() - start)
    assert min(times) < 0.1


def test_the_page_has_every_rule() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text()
    assert [name for name in RULES if f"| `{name}" not in page] == []
