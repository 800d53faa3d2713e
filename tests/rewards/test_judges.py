"""Reward models, ensembles and weighted sums: scores against transformers' own and against plain arithmetic."""

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import answer, rollout_of
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from kinkajou.errors import UserError
from kinkajou.rewards.judges import Ensemble, Judge, Term, Verdict, WeightedSum, check_finite
from kinkajou.rewards.load import check_specs, load_judge, reward_model_folder
from small import Small
from tiny import save_source, tiny_tokenizer

ROWS = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
ANSWERS = [answer("a b c", "first?"), answer("a", "second?", ended=False), answer("a b", "third?")]


def load(*specs: str, **changes: Any) -> Judge:
    options: dict[str, Any] = {
        "tokenizer": tiny_tokenizer(),
        "dtype": "fp32",
        "place": nn.Module.cpu,
        "tokens_per_microbatch": 5,
        "ensemble_penalty": 0.0,
        "timeout_s": 20.0,
        "retries": 0,
    }
    return load_judge(specs, **(options | changes))


def peer_scores(folder: str) -> list[float]:
    """transformers alone, row by row, at the last token."""
    module = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [module(torch.tensor([row])).logits.item() for row in ROWS]


@pytest.fixture(scope="module")
def models(small: Small, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("judges")
    for seed in (2, 3):
        save_source(folder / f"{seed}", AutoModelForSequenceClassification, "llama", tiny_tokenizer(), seed=seed)
    return [small.judge, str(folder / "2"), str(folder / "3")]


class Fixed:
    """A judge of given scores."""

    def __init__(self, *scores: float, **details: list[float]) -> None:
        self.scores, self.details = scores, details

    def __call__(self, answers: object, rollout: object) -> Verdict:
        return Verdict(torch.tensor(self.scores), {name: torch.tensor(x) for name, x in self.details.items()})


def close(found: Tensor, wanted: list[float]) -> None:
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_a_reward_model_scores_as_transformers_does(models: list[str]) -> None:
    verdict = load(models[0])(ANSWERS, rollout_of(ROWS))
    close(verdict.scores, peer_scores(models[0]))
    assert verdict.details == {}


def test_an_ensemble(models: list[str]) -> None:
    verdict = load(f"ensemble:{','.join(models)}", ensemble_penalty=0.7)(ANSWERS, rollout_of(ROWS))
    opinions = list(zip(*map(peer_scores, models), strict=True))
    close(verdict.scores, [statistics.fmean(x) - 0.7 * statistics.stdev(x) for x in opinions])
    close(verdict.details["disagreement"], [statistics.stdev(x) for x in opinions])
    assert list(verdict.details) == ["disagreement"]


def test_a_weighted_sum(models: list[str]) -> None:
    judge = load("0.5*rule:length:3", f"-2*{models[0]}", "rule:ended", "ensemble:" + ",".join(models[1:]))
    verdict = judge(ANSWERS, rollout_of(ROWS))
    lengths, ended = [1, 1 / 3, 2 / 3], [1, 0, 1]
    model, one, two = map(peer_scores, models)
    wanted = [0.5 * a - 2 * b + c + (d + e) / 2 for a, b, c, d, e in zip(lengths, model, ended, one, two, strict=True)]
    close(verdict.scores, wanted)
    name = f"model:{Path(models[0]).name}"
    assert list(verdict.details) == ["rule:length", name, "rule:ended", "ensemble", "disagreement"]
    close(verdict.details["rule:length"], lengths)
    close(verdict.details[name], model)


def test_parts_of_one_name_keep_their_whole_names() -> None:
    verdict = load("rule:length:3", "rule:length:1", "rule:ended")(ANSWERS, rollout_of(ROWS))
    assert list(verdict.details) == ["rule:length:3", "rule:length:1", "rule:ended"]


def test_a_single_weighted_part_is_shown_as_it_was() -> None:
    verdict = load("-2*rule:ended")(ANSWERS, rollout_of(ROWS))
    close(verdict.scores, [-2, 0, -2])
    close(verdict.details["rule:ended"], [1, 0, 1])


def test_two_ensembles_keep_their_details_apart() -> None:
    pair = [Fixed(1.0, 1.0, 1.0), Fixed(3.0, 1.0, 2.0)]
    terms = [Term(name, 1.0, Ensemble(pair, penalty=0)) for name in ("one", "two")]
    details = WeightedSum(terms)(ANSWERS, rollout_of(ROWS)).details
    assert list(details) == ["one", "disagreement", "two", "two disagreement"]
    close(details["two disagreement"], [math.sqrt(2), 0, math.sqrt(0.5)])


def test_no_answers_give_no_scores_and_the_same_names(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores_y.py").write_text("def f(completions, **rest): return [1] * len(completions)")
    judge = load("rule:ended", "ensemble:" + ",".join(models), models[0], "http://127.0.0.1:9/", "scores_y:f")
    verdict = judge([], rollout_of([]))
    assert verdict.scores.shape == (0,)
    expected = [
        "rule:ended",
        "ensemble",
        "disagreement",
        f"model:{Path(models[0]).name}",
        "http:127.0.0.1:9",
        "python:f",
    ]
    assert list(verdict.details) == expected
    assert all(x.shape == (0,) for x in verdict.details.values())


def test_a_function_in_a_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores_z.py").write_text("def f(completions, **rest): return [len(c) for c in completions]")
    close(load("0.1*python:scores_z:f", "rule:ended")(ANSWERS, rollout_of(ROWS)).scores, [1.5, 0.1, 1.3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39])
def test_a_part_that_is_no_number_is_named(bad: float) -> None:
    judge = WeightedSum([Term("rule:ended", 1.0, Fixed(0, 0, 0)), Term("model:x", 0.0, Fixed(1, bad, bad))])
    verdict = judge(ANSWERS, rollout_of(ROWS))
    assert verdict.bad[1][0] == "model:x"
    assert verdict.scores.isfinite().tolist() == [True, False, False]
    with pytest.raises(UserError) as caught:
        check_finite(verdict, ANSWERS)
    for word in ("model:x", "second?", "prompts.jsonl:7", "2 such samples"):
        assert word in str(caught.value)
    assert caught.value.exit_code == 3


def test_what_is_refused(small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no reward"):
        load()
    with pytest.raises(UserError, match="no scalar head"):
        load(small.policy)
    save_source(tmp_path / "other", AutoModelForSequenceClassification, "llama", tiny_tokenizer(words=50))
    with pytest.raises(UserError, match=r"different vocabularies(.|\n)*other"):
        load(f"ensemble:{small.judge},{tmp_path / 'other'}")
    with pytest.raises(UserError, match="unknown rule"):
        load("rule:nope")


def test_the_promised_names_are_here() -> None:
    check_specs(["rule:ended"])
    assert reward_model_folder(["a"]) == "a"
