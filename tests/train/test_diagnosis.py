"""The checks on synthetic runs: silent on healthy ones of every kind, and each found on a run that has it."""

import json
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kinkajou.config.findings import FINDINGS, check_names
from kinkajou.errors import UserError
from kinkajou.train.checks import CHECKS
from kinkajou.train.diagnosis import Diagnosis, StepFinding, step_finding, stops
from kinkajou.train.history import FIRST, RECENT, History

Row = dict[str, float]
Course = Callable[[int], Row]
"""Step -> what differs from a healthy run there."""
STEPS = 130
NAN = float("nan")


def rl(dice: random.Random, step: int, steps: int) -> Row:
    """Reinforcement learning that goes well, with the noise that such runs have."""
    share, wobble = step / steps, partial(dice.gauss, 0)
    score = 0.2 + 0.6 * share
    error = 0.05 + 0.2 * share
    return {
        "score": score + wobble(0.04),
        "reward": score - 0.1 * share + wobble(0.04),
        "kl_ref": 6 * share + wobble(error),
        "kl_ref_se": error,
        "kl_old": 0.004 * abs(1 + wobble(0.5)),
        "clip_frac": 0.08 * abs(1 + wobble(0.5)),
        "first_ratio": 1 + wobble(1e-6),
        "ratio": 1 + wobble(1e-3),
        "engine_gap": 1e-7,
        "engine_gap_max": 1e-6,
        "explained_variance": min(0.9, step / 30 - 0.2) + wobble(0.1),
        "entropy": 2.0 - 1.5 * share + wobble(0.05),
        "ended": min(1.0, 0.8 + 0.1 * share + wobble(0.05)),
        "response_length": 20 + 4 * share + wobble(1),
        "length_corr": 0.2 + wobble(0.2),
        "zero_spread": 0.3 + 0.3 * share + wobble(0.1),
        "grad_norm": 0.8 * math.exp(wobble(0.4)),
        "critic_grad_norm": 0.3 * math.exp(wobble(0.5)),
        "policy_loss": wobble(0.02),
        "value_loss": 0.3 - 0.2 * share,
        "lr": 1e-5 * 0.5 * (1 + math.cos(math.pi * share)) + 1e-12,
        "updates": 8.0,
    }


def offline(dice: random.Random, step: int, steps: int) -> Row:
    """Learning from records: SFT, reward model and preferences in one row."""
    share = step / steps
    accuracy = 0.55 + 0.25 * min(1.0, 4 * share)
    return {
        "loss": 2.5 - 1.2 * share**0.5 + dice.gauss(0, 0.25),
        "accuracy": min(1.0, max(0.0, accuracy + dice.gauss(0, 0.12))),
        "margin": 2 * share + dice.gauss(0, 0.3),
        "logp_chosen": -100 + 3 * share + dice.gauss(0, 8),
        "grad_norm": 2.0 * math.exp(dice.gauss(0, 0.4)),
        "lr": min(1.0, 10 * share + 0.01) * 1e-4,
    }


def held_out(step: int, share: float) -> Row:
    if step % 10:
        return {}
    return {"eval_loss": 2.4 - 0.9 * share, "eval_score": 0.2 + 0.5 * share, "eval_gold": 0.2 + 0.4 * share}


def rows_of(
    kind: Callable[..., Row], seed: int = 0, steps: int = STEPS, changes: Course | None = None
) -> Iterator[Row]:
    dice = random.Random(seed)
    for step in range(1, steps + 1):
        yield kind(dice, step, steps) | held_out(step, step / steps) | (changes(step) if changes else {})


def diagnose(rows: Iterator[Row], *, bf16: bool = False) -> dict[str, StepFinding]:
    """The first finding of each name."""
    diagnosis = Diagnosis(bf16=bf16)
    first: dict[str, StepFinding] = {}
    for step, row in enumerate(rows, 1):
        for finding in diagnosis.observe(step, row):
            first.setdefault(finding.name, finding)
    return first


@pytest.mark.parametrize("kind", [rl, offline])
@pytest.mark.parametrize("steps", [3, 24, STEPS, 600])
def test_healthy_runs_are_left_in_peace(kind: Callable[..., Row], steps: int) -> None:
    for seed in range(8):
        assert diagnose(rows_of(kind, seed, steps)) == {}


def after(start: int, **values: float) -> Course:
    return lambda step: values if step >= start else {}


def along(**ends: tuple[float, float]) -> Course:
    """Each from its first value to its last, in a straight line."""
    return lambda step: {name: a + (b - a) * step / STEPS for name, (a, b) in ends.items()}


