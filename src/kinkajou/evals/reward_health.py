"""What the scores of held-out pairs say about a reward model: accuracy, calibration, length, format, subsets."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kinkajou.evals.statistics import (
    Correlation,
    Share,
    correlation,
    deviation,
    mean,
    paired_correlation,
    partial,
    share,
)

NUM_BINS = 10


@dataclass(frozen=True)
class ScoredAnswer:
    text: str
    tokens: int  # of the answer alone, as far as the model read it
    score: float


@dataclass(frozen=True)
class ScoredPair:
    chosen: ScoredAnswer
    rejected: ScoredAnswer
    subset: str = ""

    @property
    def margin(self) -> float:
        return self.chosen.score - self.rejected.score

    @property
    def longer_by(self) -> int:
        """Tokens that the chosen answer is longer by."""
        return self.chosen.tokens - self.rejected.tokens


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence lies in [low, high); the last bin holds 1 too."""

    low: float
    high: float
    confidence: float | None  # mean predicted probability of the answer that the model prefers
    observed: Share  # how often people prefer that answer


@dataclass(frozen=True)
class Calibration:
    error: float  # expected calibration error, [0, 1]
    noise: float  # what a calibrated model would show on as many pairs
    confidence: float  # mean over all pairs
    log_loss: float  # nats a pair; a coin has 0.693
    brier: float  # a coin has 0.25
    temperature: float | None  # scores divided by it have the least log-loss; None: no finite one has
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Length:
    answers: Correlation  # score and tokens over all answers
    within: Correlation  # difference of scores and of tokens within pairs
    people: Correlation  # people's choice and difference of tokens within pairs
    longer_wins: Share  # accuracy of "the longer answer is better"
    model_prefers_longer: Share  # among pairs of unequal length
    people_prefer_longer: Share
    accuracy_if_chosen_longer: Share
    accuracy_if_chosen_shorter: Share
    mean_chosen: float
    mean_rejected: float


@dataclass(frozen=True)
class Feature:
    """Over the pairs whose answers differ in it."""

    name: str
    model: Correlation  # difference of scores and of the feature
    choice: Correlation  # the model's choice and difference of the feature: what compares with `people`
    people: Correlation  # people's choice and difference of the feature
    beyond_length: Correlation  # as `model`, at equal difference of tokens


@dataclass(frozen=True)
class Subset:
    name: str
    accuracy: Share
    margin: float
    log_loss: float
    longer_wins: Share


@dataclass(frozen=True)
class Health:
    accuracy: Share
    ties: int
    margin: float
    margin_deviation: float
    score: float
    score_deviation: float
    calibration: Calibration
    length: Length
    features: tuple[Feature, ...]
    subsets: tuple[Subset, ...]


def health(pairs: Sequence[ScoredPair], *, num_bins: int = NUM_BINS) -> Health:
    """All numbers of at least one pair."""
    margins = [pair.margin for pair in pairs]
    scores = [side.score for pair in pairs for side in (pair.chosen, pair.rejected)]
    names = sorted({pair.subset for pair in pairs if pair.subset})
    groups = {name: [pair for pair in pairs if pair.subset == name] for name in names}
    return Health(
        accuracy=share_positive(margins),
        ties=sum(margin == 0 for margin in margins),
        margin=mean(margins),
        margin_deviation=deviation(margins),
        score=mean(scores),
        score_deviation=deviation(scores),
        calibration=calibration(margins, num_bins),
        length=length(pairs),
        features=tuple(feature(name, measure, pairs) for name, measure in FEATURES.items()),
        subsets=tuple(subset(name, group) for name, group in groups.items()),
    )


def share_positive(x: Sequence[float]) -> Share:
    """How often x is above 0; 0 counts half."""
    return share(sum(a > 0 for a in x) + 0.5 * sum(a == 0 for a in x), len(x))


# --- calibration ------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def log_losses(margins: Sequence[float]) -> list[float]:
    """-log sigmoid(margin), finite for any margin."""
    return [math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for m in margins]


def calibration(margins: Sequence[float], num_bins: int) -> Calibration:
    """Confidence sigmoid(|margin|) in the preferred answer against how often it is the chosen one (Guo 2017).

    Bins are of equal width over [0.5, 1].  With few pairs the error is above 0 even for a calibrated model;
    `noise` is that height, from the normal approximation of each bin.
    """
    confidence = [sigmoid(abs(m)) for m in margins]
    right = [0.5 if m == 0 else float(m > 0) for m in margins]
    place = [min(int((c - 0.5) * 2 * num_bins), num_bins - 1) for c in confidence]
    bins, error, noise = list[Bin](), 0.0, 0.0
    for number in range(num_bins):
        inside = [i for i, bin_number in enumerate(place) if bin_number == number]
        observed = share(math.fsum(right[i] for i in inside), len(inside))
        centre = mean([confidence[i] for i in inside]) if inside else None
        bins.append(Bin(0.5 + number / (2 * num_bins), 0.5 + (number + 1) / (2 * num_bins), centre, observed))
        if centre is not None and observed.value is not None:
            error += len(inside) / len(margins) * abs(observed.value - centre)
            spread = math.fsum(confidence[i] * (1 - confidence[i]) for i in inside)
            noise += math.sqrt(2 / math.pi * spread) / len(margins)
    return Calibration(
        error=error,
        noise=noise,
        confidence=mean(confidence),
        log_loss=mean(log_losses(margins)),
        brier=mean([sigmoid(-m) ** 2 for m in margins]),
        temperature=best_temperature(margins),
        bins=tuple(bins),
    )


