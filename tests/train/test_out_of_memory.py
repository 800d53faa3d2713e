"""Memory that runs out: the step is made again in smaller parts with the same result, or the run says what helps."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kinkajou import faults
from kinkajou.algos.losses import Loss, cross_entropy
from kinkajou.batch import TokenBatch
from kinkajou.errors import UserError
from kinkajou.memory import Budget, afford, needed, ran_out, told
from kinkajou.models.forward import LanguageModel
from kinkajou.parallel.strategy import Single
from kinkajou.train.optim import adamw
from kinkajou.train.update import Objective, in_parts, update
from small import Small, metrics, weights
from tiny import ours, peer, ragged, tiny_config

LENGTHS = (9, 3, 7, 2, 8, 5)
FAULTS = (
    MemoryError("no more"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        " 4294967296 bytes. Error code 12 (Cannot allocate memory)"
    ),
)


class Here(Single):
    def __init__(self) -> None:
        self.device = torch.device("cpu")


def made() -> tuple[LanguageModel, TokenBatch]:
    model = ours(AutoModelForCausalLM, tiny_config("llama"), peer(AutoModelForCausalLM, tiny_config("llama")))
    tokens, real = ragged(LENGTHS, width=9)
    return LanguageModel(model), TokenBatch(tokens, real[:, 1:])


class Narrow:
    """A loss on a device with room for so many tokens."""

    def __init__(self, room: int, fault: Exception = FAULTS[0]) -> None:
        self.room, self.fault, self.tried = room, fault, list[int]()

    def __call__(self, model: nn.Module, batch: TokenBatch, count: Tensor) -> Loss:
        self.tried.append(sum(batch.costs))
        value = cross_entropy(model(batch.tokens, batch.mask).logp, batch.mask, count)
        if self.tried[-1] > self.room:
            raise self.fault
        return value


def step(room: int, budget: Budget, fault: Exception = FAULTS[0]) -> tuple[dict[str, float], LanguageModel, Narrow]:
    model, batch = made()
    loss = Narrow(room, fault)
    optimizer = adamw(model, lr=0.01, weight_decay=0.1)
    found = update(Here(), model, optimizer, [Objective(batch, loss)], tokens_per_microbatch=budget, max_norm=1.0)
    return found, model, loss


@pytest.mark.parametrize("fault", FAULTS, ids=["host", "gpu", "torch on the host"])
def test_the_update_is_made_again_from_scratch(fault: Exception) -> None:
    """Bitwise what the smaller micro-batches would have given from the start: no gradient of the failed try is left."""
    said: list[str] = []
    budget = Budget(8192, say=said.append)
    found, model, loss = step(12, budget, fault)
    assert budget.tokens == 34 // 2 // 2 + 1  # 34 tokens in all -> 17 -> 8, but the longest row has 9
    want, other, _ = step(12, Budget(9))
    assert found == want
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert len(said) == 2
    assert "micro-batches of 9 tokens from here on instead of 17" in said[1]
    assert max(loss.tried[-4:]) <= 12


def test_one_row_alone_is_too_much() -> None:
    with pytest.raises(UserError) as fault:
        step(8, Budget(8192), FAULTS[1])
    assert fault.value.exit_code == 4
    text = str(fault.value)
    for words in ("in the update, with one row at a time", "2.00 GiB were wanted", "6 rows, the longest of 9 tokens"):
        assert words in text
    for flag in ("--gradient_checkpointing", "--dtype bf16", "--max_len", "--strategy"):
        assert flag in fault.value.fix


def test_one_of_several_processes_cannot_go_back() -> None:
    with pytest.raises(UserError, match="memory ran out in the update") as fault:
        step(12, Budget(8192, alone=False))
    assert fault.value.exit_code == 4
    assert "others wait" in fault.value.evidence
    assert "--tokens_per_microbatch (to 17)" in fault.value.fix


def test_what_is_no_lack_of_memory_stays_what_it_was() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        step(12, Budget(8192), RuntimeError("shapes do not fit"))


def test_scoring_is_made_again() -> None:
    model, batch = made()

    def logp(part: TokenBatch) -> Tensor:
        if sum(part.costs) > 12:
            raise MemoryError
        return model(part.tokens, part.mask).logp

    budget = Budget(8192, say=lambda text: None)
    torch.testing.assert_close(in_parts(batch, budget, logp), in_parts(batch, 9, logp), atol=0, rtol=0)
    assert budget.tokens == 9


def test_the_optimisers_state_has_no_smaller_part() -> None:
    with pytest.raises(UserError, match="optimiser's step") as fault, needed("optimiser's step", "less"):
        raise MemoryError("no more")
    assert (fault.value.exit_code, fault.value.fix) == (4, "less")


def test_a_real_allocation() -> None:
    """torch's own words on this machine."""
    with pytest.raises(RuntimeError) as fault:
        torch.empty(10**14)
    assert ran_out(fault.value)
    assert told(fault.value) == f"{4 * 10**14 / 2**30:.3g} GiB were wanted"


def test_a_budget_is_halved_no_further_than_the_longest_row() -> None:
    sizes: list[int] = []

    def work(tokens: int) -> int:
        sizes.append(tokens)
        if tokens > 7:
            raise MemoryError
        return tokens

    assert afford(Budget(1000, say=lambda text: None), [7] * 16, "test", work) == 7
    assert sizes == [1000, 56, 28, 14, 7]


@pytest.mark.parametrize("point", ["update.forward", "update.backward"])
def test_a_run_goes_on(point: str, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second step's try fails in its first micro-batch; all later ones are smaller, and nothing else changes."""
    want = small.run("sft", tmp_path / "plain")
    faults.arm(f"{point}:2:oom")
    try:
        got = small.run("sft", tmp_path / "run")
    finally:
        faults.arm("")
    assert "note: memory ran out in the update" in capsys.readouterr().out
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in want], rel=1e-5)
    mine, theirs = weights(tmp_path / "run", 5), weights(tmp_path / "plain", 5)
    for name, x in mine.items():
        torch.testing.assert_close(x, theirs[name], atol=1e-5, rtol=1e-4)
    assert metrics(tmp_path / "run") == got


def test_the_smaller_micro_batch_goes_through_a_resume(small: Small, tmp_path: Path) -> None:
    """To the bit: with the first budget, sums would round in another way."""
    common = {"save_every": 1, "score_scale": "std", "minibatch_size": 8}
    faults.arm("update.forward:2:oom")
    try:
        want = small.run("ppo", tmp_path / "whole", **common)
        faults.arm("update.forward:2:oom,step.logged:3:raise")
        with pytest.raises(RuntimeError, match=r"asked for at step.logged"):
            small.run("ppo", tmp_path / "run", **common)
    finally:
        faults.arm("")
    assert small.run("ppo", tmp_path / "run", **common) == want
    mine, theirs = weights(tmp_path / "run", 5), weights(tmp_path / "whole", 5)
    assert all(torch.equal(x, theirs[name]) for name, x in mine.items())
