"""Batches made ahead are the same batches."""

import threading

import pytest
import torch

from kinkajou.batch import TokenBatch
from kinkajou.train.fit import made_ahead

GPU = torch.device("cuda")  # only its name is looked at


def numbered(step: int) -> TokenBatch:
    return TokenBatch(torch.full((1, 2), step), torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize("device", [torch.device("cpu"), GPU])
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_every_step_gets_its_batch_in_order(device: torch.device, steps: int) -> None:
    found = [int(batch.tokens[0, 0]) for batch in made_ahead(numbered, range(1, steps + 1), device)]
    assert found == list(range(1, steps + 1))


def test_on_a_gpu_the_next_batch_is_made_during_the_step() -> None:
    second = threading.Event()

    def make(step: int) -> TokenBatch:
        if step == 2:
            second.set()
        return numbered(step)

    batches = made_ahead(make, range(1, 4), GPU)
    next(batches)
    assert second.wait(10)


def test_on_a_cpu_it_is_made_when_it_is_asked_for() -> None:
    made: list[int] = []
    batches = made_ahead(lambda step: made.append(step) or numbered(step), range(1, 4), torch.device("cpu"))
    next(batches)
    assert made == [1]


@pytest.mark.parametrize("device", [torch.device("cpu"), GPU])
def test_a_fault_comes_at_its_step(device: torch.device) -> None:
    def make(step: int) -> TokenBatch:
        if step == 2:
            raise ValueError("row 2")
        return numbered(step)

    batches = made_ahead(make, range(1, 4), device)
    assert int(next(batches).tokens[0, 0]) == 1
    with pytest.raises(ValueError, match="row 2"):
        next(batches)
