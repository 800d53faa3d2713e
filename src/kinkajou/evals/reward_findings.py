"""What is wrong with a reward model by its numbers, and what to do about it."""

from collections.abc import Iterator

from kinkajou.evals.reward_health import Health
from kinkajou.evals.reward_scores import Stability
from kinkajou.evals.statistics import Correlation, Share
from kinkajou.findings import Finding

FEW_PAIRS = 100
FEW_OF_A_KIND = 20
"""Below so many pairs a subset or a feature is not judged."""
STRONG = 0.4
"""A correlation beyond this is a finding."""
MISCALIBRATED = 0.1
UNSTABLE = 1e-3


def findings(health: Health, stability: Stability, *, cut: float = 0.0, trained_on: str = "") -> list[Finding]:
    """The gravest first.  `cut` is the share of pairs that lost their beginning, `trained_on` the run that saw them."""
    if trained_on:
        seen = Finding(
            "trained_on",
            "the model was trained on these pairs, so the numbers say nothing about new ones",
            trained_on,
            "give other pairs, or the run's own --eval_share and --seed with the same --data",
        )
        return [seen, *judged(health, stability, cut)]
    return list(judged(health, stability, cut))


def judged(health: Health, stability: Stability, cut: float) -> Iterator[Finding]:
    yield from of_stability(stability)
    yield from of_accuracy(health, cut)
    yield from of_calibration(health)
    yield from of_length(health)
    yield from of_features(health)
    yield from of_subsets(health)


def of_stability(stability: Stability) -> Iterator[Finding]:
    if stability.padded > UNSTABLE:
        yield Finding(
            "padding_changes_scores",
            "an answer's score depends on the padding beside it",
            f"largest change {stability.padded:.2g} over {stability.count} answers",
            "with --dtype bf16 try fp32; otherwise do not use this model, and report it as our bug",
        )
    worst = max(stability.together, stability.reversed)
    if worst > UNSTABLE:
        yield Finding(
            "batch_changes_scores",
            "an answer's score depends on the other answers in the batch",
            f"largest change {worst:.2g} over {stability.count} answers",
            "with --dtype bf16 try fp32; otherwise do not use this model, and report it as our bug",
        )


def of_accuracy(health: Health, cut: float) -> Iterator[Finding]:
    accuracy, count = health.accuracy, health.accuracy.count
    if health.score_deviation < 1e-6 * max(1.0, abs(health.score)):
        yield Finding(
            "constant_score",
            "every answer gets the same score",
            f"standard deviation {health.score_deviation:.2g} around {health.score:.3g}",
            "train the reward model longer or with a higher --lr; is this its trained checkpoint?",
        )
    elif accuracy.high < 0.5:
        yield Finding(
            "worse_than_chance",
            "the model prefers the rejected answers",
            f"accuracy {told(accuracy)}",
            "look whether chosen and rejected are swapped here or in the training data",
        )
    elif accuracy.low <= 0.5:
        yield Finding(
            "no_better_than_chance",
            "the accuracy cannot be told from a coin's",
            f"accuracy {told(accuracy)}",
            "do not train a policy against it: more pairs or epochs, a better base model, cleaner labels",
        )
    if count < FEW_PAIRS:
        yield Finding(
            "few_pairs",
            "too few pairs to trust any of these numbers",
            f"{count} pairs leave the accuracy open by {accuracy.high - accuracy.low:.2f}",
            f"hold out more: {FEW_PAIRS} pairs at least, 1,000 for an interval of 0.06",
        )
    if cut > 0.05:
        yield Finding(
            "cut",
            "many pairs lost their beginning, so the model does not see all of the prompt",
            f"{cut:.0%} of the pairs are longer than --max_len",
            "raise --max_len to what the model was trained with, if its context allows",
        )
    if health.ties > max(1, 0.01 * count):
        yield Finding(
            "ties",
            "answers that differ get exactly the same score",
            f"{health.ties} of {count} pairs are tied",
            "do the two sides differ only before the last --max_len tokens, or not at all in tokens?",
        )