def best_temperature(margins: Sequence[float]) -> float | None:
    """The divisor of the scores with the least log-loss (Guo 2017), by bisection on its inverse; the loss is convex.

    None if the least is at no finite one above 0: every pair is right, or the model is no better than a coin.
    """

    def slope(inverse: float) -> float:
        return -math.fsum(m * sigmoid(-inverse * m) for m in margins)

    low, high = 1e-6, 1e6
    if slope(low) >= 0 or slope(high) <= 0:
        return None
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


# --- length and format ------------------------------------------------------------------------------------


def length(pairs: Sequence[ScoredPair]) -> Length:
    answers = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    unequal = [pair for pair in pairs if pair.longer_by]
    direction = [math.copysign(1, pair.longer_by) for pair in unequal]
    return Length(
        # Two answers to one prompt are not independent, so the interval counts pairs.
        answers=correlation([a.tokens for a in answers], [a.score for a in answers], count=len(pairs)),
        within=paired_correlation([pair.longer_by for pair in unequal], [pair.margin for pair in unequal]),
        people=paired_correlation([pair.longer_by for pair in unequal], [1.0] * len(unequal)),
        longer_wins=share_positive([pair.longer_by for pair in pairs]),
        model_prefers_longer=share_positive([d * pair.margin for d, pair in zip(direction, unequal, strict=True)]),
        people_prefer_longer=share_positive(direction),
        accuracy_if_chosen_longer=share_positive([pair.margin for pair in unequal if pair.longer_by > 0]),
        accuracy_if_chosen_shorter=share_positive([pair.margin for pair in unequal if pair.longer_by < 0]),
        mean_chosen=mean([pair.chosen.tokens for pair in pairs]),
        mean_rejected=mean([pair.rejected.tokens for pair in pairs]),
    )


BULLET = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
MARKDOWN = re.compile(r"\*\*|```|`[^`\n]+`|^#{1,6}\s|^\|.*\|", re.MULTILINE)
REFUSAL = re.compile(
    r"\s*(?:(?:i'm|i am|i'm so|i am so) sorry|sorry\b|i apologi[sz]e|unfortunately,? i\b"
    r"|i (?:cannot|can't|can not|won't|will not|don't feel comfortable)\b"
    r"|(?:i'm|i am) (?:unable|not able|not comfortable)\b|as an ai\b)",
    re.IGNORECASE,
)
FEATURES: Mapping[str, Callable[[str], float]] = {
    "bullets": lambda text: len(BULLET.findall(text)),
    "digits": lambda text: sum(letter.isdigit() for letter in text),
    "markdown": lambda text: len(MARKDOWN.findall(text)),
    "newlines": lambda text: text.count("\n"),
    "punctuation": lambda text: sum(letter in ".,;:!?" for letter in text),
    "refusal": lambda text: float(REFUSAL.match(text.replace("\u2019", "'")) is not None),
}
"""How much of each a text has; a refusal is an opening like "I'm sorry" or "I cannot", 0 or 1."""


def feature(name: str, measure: Callable[[str], float], pairs: Sequence[ScoredPair]) -> Feature:
    more = [measure(pair.chosen.text) - measure(pair.rejected.text) for pair in pairs]
    rows = [(d, pair) for d, pair in zip(more, pairs, strict=True) if d]
    differences = [d for d, _ in rows]
    margins, longer = [pair.margin for _, pair in rows], [pair.longer_by for _, pair in rows]
    model = paired_correlation(differences, margins)
    return Feature(
        name=name,
        model=model,
        choice=paired_correlation(differences, [math.copysign(float(m != 0), m) for m in margins]),
        people=paired_correlation(differences, [1.0] * len(rows)),
        beyond_length=partial(model, paired_correlation(differences, longer), paired_correlation(margins, longer)),
    )


def subset(name: str, pairs: Sequence[ScoredPair]) -> Subset:
    margins = [pair.margin for pair in pairs]
    return Subset(
        name=name,
        accuracy=share_positive(margins),
        margin=mean(margins),
        log_loss=mean(log_losses(margins)),
        longer_wins=share_positive([pair.longer_by for pair in pairs]),
    )
