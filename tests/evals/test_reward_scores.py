"""Scores through a model: order, micro-batches, and scorers with the bugs that stability must find."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from kinkajou.batch import TokenBatch
from kinkajou.evals.reward_scores import Stability, score_rows, spread_rows, stability
from kinkajou.models.forward import ScalarModel
from tiny import ours, peer, tiny_config

PAD = 0
ROWS = [list(range(1, n + 1)) for n in (5, 3, 9, 2, 7, 4)]


def sums(batch: TokenBatch) -> Tensor:
    """The sum of each row's real tokens."""
    real = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    return (batch.tokens * real).sum(1).float()


def scores(scorer, budget: int) -> list[float]:
    return [value for part in score_rows(scorer, ROWS, pad_id=PAD, budget=budget) for value in part]


@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_scores_come_in_order(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinkajou.evals.reward_scores.ROWS_AT_ONCE", 4)
    assert scores(sums, budget) == [n * (n + 1) / 2 for n in (5, 3, 9, 2, 7, 4)]


def test_micro_batches_keep_to_the_budget() -> None:
    parts = list(score_rows(sums, ROWS, pad_id=PAD, budget=9))
    assert [len(part) for part in parts] == [2, 1, 2, 1]


def test_a_sound_scorer_is_stable() -> None:
    assert stability(sums, ROWS, pad_id=PAD) == Stability(6, 0, 0, 0)


def sees_padding(batch: TokenBatch) -> Tensor:
    return batch.tokens.sum(1).float()


def sees_width(batch: TokenBatch) -> Tensor:
    return sums(batch) + batch.tokens.shape[1]


def sees_place(batch: TokenBatch) -> Tensor:
    return sums(batch) + torch.arange(len(batch))


def test_faults_are_found_where_they_are() -> None:
    found = stability(sees_padding, ROWS, pad_id=PAD)
    assert (found.padded, found.together) == (16, 0)  # 16 other tokens of value 1; the pad token is 0
    found = stability(sees_width, ROWS, pad_id=PAD)
    assert (found.padded, found.together) == (32, 9 - 2)  # the shortest row has two tokens
    found = stability(sees_place, ROWS, pad_id=PAD)
    assert (found.padded, found.together, found.reversed) == (0, 5, 5)


def test_rows_of_all_lengths_are_tried() -> None:
    rows = [[1] * n for n in range(2, 102)]
    assert [len(row) for row in spread_rows(rows[::-1], 5)] == [2, 27, 52, 76, 101]
    assert len(spread_rows(rows[:3], 5)) == 3


def test_a_model_scores_like_transformers() -> None:
    other = peer(AutoModelForSequenceClassification, tiny_config("llama"))
    model = ScalarModel(ours(AutoModelForSequenceClassification, tiny_config("llama"), other))

    def scorer(batch: TokenBatch) -> Tensor:
        return model(batch.tokens, batch.mask, at="end")

    with torch.no_grad():
        expected = [float(other(torch.tensor([row])).logits) for row in ROWS]
    assert scores(scorer, 12) == pytest.approx(expected, abs=1e-5)
    found = stability(scorer, ROWS, pad_id=PAD)
    assert max(found.padded, found.together, found.reversed) < 1e-5