def of_calibration(health: Health) -> Iterator[Finding]:
    found = health.calibration
    if found.error <= MISCALIBRATED or found.error <= 2 * found.noise:
        return
    value = health.accuracy.value or 0.0
    way = "over" if found.confidence > value else "under"
    action = "fewer epochs or a lower --lr; stop at the best held-out accuracy"
    if way == "under":
        action = "train longer; the order of answers is right before their distance is"
    if found.temperature is not None:
        action += f"; or divide margins by {found.temperature:.3g} where they are read as log-odds"
    yield Finding(
        "miscalibrated",
        f"the model is {way}confident: its margins are no probabilities",
        f"expected calibration error {found.error:.3f} (a calibrated model: {found.noise:.3f}), "
        f"mean confidence {found.confidence:.3f}, accuracy {value:.3f}",
        action,
    )


def of_length(health: Health) -> Iterator[Finding]:
    found = health.length
    accuracy = health.accuracy
    action = (
        "a policy will answer at that length whatever is asked: balance the pairs by length, penalise length in the "
        "reward, or watch response_tokens against a gold judge"
    )
    across, within = found.answers, found.within
    strong = [
        f"{name} {told_r(r)}"
        for name, r in (("over all answers", across), ("within pairs", within))
        if r.value is not None and abs(r.value) > STRONG and r.is_real
    ]
    if strong:
        yield Finding(
            "length_correlation",
            "the score goes with the length of the answer",
            f"correlation of score and tokens {'; '.join(strong)}; people's choice {told_r(found.people)}",
            action,
        )
    baseline = found.longer_wins.value or 0.0
    word = "longer" if baseline >= 0.5 else "shorter"
    baseline = max(baseline, 1 - baseline)
    if 0.5 < accuracy.low <= baseline:
        yield Finding(
            "no_better_than_length",
            f"choosing the {word} answer may do as well as the model",
            f"accuracy {told(accuracy)}; the {word} answer is the chosen one in {baseline:.3f}",
            "more or more varied pairs; look at the accuracy where the chosen answer is not the " + word,
        )
    for side, part in (("shorter", found.accuracy_if_chosen_shorter), ("longer", found.accuracy_if_chosen_longer)):
        if part.count >= FEW_OF_A_KIND and part.high < 0.5:
            yield Finding(
                f"fails_when_{side}",
                f"the model is wrong more often than right where the better answer is the {side}",
                f"accuracy there {told(part)} of {part.count} pairs",
                action,
            )


def of_features(health: Health) -> Iterator[Finding]:
    for found in health.features:
        r, beyond = found.model, found.beyond_length
        if r.count < FEW_OF_A_KIND or r.value is None or abs(r.value) <= STRONG or not r.is_real:
            continue
        # Within people's interval the model only repeats what the labels teach.
        if found.choice.value is None or found.people.low <= found.choice.value <= found.people.high:
            continue
        yield Finding(
            f"format_{found.name}",
            f"the score goes with {found.name} in the answer, and the labels do not teach that",
            f"correlation {told_r(r)} over {r.count} pairs that differ in it; at equal length "
            f"{told_r(beyond)}; the model's choice {told_r(found.choice)}, people's {told_r(found.people)}",
            f"add pairs in which the better answer has {'fewer' if r.value > 0 else 'more'} of them, or a rule "
            "beside the reward model",
        )


def of_subsets(health: Health) -> Iterator[Finding]:
    for part in health.subsets:
        accuracy, whole = part.accuracy, health.accuracy.value or 0.0
        if len(health.subsets) < 2 or accuracy.count < FEW_OF_A_KIND:
            continue
        chance = accuracy.low <= 0.5 < health.accuracy.low
        if (accuracy.value or 0.0) < whole and (chance or accuracy.high < whole):
            yield Finding(
                "weak_subset",
                f"the subset {part.name!r} is " + ("not above chance" if chance else "below the whole"),
                f"accuracy {told(accuracy)} of {accuracy.count} pairs; over all {whole:.3f}",
                "more pairs of this kind, or keep its prompts out of the policy's training",
            )


def told(share: Share) -> str:
    value = "-" if share.value is None else f"{share.value:.3f}"
    return f"{value} (95 %: {share.low:.3f} to {share.high:.3f})"


def told_r(r: Correlation) -> str:
    return "-" if r.value is None else f"{r.value:+.2f} ({r.low:+.2f} to {r.high:+.2f})"
