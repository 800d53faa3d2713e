"""Each finding on scores made to deserve it, and none on scores that do not; the page shows them."""

import io
import random
from collections.abc import Callable

import pytest
from rich.console import Console

from kinkajou.evals.reward_findings import findings
from kinkajou.evals.reward_health import ScoredAnswer, ScoredPair, health
from kinkajou.evals.reward_page import page
from kinkajou.evals.reward_scores import Stability
from kinkajou.findings import Finding

STABLE = Stability(32, 0.0, 1e-6, 1e-6)
Score = Callable[[random.Random, bool, int], float]


def good(dice: random.Random, chosen: bool, tokens: int) -> float:
    """Logits of a model that is right nine times in ten and knows it."""
    return 2.5 * chosen + dice.gauss(0, 1)


def made(
    score: Score, *, count: int = 400, tokens: Callable[[random.Random, bool], int] | None = None
) -> list[ScoredPair]:
    dice = random.Random(0)

    def answer(chosen: bool) -> ScoredAnswer:
        size = tokens(dice, chosen) if tokens else dice.randint(5, 50)
        return ScoredAnswer("- a\n" * dice.randint(0, 3) + "text", size, score(dice, chosen, size))

    return [ScoredPair(answer(True), answer(False), "easy") for _ in range(count)]


def names(pairs: list[ScoredPair], stable: Stability = STABLE, **more) -> list[str]:
    return [item.name for item in findings(health(pairs), stable, **more)]


def test_nothing_is_said_of_a_good_model() -> None:
    assert names(made(good)) == []


def longer_chosen(dice: random.Random, chosen: bool) -> int:
    return dice.randint(5, 50) + 20 * chosen


CASES: dict[str, tuple[list[ScoredPair], set[str]]] = {
    "coin": (made(lambda dice, chosen, tokens: 0.1 * dice.gauss(0, 1)), {"no_better_than_chance"}),
    "swapped": (made(lambda dice, chosen, tokens: good(dice, not chosen, tokens)), {"worse_than_chance"}),
    "constant": (made(lambda dice, chosen, tokens: 1.5), {"constant_score", "ties"}),
    "few": (made(good, count=40), {"few_pairs"}),
    "overconfident": (made(lambda dice, chosen, tokens: 30 * (0.3 * chosen + dice.gauss(0, 1))), {"miscalibrated"}),
    "underconfident": (made(lambda dice, chosen, tokens: 0.02 * good(dice, chosen, tokens)), {"miscalibrated"}),
    "length": (
        made(lambda dice, chosen, tokens: 0.05 * tokens + 0.3 * dice.gauss(0, 1), tokens=longer_chosen),
        {"length_correlation", "no_better_than_length", "fails_when_shorter"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_findings(case: str) -> None:
    pairs, expected = CASES[case]
    assert set(names(pairs)) >= expected


def test_the_way_of_miscalibration_is_said() -> None:
    for case, word in (("overconfident", "over"), ("underconfident", "under")):
        (found,) = (f for f in findings(health(CASES[case][0]), STABLE) if f.name == "miscalibrated")
        assert f"{word}confident" in found.cause
        assert "divide margins by" in found.action


def test_format() -> None:
    def bulleted(answer: ScoredAnswer) -> ScoredAnswer:
        return ScoredAnswer(answer.text, 9, answer.text.count("-") + 0.1 * answer.score)

    pairs = [ScoredPair(bulleted(p.chosen), bulleted(p.rejected)) for p in made(good)]
    assert "format_bullets" in names(pairs)
    # Where people choose the same way, the labels teach it.
    taught = [p if p.margin > 0 else ScoredPair(p.rejected, p.chosen) for p in pairs]
    assert [name for name in names(taught) if name.startswith("format")] == []


def test_a_weak_subset() -> None:
    pairs = made(good)
    wrong = [ScoredPair(p.rejected, p.chosen, "hard") for p in made(good, count=30)]
    (found,) = (f for f in findings(health([*pairs, *wrong]), STABLE) if f.name == "weak_subset")
    assert "'hard'" in found.cause
    assert "30 pairs" in found.evidence


def test_what_is_known_from_outside() -> None:
    pairs = made(good)
    assert names(pairs, Stability(32, 0.5, 0.0, 0.0)) == ["padding_changes_scores"]
    assert names(pairs, Stability(32, 0.0, 0.0, 2e-3)) == ["batch_changes_scores"]
    assert names(pairs, cut=0.2) == ["cut"]
    assert names(pairs, trained_on="run/config.toml") == ["trained_on"]


def shown(pairs: list[ScoredPair], found: list[Finding]) -> str:
    console = Console(width=80, file=io.StringIO())
    for block in page(health(pairs), STABLE, found):
        console.print(block)
    return str(console.file.getvalue())


def test_the_page_fits_80_columns_and_cuts_nothing() -> None:
    pairs = [*made(good), *(ScoredPair(p.chosen, p.rejected, "[red]other[/red]") for p in made(good, count=9))]
    found = [Finding("name", "the [bold]cause", "the evidence", "the action")]
    text = shown(pairs, found)
    assert "\u2026" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    for words in (
        "409 held-out pairs",
        "0.95 to 1.00",
        "[red]other[/red]",
        "warning: name: the [bold]cause",
        "  seen: the evidence",
        "  do:   the action",
    ):
        assert words in text
    assert "No findings" in shown(pairs, [])


def test_small_subsets_are_counted() -> None:
    many = [ScoredPair(p.chosen, p.rejected, f"s{i}") for i, p in enumerate(made(good, count=25))]
    assert "5 smaller ones: see --output" in shown(many, [])