def at_evaluations(**ends: tuple[float, ...]) -> Course:
    """The values of the evaluations at steps 10, 20, ..., the last one held."""
    return lambda step: {} if step % 10 else {k: v[min(step // 10, len(v)) - 1] for k, v in ends.items()}


def below(step: int) -> Row:
    return {"kl_ref": -0.4 + (0.1 if step % 2 else -0.1), "kl_ref_se": 0.2}


# Name -> course, the steps between which it must be found, kind of run.
SICK: dict[str, tuple[Course, range, Callable[..., Row]]] = {
    "not_finite": (after(7, value_loss=NAN), range(7, 8), rl),
    "first_ratio": (after(1, first_ratio=1.003), range(1, 2), rl),
    "engine_gap": (after(40, engine_gap=3e-3), range(40, 41), rl),
    "engine_gap_max": (after(40, engine_gap_max=0.4), range(40, 41), rl),
    "kl_negative": (below, range(3, 9), rl),
    "kl_high": (along(kl_ref=(0, 90)), range(70, 80), rl),
    "kl_leap": (after(60, kl_ref=35.0), range(60, 61), rl),
    "kl_old_high": (after(50, kl_old=0.3), range(51, 53), rl),
    "clip_frac_high": (after(50, clip_frac=0.45), range(51, 53), rl),
    "policy_still": (after(1, clip_frac=0.0, kl_old=1e-8), range(20, 21), rl),
    "critic_useless": (after(1, explained_variance=-0.2), range(30, 31), rl),
    "zero_spread": (after(30, zero_spread=1.0), range(37, 40), rl),
    "ended_falls": (along(ended=(0.9, 0.1)), range(110, 125), rl),
    "length_gamed": (along(length_corr=(0.3, 0.9), response_length=(20, 60)), range(30, 80), rl),
    "gold_falls": (at_evaluations(eval_gold=(0.4, 0.5, 0.6, 0.55, 0.4, 0.35, 0.2)), range(60, 61), rl),
    "entropy_collapse": (after(40, entropy=0.004), range(42, 46), rl),
    "grad_spike": (lambda step: {"grad_norm": 90.0} if step == 77 else {}, range(77, 78), rl),
    "lr_zero": (after(20, lr=0.0), range(22, 23), rl),
    "loss_rises": (after(70, loss=3.5), range(71, 80), offline),
    "loss_still": (after(1, loss=2.5), range(100, 101), offline),
    "accuracy_stuck": (after(1, accuracy=0.5), range(60, 61), offline),
    "overfits": (at_evaluations(eval_loss=(2.0, 1.8, 1.7, 1.75, 1.9, 2.1)), range(50, 71), offline),
    "likelihood_displacement": (along(logp_chosen=(-100, -160)), range(40, 80), offline),
}


def test_every_check_has_its_words_and_its_test() -> None:
    assert list(CHECKS) == list(FINDINGS)
    assert set(SICK) == set(FINDINGS)


@pytest.mark.parametrize("name", SICK)
def test_sick_runs_are_found(name: str) -> None:
    course, steps, kind = SICK[name]
    for seed in range(4):
        found = diagnose(rows_of(kind, seed, changes=course))
        assert name in found
        assert found[name].step in steps
        assert found[name].evidence
        assert set(found[name].metrics) <= set(next(rows_of(kind))) | {"eval_gold", "eval_score", "eval_loss"}
        assert set(found) <= {name, *FOLLOW.get(name, ())}


# What the same course also shows.
FOLLOW = {
    "kl_leap": ("kl_high",),
    "zero_spread": (),
    "gold_falls": (),
    "loss_rises": ("loss_still",),
}


def test_limits_depend_on_the_precision() -> None:
    course = after(1, first_ratio=1.002, engine_gap=5e-3, engine_gap_max=0.3)
    assert set(diagnose(rows_of(rl, changes=course))) == {"first_ratio", "engine_gap", "engine_gap_max"}
    assert diagnose(rows_of(rl, changes=course), bf16=True) == {}


def test_a_negative_kl_within_its_noise_is_none() -> None:
    """The policy still is the reference: its KL is 0 give or take its noise, every other time below."""
    dice = random.Random(0)
    noise = [dice.gauss(0, 0.2) for _ in range(5001)]
    assert diagnose(rows_of(rl, steps=5000, changes=lambda step: {"kl_ref": noise[step], "kl_ref_se": 0.2})) == {}
    assert min(noise) < -0.6
    assert diagnose(rows_of(rl, changes=lambda step: {"kl_ref": -4e-8, "kl_ref_se": 1e-9})) == {}


@pytest.mark.parametrize(
    ("name", "course"),
    [
        # One update a step: the ratio is 1 whatever is learnt.  At the end of a cosine nothing moves either.
        ("policy_still", after(1, clip_frac=0.0, kl_old=0.0, updates=1.0)),
        ("policy_still", lambda step: {"clip_frac": 0.0, "kl_old": 1e-9, "lr": 1e-3 if step < 9 else 1e-6}),
        # Late gradients near 0, as when every pair is told apart: what returns to the usual size is no spike.
        ("grad_spike", lambda step: {"grad_norm": 2.0 if step < 20 or step == 90 else 0.01}),
        # The gold score rises again; the judge falls with it; it is within a quarter of the gain.
        ("gold_falls", at_evaluations(eval_gold=(0.2, 0.6, 0.3, 0.6, 0.7))),
        ("gold_falls", at_evaluations(eval_gold=(0.2, 0.6, 0.3, 0.2), eval_score=(0.2, 0.6, 0.3, 0.2))),
        ("gold_falls", at_evaluations(eval_gold=(0.2, 0.6, 0.55, 0.54))),
        ("length_gamed", along(length_corr=(0.9, 0.9), response_length=(20, 22))),
        ("length_gamed", along(response_length=(20, 60))),
        ("overfits", lambda step: {"loss": 1.0} | at_evaluations(eval_loss=(2.0, 1.8, 2.0, 2.2))(step)),
        ("likelihood_displacement", along(logp_chosen=(-100, -160), margin=(0, -1))),
        ("kl_leap", along(kl_ref=(0, 45))),
        ("kl_leap", along(kl_ref=(0, 300))),
        ("kl_high", lambda step: {"kl_ref": 80.0, "response_length": 900.0}),
        ("entropy_collapse", after(1, entropy=0.005)),
        ("entropy_collapse", after(40, entropy=0.03)),
        ("ended_falls", along(ended=(0.9, 0.3))),
        ("critic_useless", after(1, explained_variance=NAN)),
        ("not_finite", after(1, explained_variance=NAN)),
        ("loss_still", lambda step: {"lr": step * 1e-9, "loss": 2.5}),
        ("accuracy_stuck", lambda step: {"lr": step * 1e-9, "accuracy": 0.5}),
    ],
)
def test_what_looks_like_it_and_is_not(name: str, course: Course) -> None:
    for kind in (rl, offline):
        assert name not in diagnose(rows_of(kind, changes=course))


def test_a_finding_is_counted_and_written_each_time_the_count_doubles() -> None:
    diagnosis = Diagnosis(bf16=False)
    found = [
        finding
        for step in range(1, 101)
        for finding in diagnosis.observe(step, {"first_ratio": 2.0 if step > 1 else 1.0})
        if diagnosis.due(finding)
    ]
    assert [finding.seen for finding in found] == [1, 2, 4, 8, 16, 32, 64]
    assert [finding.step for finding in found[:3]] == [2, 3, 5]
    assert [finding.seen for finding in diagnosis.unwritten()] == [99]
    assert diagnosis.summary().startswith("findings: first_ratio (step 2, 99 times)")
    line = json.loads(json.dumps(found[0].line))
    assert line["evidence"] == {"first_ratio": 2.0, "distance from 1": 1.0, "limit": 1e-4}
    for said in ("first_ratio", "step 2", line["cause"], "limit 0.0001", line["action"]):
        assert said in str(found[0])
    assert Diagnosis(bf16=False).summary() == ""


def test_the_same_rows_give_the_same_findings_after_a_resume() -> None:
    """A second diagnosis that is fed the first half of the rows again goes on as the first would have."""
    rows = list(rows_of(rl, changes=SICK["ended_falls"][0]))
    once, again = Diagnosis(bf16=False), Diagnosis(bf16=False)
    for step, row in enumerate(rows[:60], 1):
        once.observe(step, row)
        again.observe(step, json.loads(json.dumps(row)))
    for step, row in enumerate(rows[60:], 61):
        assert once.observe(step, row) == again.observe(step, row)


def test_history_is_bounded() -> None:
    history = History()
    for step in range(1, 1001):
        history.add(step, {"x": float(step), "y": NAN if step % 2 else 1.0})
    assert history.count("x") == 1000
    assert history.count("y") == 500
    assert history.first("x", 3) == [1, 2, 3]
    assert len(history.first("x", 999)) == FIRST
    assert history.last("x", 2) == [999, 1000]
    assert history.last("x", 2, before=1) == [998, 999]
    assert len(history.points("x")) == RECENT
    assert history.last("z", 3) == []
    assert not history.has("x", "z")


def test_names_to_stop_on() -> None:
    finding = step_finding("kl_high", "c", {}, "a", step=1)
    assert stops(finding, ("kl_high",))
    assert stops(finding, ("any",))
    assert not stops(finding, ("kl_leap",))
    check_names(("any", *FINDINGS))
    with pytest.raises(UserError, match="kl_hihg") as fault:
        check_names(("kl_hihg",))
    assert "did you mean 'kl_high'?" in fault.value.fix


def test_the_documentation_names_every_finding() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "diagnosis.md").read_text("utf-8")
    rows: dict[str, Any] = dict(line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `"))
    assert [name.strip(" `") for name in rows] == list(FINDINGS)
    for name, kind in FINDINGS.items():
        for word in (kind.cause, kind.action, kind.why):
            assert word in text, name
