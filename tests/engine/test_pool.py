"""The queue in front of rollout workers: order, replacement, versions; workers in this process instead of Ray's."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from crew import Crew, Event
from kinkajou.batch import Rollout, Sampling
from kinkajou.engine import pool, worker
from kinkajou.engine.engine import LocalEngine
from kinkajou.engine.pool import Pool
from kinkajou.engine.pool_engine import PoolEngine
from kinkajou.engine.worker import Plan, Reply, Worker
from kinkajou.errors import UserError
from kinkajou.models import adapters
from kinkajou.models.forward import LanguageModel
from kinkajou.models.replica import shape_of
from tiny import FOUR, PAD, ours, peer, shake, tiny_config

SAMPLING = Sampling(1.1, 20)
PROMPTS = [[3 + (7 * i + j) % 80 for j in range(1 + i % 5)] for i in range(24)]
SEEDS = [1000 + i for i in range(24)]
Make = Callable[..., tuple[PoolEngine, Crew, LanguageModel]]


def model_of(name: str, *, lora: int = 0, dtype: str = "fp32") -> LanguageModel:
    module = ours(AutoModelForCausalLM, tiny_config(name), peer(AutoModelForCausalLM, tiny_config(name)))
    if lora:
        module = adapters.add_lora(module, rank=lora, alpha=None, scalar=False)
        shake(module, seed=3)
    return LanguageModel(module, dtype=dtype)  # type: ignore[arg-type]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[PoolEngine] = []

    def build(workers: int = 2, name: str = "llama", lora: int = 0, dtype: str = "fp32") -> Any:
        model, crew = model_of(name, lora=lora, dtype=dtype), Crew()
        plan = Plan(shape_of(model, lora_rank=lora), end_ids=[2], pad_id=PAD, max_rows=64)
        made.append(PoolEngine(Pool(crew, plan, workers=workers, say=lambda text: None), model))
        return made[-1], crew, model

    yield build
    for engine in made:
        engine.close()


def generate(engine: Any, seeds: list[int] = SEEDS) -> Rollout:
    found: Rollout = engine.generate(PROMPTS, SAMPLING, max_new_tokens=9, seeds=seeds)
    return found


def local(model: LanguageModel, seeds: list[int] = SEEDS) -> Rollout:
    return generate(LocalEngine(model, end_ids=[2], pad_id=PAD), seeds)


def same(got: Rollout, want: Rollout) -> None:
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.mask, want.mask)
    assert torch.equal(got.ended, want.ended)
    torch.testing.assert_close(got.sampler_logp, want.sampler_logp, atol=1e-5, rtol=0)


def move(model: LanguageModel, seed: int) -> None:
    """As an optimiser step does: in place, the trained weights alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.05 * torch.randn(param.shape, generator=generator))


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_same_text_as_the_local_engine(make: Make, name: str, workers: int) -> None:
    engine, crew, model = make(workers, name)
    engine.load(model.named_parameters())
    same(generate(engine), local(model))
    assert sorted(crew.asked()) == SEEDS
    assert int(local(model).ended.sum()) > 0


@pytest.mark.parametrize("how", [{"lora": 2}, {"dtype": "bf16"}, {"lora": 2, "dtype": "bf16"}])
def test_new_weights_by_name_only_those_that_move(make: Make, how: dict[str, Any]) -> None:
    engine, crew, model = make(2, "llama", **how)
    engine.load(model.named_parameters())
    before = generate(engine)
    same(before, local(model))
    move(model, 1)
    engine.load(model.named_parameters())
    same(generate(engine), local(model))
    assert not torch.equal(before.tokens, generate(engine).tokens)
    assert {version for _, what, at in crew.events if what == "take" for version in at[:1]} == (
        {-1, 0, 1} if "lora" in how else {0, 1}
    )


