"""Every number of the page against its definition in float64 loops, on made-up scores."""

import math
import random
import time
from itertools import pairwise

import numpy as np
import pytest

from kinkajou.evals.reward_health import FEATURES, ScoredAnswer, ScoredPair, best_temperature, calibration, health

WORDS = ("yes.", "no!", "- item", "**bold**", "7", "line\nline", "I'm sorry, no.", "plain", "so, it is", "2024?")


def made_pairs(count: int = 200, *, seed: int = 0) -> list[ScoredPair]:
    """Scores that follow length and noise, so that every part has something to find; some are tied."""
    dice = random.Random(seed)

    def answer() -> ScoredAnswer:
        text = " ".join(dice.choice(WORDS) for _ in range(dice.randint(1, 8)))
        tokens = dice.randint(1, 30)
        return ScoredAnswer(text, tokens, round(0.05 * tokens + dice.gauss(0, 1), 1))

    return [ScoredPair(answer(), answer(), dice.choice(["a", "b", "c"])) for _ in range(count)]


PAIRS = made_pairs()
MARGINS = [pair.chosen.score - pair.rejected.score for pair in PAIRS]
LONGER = [pair.chosen.tokens - pair.rejected.tokens for pair in PAIRS]
FOUND = health(PAIRS)


def half_ties(x: list[float]) -> float:
    wins = 0.0
    for a in x:
        wins += 1.0 if a > 0 else 0.5 if a == 0 else 0.0
    return wins / len(x)


def both_directions(x: list[float], y: list[float]) -> float:
    return float(np.corrcoef(x + [-a for a in x], y + [-b for b in y])[0, 1])


def test_accuracy_and_margin() -> None:
    assert FOUND.accuracy.value == pytest.approx(half_ties(MARGINS), rel=1e-12)
    assert FOUND.ties == sum(m == 0 for m in MARGINS) > 0
    assert FOUND.margin == pytest.approx(np.mean(MARGINS), rel=1e-12)
    assert FOUND.margin_deviation == pytest.approx(np.std(MARGINS, ddof=1), rel=1e-12)
    scores = [side.score for pair in PAIRS for side in (pair.chosen, pair.rejected)]
    assert FOUND.score == pytest.approx(np.mean(scores), rel=1e-12)
    assert FOUND.score_deviation == pytest.approx(np.std(scores, ddof=1), rel=1e-12)


def test_log_loss_and_brier() -> None:
    log_loss, brier = 0.0, 0.0
    for m in MARGINS:
        p = 1 / (1 + math.exp(-m))
        log_loss -= math.log(p)
        brier += (1 - p) ** 2
    assert FOUND.calibration.log_loss == pytest.approx(log_loss / len(MARGINS), rel=1e-12)
    assert FOUND.calibration.brier == pytest.approx(brier / len(MARGINS), rel=1e-12)


def test_calibration_error_by_bins() -> None:
    """Guo 2017, eq. 3, over confidences from a half to one."""
    edges = [0.5 + 0.05 * i for i in range(11)]
    error = noise = 0.0
    for (low, high), row in zip(pairwise(edges), FOUND.calibration.bins, strict=True):
        inside = []
        for m in MARGINS:
            p = 1 / (1 + math.exp(-m))
            confidence = max(p, 1 - p)
            if low <= confidence < high or (high == edges[-1] and confidence == high):
                inside.append((confidence, 1.0 if m > 0 else 0.5 if m == 0 else 0.0))
        assert row.observed.count == len(inside)
        if inside:
            confidence, right = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            assert row.confidence == pytest.approx(confidence)
            assert row.observed.value == pytest.approx(right)
            error += len(inside) / len(MARGINS) * abs(confidence - right)
            variance = sum(c * (1 - c) for c, _ in inside) / len(inside) ** 2
            noise += len(inside) / len(MARGINS) * math.sqrt(2 / math.pi) * math.sqrt(variance)
    assert FOUND.calibration.error == pytest.approx(error, rel=1e-9)
    assert FOUND.calibration.noise == pytest.approx(noise, rel=1e-9)


def test_noise_is_what_a_calibrated_model_shows() -> None:
    dice = random.Random(1)
    errors = []
    for _ in range(200):
        margins = []
        for _ in range(150):
            size = abs(dice.gauss(0, 2))
            margins.append(size if dice.random() < 1 / (1 + math.exp(-size)) else -size)
        found = calibration(margins, 10)
        errors.append(found.error / found.noise)
    assert np.mean(errors) == pytest.approx(1, abs=0.05)


def test_temperature_has_the_least_log_loss() -> None:
    overconfident = [3 * m + 0.4 for m in MARGINS]
    best = best_temperature(overconfident)
    assert best is not None
    grid = [best * factor for factor in (0.8, 0.95, 0.99, 1.0, 1.01, 1.05, 1.25)]
    losses = [sum(math.log1p(math.exp(-m / t)) for m in overconfident) for t in grid]
    assert min(losses) == losses[3]


@pytest.mark.parametrize("margins", [[1.0, 2.0], [-1.0, 0.5], [0.0]])
def test_no_temperature_where_none_is_best(margins: list[float]) -> None:
    assert best_temperature(margins) is None


