"""The order of rows: every row once in an epoch, a pure function of the step, the same batch for any world size."""

import itertools

import pytest

from kinkajou.data.loader import Shuffle, hold_out, share
from kinkajou.errors import UserError


def epoch_of(order: Shuffle, number: int) -> list[int]:
    steps = range(number * order.batches_per_epoch, (number + 1) * order.batches_per_epoch)
    return [row for step in steps for row in order.batch(step)]


@pytest.mark.parametrize(("rows", "batch_size"), [(12, 4), (1000, 8), (5, 5), (7, 1)])
def test_every_row_once_in_an_epoch(rows: int, batch_size: int) -> None:
    """Contract, item 2: 1,000 prompts counted as 2."""
    order = Shuffle(rows, batch_size, seed=3)
    epochs = [epoch_of(order, number) for number in range(3)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    if rows > 5:
        assert all(a != b for a, b in itertools.combinations(epochs, 2))
        assert epochs[0] != list(range(rows))


def test_a_short_remainder_waits() -> None:
    order = Shuffle(10, 4, seed=0)
    assert order.batches_per_epoch == 2
    seen: set[int] = set()
    for number in range(40):
        epoch = epoch_of(order, number)
        assert len(set(epoch)) == 8
        seen |= set(epoch)
    assert seen == set(range(10))  # no row waits for ever


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    want = [Shuffle(50, 8, seed=1).batch(step) for step in range(20)]
    assert [Shuffle(50, 8, seed=1).batch(step) for step in reversed(range(20))][::-1] == want
    assert [Shuffle(50, 8, seed=2).batch(step) for step in range(20)] != want
    handed_out = Shuffle(50, 8, seed=1).batch(0)
    handed_out.clear()
    assert Shuffle(50, 8, seed=1).batch(0) == want[0]


def test_too_few_rows_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match="3 usable rows, a batch takes 4"):
        Shuffle(3, 4, seed=0)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_ranks_share_the_batch(world: int) -> None:
    """Contract, item 2: with several ranks the same first batch came back every step."""
    order = Shuffle(100, 12, seed=5)
    for step in range(12):
        batch = order.batch(step)
        parts = [share(batch, rank=rank, world=world) for rank in range(world)]
        assert {len(part) for part in parts} == {12 // world}
        assert sorted(row for part in parts for row in part) == sorted(batch)
        assert [row for together in zip(*parts, strict=True) for row in together] == batch


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match="batch of 10 cannot be shared by 4") as refused:
        share(range(10), rank=0, world=4)
    assert "(8 or 12), or 2 processes" in refused.value.fix


def test_more_processes_than_samples_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match="more processes than samples") as refused:
        share(range(3), rank=3, world=4)
    assert "4 processes" in refused.value.evidence
    assert "batch of 3" in refused.value.evidence
    assert "start 3 or fewer" in refused.value.fix


@pytest.mark.parametrize(("count", "part", "held"), [(100, 0.1, 10), (7, 0.01, 1), (50, 0.0, 0), (9, 0.5, 4)])
def test_hold_out(count: int, part: float, held: int) -> None:
    train, out = hold_out(count, part, seed=4)
    assert len(out) == held
    assert not set(train) & set(out)
    assert sorted(train + out) == list(range(count))
    assert (train, out) == hold_out(count, part, seed=4)
    assert train == sorted(train)
    assert out == sorted(out)
    if held > 5:
        assert out != hold_out(count, part, seed=5)[1]
        assert out != list(range(held))
