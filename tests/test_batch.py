"""Padding, lengths, costs, splitting: what flows between the parts."""

import itertools
import random

import pytest
import torch

from kinkajou.batch import (
    GRPOBatch,
    JudgedBatch,
    PPOBatch,
    PreferenceBatch,
    Rollout,
    ScoredRollout,
    TokenBatch,
    ValueBatch,
    lengths_of,
    pad_pairs,
    pad_rows,
    split_by_tokens,
)

ROWS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
COUNTS = [[False, False, True], [True], [True, True, False, True, False], [True, True]]


def random_batch(seed: int, b: int = 9, t: int = 12) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, t, generator=generator) < 0.3
    mask[2] = False
    return TokenBatch(torch.randint(0, 90, (b, t + 1), generator=generator), mask)


def test_pad_rows() -> None:
    batch = pad_rows(ROWS, COUNTS, pad_id=99)
    assert batch.tokens.tolist() == [
        [5, 6, 7, 99, 99],
        [8, 99, 99, 99, 99],
        [9, 10, 11, 12, 13],
        [14, 15, 99, 99, 99],
    ]
    # Target j is token j + 1; the first token of a row is nobody's target.
    assert batch.mask.int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]]
    assert batch.tokens.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    assert batch.lengths.tolist() == [3, 0, 4, 2]  # up to the last counting target
    assert batch.costs == [3, 0, 4, 2]
    assert float(batch.count) == 4.0
    assert len(batch) == 4


def test_rows_of_one_token_still_make_a_batch() -> None:
    batch = pad_rows([[3], [4]], [[True], [True]], pad_id=0)
    assert batch.tokens.shape == (2, 2)
    assert batch.mask.shape == (2, 1)
    assert not batch.mask.any()


def test_rows_and_masks_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pad_rows(ROWS, COUNTS[:-1], pad_id=0)
    with pytest.raises(RuntimeError):
        pad_rows([[1, 2, 3, 4]], [[True, True, True]], pad_id=0)


def test_pad_pairs() -> None:
    batch = pad_pairs([[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10, 11]], pad_id=0)
    assert batch.tokens.tolist() == [[[1, 2, 3, 0], [6, 7, 0, 0]], [[4, 5, 0, 0], [8, 9, 10, 11]]]
    assert batch.lengths.tolist() == [[3, 2], [2, 4]]
    assert batch.costs == [5, 6]
    assert float(batch.count) == 2.0
    both = batch.stacked()
    assert both.tokens.tolist() == [[1, 2, 3, 0], [6, 7, 0, 0], [4, 5, 0, 0], [8, 9, 10, 11]]
    assert both.lengths.tolist() == [3, 2, 2, 4]


@pytest.mark.parametrize("seed", range(5))
def test_lengths_are_where_the_last_target_ends(seed: int) -> None:
    batch = random_batch(seed)
    for row, length in zip(batch.mask.tolist(), lengths_of(batch.mask).tolist(), strict=True):
        places = [j for j, counts in enumerate(row) if counts]
        assert length == (places[-1] + 2 if places else 0)