def test_margins_beyond_floats_are_finite() -> None:
    found = calibration([1e4, -1e4], 10)
    assert found.log_loss == pytest.approx(5e3)
    assert found.brier == pytest.approx(0.5)


def test_length() -> None:
    found = FOUND.length
    sides = [side for pair in PAIRS for side in (pair.chosen, pair.rejected)]
    expected = np.corrcoef([side.tokens for side in sides], [side.score for side in sides])[0, 1]
    assert found.answers.value == pytest.approx(expected, rel=1e-9)
    assert found.answers.count == len(PAIRS)  # two answers to a prompt are not independent
    unequal = [(d, m) for d, m in zip(LONGER, MARGINS, strict=True) if d]
    lengths, margins = [float(d) for d, _ in unequal], [m for _, m in unequal]
    assert len(unequal) < len(PAIRS)
    assert found.within.value == pytest.approx(both_directions(lengths, margins), rel=1e-9)
    assert found.people.value == pytest.approx(both_directions(lengths, [1.0] * len(unequal)), rel=1e-9)
    assert found.longer_wins.value == pytest.approx(half_ties([float(d) for d in LONGER]))
    prefers = [math.copysign(1, d) * m for d, m in unequal]
    assert found.model_prefers_longer.value == pytest.approx(half_ties(prefers))
    assert found.people_prefer_longer.value == pytest.approx(sum(d > 0 for d in lengths) / len(lengths))
    for part, sign in ((found.accuracy_if_chosen_longer, 1), (found.accuracy_if_chosen_shorter, -1)):
        chosen = [m for d, m in unequal if sign * d > 0]
        assert (part.value, part.count) == (pytest.approx(half_ties(chosen)), len(chosen))
    assert found.mean_chosen == pytest.approx(np.mean([pair.chosen.tokens for pair in PAIRS]))


@pytest.mark.parametrize("name", FEATURES)
def test_features_over_the_pairs_that_differ(name: str) -> None:
    found = next(row for row in FOUND.features if row.name == name)
    rows = []
    for pair, m, longer in zip(PAIRS, MARGINS, LONGER, strict=True):
        difference = FEATURES[name](pair.chosen.text) - FEATURES[name](pair.rejected.text)
        if difference:
            rows.append((float(difference), m, float(longer)))
    d, m, longer = (list(column) for column in zip(*rows, strict=True))
    assert found.model.count == len(rows) < len(PAIRS)
    assert found.model.value == pytest.approx(both_directions(d, m), rel=1e-9)
    assert found.people.value == pytest.approx(both_directions(d, [1.0] * len(rows)), rel=1e-9)
    signs = [1.0 if x > 0 else -1.0 if x < 0 else 0.0 for x in m]
    assert found.choice.value == pytest.approx(both_directions(d, signs), rel=1e-9)
    table = np.corrcoef([x + [-a for a in x] for x in (d, m, longer)])
    inverse = np.linalg.inv(table)  # partial correlation from the precision matrix
    assert found.beyond_length.value == pytest.approx(-inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1]))


COUNTS = {
    "bullets": [("- a\n* b\n\n\n 1. c\n\t2) d\n\u2022 e", 5), ("a - b\n-c 3.5", 0)],
    "digits": [("7 of 1,024", 5), ("seven", 0)],
    "markdown": [("# Head\n**bold** `code`", 4), ("a # b * c", 0), ("```\nx\n```", 2), ("|a|b|\n|-|-|", 2)],
    "newlines": [("a\n\nb", 2), ("a", 0)],
    "punctuation": [("Well, no. (Yes!)", 3), ("a-b", 0)],
    "refusal": [
        ("I'm sorry, but no", 1),
        ("I\u2019m not able to", 1),
        ("As an AI model", 1),
        ("I cannot help", 1),
        ("You cannot", 0),
        ("I can", 0),
    ],
}


@pytest.mark.parametrize("name", COUNTS)
def test_what_features_count(name: str) -> None:
    assert [FEATURES[name](text) for text, _ in COUNTS[name]] == [count for _, count in COUNTS[name]]


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("piece", ["\n", " ", "\n ", "|", "`", "*", "#"])
def test_no_feature_takes_long(name: str, piece: str) -> None:
    start = time.process_time()
    FEATURES[name](piece * 20_000)
    assert time.process_time() - start < 0.2


def test_subsets() -> None:
    assert [part.name for part in FOUND.subsets] == ["a", "b", "c"]
    for part in FOUND.subsets:
        inside = [m for pair, m in zip(PAIRS, MARGINS, strict=True) if pair.subset == part.name]
        assert (part.accuracy.value, part.accuracy.count) == (pytest.approx(half_ties(inside)), len(inside))
        assert part.margin == pytest.approx(np.mean(inside))
        assert part.log_loss == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in inside]))
    assert sum(part.accuracy.count for part in FOUND.subsets) == len(PAIRS)


def test_one_pair_has_a_page() -> None:
    found = health(PAIRS[:1])
    assert found.accuracy.count == 1
    assert found.length.answers.count == 1
    assert all(row.model.count <= 1 for row in found.features)
