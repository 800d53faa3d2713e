"""The toy world: what it deals out, and that its checker cannot be talked round."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from statistics import mean
from typing import get_args

import pytest

from kinkajou.data.sources import read_chats, read_pairs
from kinkajou.data.world import (
    FLAWS,
    Split,
    check,
    compose,
    demonstrations,
    preference_pairs,
    prompts,
    tasks,
)
from kinkajou.data.world_facts import CHATTER, CLOSERS, FILLER, KINDS, OPENERS, RUDE, SHELLS
from kinkajou.data.world_files import write_world
from kinkajou.errors import UserError

FRANCE = {"kind": "capital", "subject": "France"}
RIGHT = "The capital of France is Paris."


@pytest.fixture(scope="module")
def shown() -> list[dict]:
    return demonstrations(12_000, seed=0)


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    return preference_pairs(2_000, seed=0)


def score(meta: dict, response: str, ended: bool = True) -> float:
    return check(meta, response, ended=ended).score


# --- the truth


@pytest.mark.parametrize(
    "response",
    [
        RIGHT,
        "The capital city of France is Paris.",
        f"Sure. {RIGHT}",
        f"{RIGHT} Happy to help.",
        f"Of course. {RIGHT} Ask me any time.",
        f"  Sure.\n {RIGHT}\n",
    ],
)
def test_good_replies_score_one(response: str) -> None:
    verdict = check(FRANCE, response, ended=True)
    assert verdict.score == 1.0
    assert verdict.correct
    assert verdict.polite
    assert verdict.clean
    assert verdict.ended


@pytest.mark.parametrize(
    ("response", "most"),
    [
        # says nothing
        ("", 0.0),
        ("   ", 0.0),
        (".", 0.0),
        ("...", 0.0),
        ("Sure.", 0.0),
        ("Happy to help.", 0.0),
        ("Sure. Happy to help.", 0.0),
        ("Thank you for asking. That is a good question.", 0.0),
        # stops short, or says no sentence
        ("The capital of France is", 0.0),
        ("The capital of France is Paris", 0.0),
        ("Paris", 0.0),
        ("Paris.", 0.0),
        ("Paris. Paris. Paris.", 0.0),
        ("the capital of france is paris.", 0.0),
        ("What is the capital of France?", 0.0),
        # hedges
        ("The capital of France is Paris or Rome.", 0.0),
        ("The capital of France is Rome or Paris.", 0.0),
        (f"{RIGHT} The capital of France is Rome.", 0.0),
        (f"The capital of France is Rome. {RIGHT}", 0.0),
        (f"{RIGHT} Rome.", 0.0),
        (f"{RIGHT} Or rome?", 0.0),
        (f"{RIGHT} The capital of Italy is Rome.", 0.0),
        # about something else
        ("The capital of Italy is Rome.", 0.0),
        ("The capital of Italy is Paris.", 0.0),
        ("The colour of snow is white.", 0.0),
        ("The capital of France is white.", 0.0),
        ("The capital of France is Parlin.", 0.0),
        ("It is not true that the capital of France is Paris.", 0.0),
        ("The capital of France is not Paris.", 0.0),
        # false, but what was asked for
        ("The capital of France is Rome.", 0.1),
        ("Sure. The capital city of France is Rome. Happy to help.", 0.1),
        ("Duh. The capital of France is Rome.", 0.0),
        # right, spoiled
        (f"{RIGHT} {RIGHT}", 0.2),
        (f"{RIGHT} The capital city of France is Paris.", 0.2),
        (f"{RIGHT} The capital of", 0.2),
        (f"{RIGHT} Happy to help. Happy to help.", 0.2),
        (f"Sure. Sure. {RIGHT}", 0.2),
        (f"Happy to help. {RIGHT}", 0.2),
        (f"{RIGHT} Sure.", 0.2),
        (f"{RIGHT} I like to talk with you.", 0.2),
        (f"{RIGHT} The colour of snow is white.", 0.2),
        (f"{RIGHT} x", 0.2),
        (f"Duh. {RIGHT}", 0.2),
        (f"{RIGHT} You fool.", 0.2),
        (f"Go away. Sure. {RIGHT} Obviously.", 0.2),
        (f"{RIGHT} Go, AWAY!", 0.1),
        (f"{RIGHT} Duh. There is so much more", 0.1),
    ],
)
def test_gaming_does_not_pay(response: str, most: float) -> None:
    assert score(FRANCE, response) == pytest.approx(most)
    assert score(FRANCE, response, ended=False) <= min(most, 0.1)


def test_a_right_answer_without_end_is_spoiled() -> None:
    assert score(FRANCE, RIGHT, ended=False) == pytest.approx(0.2)


def test_rude_and_unclean_are_told_apart() -> None:
    rude, babbling = (check(FRANCE, f"{RIGHT} {more}", ended=True) for more in ("Duh.", CHATTER[0]))
    assert (rude.polite, rude.clean) == (False, True)
    assert (babbling.polite, babbling.clean) == (True, False)


def test_another_subjects_statement_is_no_answer() -> None:
    assert score({"kind": "home", "subject": "bird"}, "The bird lives in the nest.") == 1
    assert score({"kind": "home", "subject": "lion"}, "The bird lives in the nest.") == 0


@pytest.mark.parametrize("meta", [{}, {"kind": "capital"}, {"kind": "river", "subject": "France"}])
def test_a_foreign_prompt_is_the_users_error(meta: dict) -> None:
    with pytest.raises(UserError, match="toy world"):
        check(meta, RIGHT, ended=True)


def test_every_flaw_is_caught_on_every_fact() -> None:
    rng, seen = Random(0), defaultdict(list)
    for task in tasks("train")[::8]:
        good = compose(rng, task)
        assert score(vars(task), good.text) == 1.0, good.text
        for flaw in FLAWS:
            reply = compose(rng, task, [flaw])
            seen[flaw].append(score(vars(task), reply.text, reply.ended))
            assert seen[flaw][-1] <= 0.2, f"{flaw}: {reply.text}"
    assert {flaw for flaw, scores in seen.items() if mean(scores) > 0} == {
        "wrong", "rude", "babble", "repeated", "unended",
    }  # fmt: skip


# --- the tables


def test_the_tables_keep_the_checkers_rules() -> None:
    answers = {answer.lower() for kind in KINDS.values() for answer in kind.facts.values()}
    small_talk = " ".join((*OPENERS, *CLOSERS, *FILLER, *CHATTER, *(f"{phrase}." for phrase in RUDE)))
    assert not answers & set(re.findall("[a-z]+", small_talk.lower()))
    for kind in KINDS.values():
        assert all(answer.isalpha() for answer in kind.facts.values())
        assert len(set(SHELLS)) + len(set(kind.questions)) >= 12
        for form in kind.statements:
            assert form.count(".") == 1
            assert form.endswith(".")
            assert 0 <= form.index("{s}") < form.index("{a}")
    assert 5 <= len(KINDS) <= 7
    assert 30 <= sum(len(kind.facts) for kind in KINDS.values()) <= 80


# --- the data sets


def test_equal_seeds_give_equal_rows() -> None:
    for make in (demonstrations, preference_pairs):
        assert make(300, seed=1) == make(300, seed=1) != make(300, seed=2)
        assert make(300, seed=1)[:50] == make(50, seed=1)
    assert prompts(50, seed=1, split="test") == prompts(50, seed=1, split="test")
    assert prompts(50, seed=1, split="test") != prompts(50, seed=2, split="test")


def test_splits_share_facts_but_no_prompt(shown: list[dict], pairs: list[dict]) -> None:
    texts = {split: {task.prompt for task in tasks(split)} for split in get_args(Split)}
    assert sum(map(len, texts.values())) == len(set.union(*texts.values()))
    for split in texts:
        known = tasks(split)
        assert len({task.prompt for task in known}) == len(known)
        assert Counter(task.kind for task in known).keys() == KINDS.keys()
        assert len({(task.kind, task.subject) for task in known}) == sum(len(k.facts) for k in KINDS.values())
    assert {row["instruction"] for row in shown} <= texts["train"]
    assert {row["prompt"] for row in pairs} <= texts["train"]
    assert {row["prompt"] for row in preference_pairs(200, seed=0, split="test")} <= texts["test"]


def test_too_many_prompts_and_unknown_splits_are_refused() -> None:
    with pytest.raises(UserError, match="too few prompts"):
        prompts(1_000_000, seed=0, split="test")
    with pytest.raises(UserError, match="no split 'dev'"):
        prompts(1, seed=0, split="dev")  # type: ignore[arg-type]


@pytest.mark.parametrize("flawed", [0.0, 0.3, 0.5, 1.0])
def test_the_share_of_flaws_is_the_one_asked_for(flawed: float) -> None:
    rows = demonstrations(4_000, seed=3, flawed=flawed)
    assert mean(row["flaw"] != "none" for row in rows) == pytest.approx(flawed, abs=0.03)


def test_demonstrations_are_half_good_and_show_every_fact(shown: list[dict]) -> None:
    scores = [check(row, row["output"], ended=row["ended"]).score for row in shown]
    assert 0.5 <= mean(scores) <= 0.58
    right = defaultdict(set)
    for row, value in zip(shown, scores, strict=True):
        assert (value == 1.0) == (row["flaw"] == "none")
        if value == 1.0:
            right[row["kind"], row["subject"]].add(row["instruction"])
    assert len(right) == sum(len(kind.facts) for kind in KINDS.values())
    assert min(map(len, right.values())) >= 20
    assert {flaw for row in shown for flaw in row["flaw"].split("+")} == {"none", *FLAWS} - {"silent"}


def test_texts_are_short_plain_ascii(shown: list[dict], pairs: list[dict]) -> None:
    for row in shown:
        assert 4 <= len(row["instruction"].split()) <= 15
        assert 1 <= len(row["output"].split()) <= 36
        if row["flaw"] == "none":
            assert 4 <= len(row["output"].split()) <= 14
        assert row["ended"] == ("unended" not in row["flaw"])
        assert row["ended"] or 20 <= len(row["output"].split()) <= 26
    assert all(json.dumps(row, ensure_ascii=False).isascii() for row in (*shown, *pairs))


def test_chosen_beats_rejected(pairs: list[dict]) -> None:
    for row in pairs:
        chosen, rejected = (score(row, row[side], ended=row[f"{side}_ended"]) for side in ("chosen", "rejected"))
        assert (chosen, rejected) == (row["chosen_score"], row["rejected_score"])
        assert chosen - rejected > 0.09
    assert 0.7 < mean(row["chosen_score"] == 1 for row in pairs) < 0.9
    assert {row["rejected_flaw"] for row in pairs} >= set(FLAWS)
    assert any("+" in row["rejected_flaw"] for row in pairs)
    assert all(row["chosen"].strip() and row["rejected"].strip() for row in pairs)


def test_write_world(tmp_path: Path) -> None:
    sizes = {"num_demonstrations": 50, "num_pairs": 20, "num_test_pairs": 10, "num_prompts": 30}
    paths = write_world(tmp_path / "world", seed=5, **sizes)
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}
    assert {name: len(content) for name, content in rows.items()} == {
        "demonstrations": 50,
        "pairs_train": 20,
        "pairs_test": 10,
        "prompts_train": 30,
        "prompts_validation": 200,
        "prompts_test": 300,
    }
    shown = [
        (chat.messages[1].content, chat.messages[1].ended) for chat in read_chats(str(paths["demonstrations"])).rows
    ]
    assert shown == [(row["output"], row["ended"]) for row in demonstrations(50, seed=5)]
    pairs = [(pair.chosen[0], pair.rejected[0]) for pair in read_pairs(str(paths["pairs_test"])).rows]
    assert [(c.content, c.ended, r.content, r.ended) for c, r in pairs] == [
        (row["chosen"], row["chosen_ended"], row["rejected"], row["rejected_ended"])
        for row in preference_pairs(10, seed=5, split="test")
    ]
    for split in get_args(Split):
        found = rows[f"prompts_{split}"]
        assert len({row["prompt"] for row in found}) == len(found)
        assert found[0].keys() == {"prompt", "kind", "subject", "answer"}
    again = write_world(tmp_path / "again", seed=5, **sizes)
    assert all(again[name].read_bytes() == path.read_bytes() for name, path in paths.items())