@pytest.mark.parametrize("budget", [1, 10, 17, 40, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_split_by_tokens_covers_each_row_once_in_order(budget: int, seed: int) -> None:
    batch = random_batch(seed)
    parts = [part.tolist() for part in split_by_tokens(batch, budget)]
    assert list(itertools.chain(*parts)) == list(range(len(batch)))
    for part in parts:
        assert part
        assert len(part) == 1 or sum(batch.costs[i] for i in part) <= budget
    for part, following in itertools.pairwise(parts):  # no part ends early
        assert sum(batch.costs[i] for i in part) + batch.costs[following[0]] > budget


def test_pairs_are_split_by_both_sides() -> None:
    generator = random.Random(0)
    sides = [[[1] * generator.randrange(2, 9) for _ in range(8)] for _ in range(2)]
    batch = pad_pairs(*sides, pad_id=0)
    for part in split_by_tokens(batch, 20):
        assert sum(len(sides[0][i]) + len(sides[1][i]) for i in part.tolist()) <= 20


def ppo_batch(base: TokenBatch, value_mask: torch.Tensor) -> PPOBatch:
    """Every field with numbers of its own: 0.. in old_logp, 100.. in ref_logp, and so on."""
    b, t = base.mask.shape
    fields = [torch.arange(float(b * t)).view(b, t) + 100 * k for k in range(6)]
    return PPOBatch(base.tokens, base.mask, *fields[:4], value_mask, *fields[4:])


def test_a_policy_batch_counts_tokens_and_samples() -> None:
    base = random_batch(2)
    filled = [torch.zeros(base.mask.shape) for _ in range(4)]
    batch = GRPOBatch(base.tokens, base.mask, *filled)
    assert batch.count.tolist() == [float(base.mask.sum()), 9.0]
    assert batch.costs == base.costs
    assert GRPOBatch(base.tokens[:0], base.mask[:0], *(x[:0] for x in filled)).count.tolist() == [0.0, 0.0]


def test_a_ppo_batch_is_both_views_and_puts_the_longer_through_the_model() -> None:
    base = random_batch(3, b=5, t=6).widen(1)
    after = torch.zeros_like(base.mask)
    after[0, 6] = True
    value_mask = (base.mask & (torch.arange(7) % 2 == 0)) | after
    batch = ppo_batch(base, value_mask)
    assert batch.count.tolist() == [float(base.mask.sum()), 5.0, float(value_mask.sum())]
    for i, cost in enumerate(batch.costs):
        places = [j for j in range(7) if base.mask[i, j] or value_mask[i, j]]
        assert cost == (places[-1] + 2 if places else 0)
    assert batch.costs[0] == 8  # the value after the last sampled token needs that token in the model
    policy, critic = batch.for_policy(), batch.for_critic()
    assert type(policy) is GRPOBatch
    assert type(critic) is ValueBatch
    assert torch.equal(policy.mask, base.mask)
    assert torch.equal(critic.mask, value_mask)
    firsts = [x[0, 0].item() for x in (policy.old_logp, policy.ref_logp, policy.advantages, policy.correction)]
    assert firsts == [0.0, 100.0, 200.0, 300.0]
    assert [critic.old_values[0, 0].item(), critic.returns[0, 0].item()] == [400.0, 500.0]
    assert float(critic.count) == float(value_mask.sum())


def test_a_pair_batch_of_answers_counts_pairs_and_both_kinds_of_targets() -> None:
    both = pad_pairs([[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10, 11]], pad_id=0)
    answer = both.mask.clone()
    answer[0, 0, 0] = False
    batch = PreferenceBatch(both.tokens, both.mask, answer, torch.zeros(2, 2), torch.ones(2), torch.zeros(2, 3))
    assert batch.count.tolist() == [2.0, 2.0, 3.0]
    assert batch.costs == both.costs
    one = batch.select(torch.tensor([1]))
    assert one.count.tolist() == [1.0, 1.0, 1.0]
    assert one.partners.shape == (1, 3)


def test_a_judged_batch_counts_records_good_ones_and_their_targets() -> None:
    base = random_batch(4, b=4, t=5)
    good = torch.tensor([True, False, False, True])
    batch = JudgedBatch(base.tokens, base.mask, good, torch.zeros(4), torch.zeros(4))
    assert batch.count.tolist() == [4.0, 2.0, float(base.mask[0].sum() + base.mask[3].sum())]
    assert batch.select(torch.tensor([1, 2])).count.tolist() == [2.0, 0.0, 0.0]


@pytest.mark.parametrize("budget", [1, 11, 1000])
def test_counts_and_costs_add_up_over_parts(budget: int) -> None:
    """What lets a loss be cut anywhere: counts of parts sum to the count of the whole."""
    base = random_batch(5)
    batch = ppo_batch(base, base.mask)
    parts = [batch.select(rows) for rows in split_by_tokens(batch, budget)]
    assert sum(part.count for part in parts).tolist() == batch.count.tolist()
    assert [cost for part in parts for cost in part.costs] == batch.costs


def test_a_scored_rollout_keeps_its_scores_when_rows_move() -> None:
    base = random_batch(6, b=3, t=4)
    scored = ScoredRollout(
        base.tokens, base.mask, torch.zeros(3, 4), torch.tensor([True, False, True]), torch.tensor([0.1, 0.2, 0.3])
    )
    moved = scored.select(torch.tensor([2, 0])).widen(3)
    assert moved.scores.tolist() == pytest.approx([0.3, 0.1])
    assert moved.ended.tolist() == [True, True]
    assert moved.tokens.shape == (2, 8)


def test_select_takes_rows_of_every_field_and_widen_adds_columns() -> None:
    base = random_batch(1, b=4, t=3)
    batch = ppo_batch(base, base.mask)
    rows = torch.tensor([3, 0, 3])
    picked = batch.select(rows)
    assert isinstance(picked, PPOBatch)
    assert picked.tokens.tolist() == [base.tokens[i].tolist() for i in (3, 0, 3)]
    assert picked.old_values[:, 0].tolist() == [409.0, 400.0, 409.0]
    assert picked.returns[1].tolist() == [500.0, 501.0, 502.0]
    numbers = torch.arange(12.0).view(4, 3)
    rollout = Rollout(base.tokens, base.mask, numbers, torch.tensor([True, False, True, True]))
    wide = rollout.widen(2)
    assert wide.tokens.shape == (4, 6)
    assert wide.mask.shape == wide.sampler_logp.shape == (4, 5)
    assert torch.equal(wide.tokens[:, :4], base.tokens)
    assert not wide.mask[:, 3:].any()
    assert wide.ended.tolist() == [True, False, True, True]
    assert wide.lengths.tolist() == base.lengths.tolist()
    assert wide.costs == base.costs
    assert float(wide.count) == float(base.count)


def test_the_value_of_padding_does_not_matter() -> None:
    one, other = (pad_rows(ROWS, COUNTS, pad_id=pad) for pad in (0, 77))
    assert torch.equal(one.mask, other.mask)
    assert one.costs == other.costs
    assert float(one.count) == float(other.count)
    real = torch.tensor([[j < len(row) for j in range(5)] for row in ROWS])
    assert torch.equal(one.tokens[real], other.tokens[real])
    assert set(other.tokens[~real].tolist()) == {77}


def test_what_goes_to_a_gpu_is_pinned_and_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append(("pin", None)) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, **how: calls.append((device, how)) or x)
    batch = random_batch(1)
    batch.to("cuda")
    assert calls == [("pin", None)] * 2 + [("cuda", {"non_blocking": True})] * 2
    calls.clear()
    batch.to("cpu")
    assert calls == [("cpu", {})] * 2