def test_old_blocks_are_let_go_one_by_one(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing is sampled, weights lie once and a block in the workers' store."""
    monkeypatch.setattr(pool, "BLOCK_BYTES", 4000)
    engine, crew, model = make(2)
    engine.load(model.named_parameters())
    held: list[int] = []
    engine.pool.crew.hold = lambda block: held.append(count(engine)) or Crew.hold(crew, block)  # type: ignore[method-assign, func-returns-value]
    whole = count(engine)
    assert whole > 5
    move(model, 1)
    engine.load(model.named_parameters())
    assert len(held) == whole
    assert held == list(range(whole, 0, -1))  # those of the new version are not the pool's yet
    same(generate(engine), local(model))


def count(engine: PoolEngine) -> int:
    return sum(block is not None for blocks in engine.pool._weights.values() for block in blocks)


def test_a_fast_worker_gets_more(make: Make) -> None:
    engine, crew, model = make(2)
    engine.load(model.named_parameters())
    crew.slow = {0: 0.4}
    same(generate(engine), local(model))
    chunks = [number for number, what, _ in crew.events if what == "sample"]
    assert chunks.count(1) > chunks.count(0) >= 1


@pytest.mark.parametrize("workers", [1, 3])
def test_a_lost_worker_is_replaced_and_its_prompts_asked_again(make: Make, workers: int) -> None:
    engine, crew, model = make(workers)
    engine.load(model.named_parameters())
    move(model, 1)
    engine.load(model.named_parameters())
    seen: list[int] = []

    def fails(event: Event) -> bool:
        if event[1] == "sample":
            seen.append(event[0])
        return event[1] == "sample" and len(seen) in (1, 3, 4)

    crew.fails = fails
    same(generate(engine), local(model))
    assert engine.pool.lost == 3
    assert len(crew.hands) <= workers + 3
    assert set(crew.asked()) == set(SEEDS)
    crew.fails = lambda event: False
    move(model, 2)
    engine.load(model.named_parameters())
    same(generate(engine), local(model))


def test_a_worker_that_dies_while_weights_come(make: Make) -> None:
    engine, crew, model = make(2)
    engine.load(model.named_parameters())
    crew.fails = lambda event: event[:2] == (1, "take")
    move(model, 1)
    engine.load(model.named_parameters())
    same(generate(engine), local(model))
    assert len(crew.hands) == 3


def test_workers_that_die_over_the_same_prompts_end_the_run(make: Make) -> None:
    engine, crew, model = make(2)
    engine.load(model.named_parameters())
    crew.fails = lambda event: event[1] == "sample" and SEEDS[0] in event[2]
    with pytest.raises(UserError, match="5 rollout workers were lost over the same prompts"):
        generate(engine)


def test_workers_that_do_not_come_up(make: Make) -> None:
    engine, crew, model = make(2)
    crew.fails = lambda event: event[1] == "build"
    with pytest.raises(UserError, match="does not come up"):
        engine.load(model.named_parameters())


def test_another_version_is_refused(make: Make) -> None:
    engine, crew, model = make(2)
    crew.differ = {"torch": "2.11.0", "host": "far"}
    with pytest.raises(UserError, match="worker on far runs other versions") as caught:
        engine.load(model.named_parameters())
    ours_here = torch.__version__.partition("+")[0]
    assert caught.value.evidence == f"torch 2.11.0 there, {ours_here} here"


def test_weights_of_another_version_are_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that would silently sample with old weights."""
    engine, _, model = make(1)
    engine.load(model.named_parameters())
    honest = Worker.sample
    monkeypatch.setattr(Worker, "sample", lambda self, chunk: Reply(99, honest(self, chunk).answers))
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with pytest.raises(RuntimeError, match="a thread that feeds a worker has failed"):
        generate(engine)


def test_blocks_in_a_wrong_order_or_missing() -> None:
    model = model_of("llama")
    held = Worker()
    held.build(Plan(shape_of(model), [2], PAD, 8))
    names = [name for name, _ in model.named_parameters()]
    arrays = {name: worker.as_array(param) for name, param in model.named_parameters()}
    with pytest.raises(RuntimeError, match="block 1 of version 0"):
        held.take(0, 1, True, {names[0]: arrays[names[0]]})
    with pytest.raises(RuntimeError, match="never came"):
        held.take(0, 0, True, {name: arrays[name] for name in names[1:]})
    with pytest.raises(RuntimeError, match=r"for torch\.float32"):
        held.take(0, 0, True, arrays | {names[0]: arrays[names[0]][:1]})


def test_batches_begun_before_are_sampled_with_the_weights_of_then(make: Make) -> None:
    engine, crew, model = make(2)
    engine.load(model.named_parameters())
    ahead = [[seed + 100 * n for seed in SEEDS] for n in range(3)]
    crew.slow = {0: 0.05, 1: 0.02}
    want = []
    for n, seeds in enumerate(ahead):
        want.append(local(model, seeds))
        engine.begin(PROMPTS, SAMPLING, max_new_tokens=9, seeds=seeds)
        engine.begin(PROMPTS, SAMPLING, max_new_tokens=9, seeds=seeds)  # a second time changes nothing
        move(model, n)
        engine.load(model.named_parameters())
    crew.fails = lambda event: event[:2] == (0, "sample")  # its prompts may be asked of a worker that has moved on
    for n, seeds in enumerate(ahead):
        same(generate(engine, seeds), want[n])
        assert engine.staleness == 3 - n
    same(generate(engine), local(model))
    assert engine.staleness == 0
    assert count(engine) == 1  # old weights are gone
