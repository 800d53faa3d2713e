"""Continuous batching: refill, shared prompts, stops, mixed distributions; the scheduler's slots."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kinkajou.batch import PLAIN, Sampling
from kinkajou.engine import session as session_module
from kinkajou.engine.engine import LocalEngine
from kinkajou.engine.sampling import penalised, pick
from kinkajou.engine.scheduler import Sample, Scheduler
from kinkajou.engine.session import Session
from kinkajou.models.attention import Packed
from kinkajou.models.forward import LanguageModel
from tiny import FOUR, PAD, ours, peer, tiny_config

PROMPTS = [[5, 6, 7, 8, 9], [11], [20, 21, 22], [33, 34, 35, 36, 37, 38, 39], [41, 42]]


def model_of(name: str, **settings: Any) -> LanguageModel:
    reference = peer(AutoModelForCausalLM, tiny_config(name, **settings))
    return LanguageModel(ours(AutoModelForCausalLM, tiny_config(name, **settings), reference))


def engine_of(model: LanguageModel, **settings: Any) -> LocalEngine:
    return LocalEngine(model, **{"end_ids": [2], "pad_id": PAD, **settings})


def said(engine: LocalEngine, prompts: Sequence[Sequence[int]], sampling: Sampling = PLAIN, **settings: Any) -> Any:
    rollout = engine.generate(
        prompts, sampling, **{"max_new_tokens": 12, "seeds": range(100, 100 + len(prompts)), **settings}
    )
    return [row[mask].tolist() for row, mask in zip(rollout.tokens[:, 1:], rollout.mask, strict=True)], rollout


@pytest.mark.parametrize("name", FOUR)
def test_refilled_slots_say_what_a_sample_alone_says(name: str) -> None:
    """More samples than slots, of different lengths, so that slots are freed, moved and filled again."""
    model = model_of(name)
    prompts = [PROMPTS[i % 5] for i in range(23)]
    together, rollout = said(engine_of(model, max_rows=8, end_ids=range(2, 12)), prompts)
    assert len({len(answer) for answer in together}) > 3
    with torch.no_grad():
        logp = model(rollout.tokens, rollout.mask).logp
    assert float((logp - rollout.sampler_logp).abs().max()) < 1e-5
    for i in (0, 7, 8, 13, 22):
        alone, _ = said(engine_of(model, end_ids=range(2, 12)), [prompts[i]], seeds=[100 + i])
        assert alone[0] == together[i]


def watch_prefill(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompt tokens of each pass over prompts."""
    seen: list[int] = []
    real = Session._prefill

    def counted(self: Session, prompts: list[tuple[int, ...]], slots: list[int]) -> torch.Tensor:
        seen.append(sum(map(len, prompts)))
        return real(self, prompts, slots)

    monkeypatch.setattr(Session, "_prefill", counted)
    return seen


def test_samples_of_a_group_share_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that start later, beside one that still runs."""
    seen = watch_prefill(monkeypatch)
    model = model_of("llama")
    prompts = [prompt for prompt in PROMPTS[:2] for _ in range(8)]
    want, _ = said(engine_of(model), prompts)
    assert seen == [6]
    seen.clear()
    got, _ = said(engine_of(model, max_rows=5), prompts)
    assert got == want
    assert sum(seen) == 6
    seen.clear()
    # One slot: nobody runs who could share, so each sample reads its prompt.
    got, _ = said(engine_of(model, max_rows=1), prompts)
    assert got == want
    assert len(seen) == 16


def test_prefill_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch_prefill(monkeypatch)
    monkeypatch.setattr("kinkajou.engine.scheduler.PREFILL_TOKENS", 8)
    model = model_of("llama")
    want = [said(engine_of(model), [prompt], seeds=[100 + i])[0][0] for i, prompt in enumerate(PROMPTS)]
    seen.clear()
    got, _ = said(engine_of(model), PROMPTS)
    assert got == want
    assert seen == [6, 3, 7, 2]


def test_the_queue_fills_free_slots_once_enough_are_free() -> None:
    def sample(number: int) -> Sample:
        return Sample(number, (1, number), number, 4)

    scheduler = Scheduler(16)
    for number in range(20):
        scheduler.add(sample(number))
    scheduler.running += scheduler.admit()
    assert [x.number for x in scheduler.running] == list(range(16))
    assert not scheduler.due
    moves: list[tuple[int, int, int]] = []
    freed: list[int] = []
    scheduler.running[3].finished = "end"
    scheduler.drop_finished(lambda *move: moves.append(move), freed.append)
    assert moves == [(15, 3, 2)]
    assert freed == [3]
    assert not scheduler.due  # one of sixteen: a pass over one prompt waits for a second
    for slot in (14, 0):
        scheduler.running[slot].finished = "length"
    scheduler.drop_finished(lambda *move: moves.append(move), freed.append)
    assert [x.number for x in scheduler.running] == [13, 1, 2, 15, *range(4, 13)]
    assert freed == [3, 14, 0]
    assert scheduler.due
    scheduler.running += scheduler.admit()
    assert [x.number for x in scheduler.running[-3:]] == [16, 17, 18]
    scheduler.running[0].finished = "end"
    scheduler.drop_finished(lambda *move: None, freed.append)
    assert scheduler.due  # the queue's last one has nothing to wait for


def words(tokens: list[int]) -> str:
    return "".join(chr(ord("a") + token % 26) for token in tokens)


def test_stop_texts_end_a_sample_where_they_are_complete() -> None:
    model = model_of("llama")
    free, _ = said(engine_of(model, end_ids=[]), PROMPTS)
    stop = words(free[0])[4:6]
    got, rollout = said(engine_of(model, end_ids=[], decode=words), PROMPTS, stops=[stop, "no such text"])
    for full, answer, ended in zip(free, got, rollout.ended.tolist(), strict=True):
        at = words(full).find(stop)
        assert answer == (full if at < 0 else full[: at + 2])
        assert ended == (at >= 0)
    assert len(got[0]) <= 6
    with pytest.raises(RuntimeError, match="decoder"):
        said(engine_of(model), PROMPTS, stops=["x"])


def test_budgets_and_distributions_of_their_own() -> None:
    """Requests that differ run together and say what each says alone."""
    model = model_of("gpt2")
    kinds = [Sampling(), Sampling(0.0), Sampling(0.7, 5), Sampling(1.0, 0, 1.0, 0.2), Sampling(1.0, 0, 1.0, 0.0, 1.5)]
    engine = engine_of(model, end_ids=[])

    def request(i: int) -> Sample:
        return Sample(i, tuple(PROMPTS[i]), 50 + i, 3 + 2 * i, kinds[i])

    samples = [request(i) for i in range(5)]
    session = engine.session(samples)
    while session.busy:
        session.step()
    assert [len(sample.tokens) for sample in samples] == [3, 5, 7, 9, 11]
    assert {sample.finished for sample in samples} == {"length"}
    for i, sample in enumerate(samples):
        alone = engine.session([twin := request(i)])
        while alone.busy:
            alone.step()
        assert twin.tokens == sample.tokens
        assert twin.logps == pytest.approx(sample.logps, abs=1e-5)
    assert session.step() == []


def test_repetition_penalty_is_transformers() -> None:
    reference = peer(AutoModelForCausalLM, tiny_config("llama"))
    model = LanguageModel(ours(AutoModelForCausalLM, tiny_config("llama"), reference))
    for prompt in PROMPTS:
        sampling = Sampling(temperature=0.0, repetition_penalty=1.7)
        (got,), _ = said(engine_of(model), [prompt], sampling)
        want = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=1.7,
            eos_token_id=2,
            pad_token_id=PAD,
        )
        assert got == want[0, len(prompt) :].tolist()
    row = penalised(torch.tensor([2.0, -2.0, 3.0, 0.5]), torch.tensor([0, 1, 1]), 2.0)
    assert row.tolist() == [1.0, -4.0, 3.0, 0.5]


def test_min_p_by_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(200, 30, generator=generator)
    points = torch.rand(200, generator=generator, dtype=torch.float64)
    sampling = Sampling(temperature=0.8, top_k=12, top_p=0.9, min_p=0.3)
    tokens, logps = pick(logits, sampling, points)
    for row, point, token, logp in zip(logits.tolist(), points.tolist(), tokens.tolist(), logps.tolist(), strict=True):
        mass = {i: math.exp(x / 0.8) for i, x in enumerate(row)}
        ranked = sorted(mass, key=lambda i: -mass[i])[:12]
        total, kept, filled = sum(mass[i] for i in ranked), [], 0.0
        for i in ranked:
            if filled < 0.9 * total:
                kept.append(i)
            filled += mass[i]
        kept = sorted(i for i in kept if mass[i] >= 0.3 * mass[ranked[0]])
        whole = math.fsum(mass[i] for i in kept)
        assert token in kept
        assert logp == pytest.approx(math.log(mass[token] / whole), abs=1e-5)
        before = math.fsum(mass[i] for i in kept if i < token) / whole
        assert before - 1e-6 <= point <= before + mass[token] / whole + 1e-6


def test_a_graph_step_is_the_eager_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucketed step on fixed buffers, recorded as plain calls: rows beyond those that run change nothing."""
    from kinkajou.engine import graphs

    recorded: list[int] = []

    def record(step: Any) -> Any:
        drawn = step()
        recorded.append(len(drawn[0]))

        def replay() -> None:
            for old, new in zip(drawn, step(), strict=True):
                old.copy_(new)

        return replay, drawn

    monkeypatch.setattr(graphs, "record", record)
    model = model_of("llama")
    prompts = [PROMPTS[i % 5] for i in range(13)]
    want, _ = said(engine_of(model, max_rows=6, end_ids=range(2, 12)), prompts, Sampling(0.9, 20))
    real = Session.__init__

    def with_graphs(self: Session, *args: Any, **settings: Any) -> None:
        real(self, *args, **settings)
        self.graphs = graphs.Graphs(self._next, settings["rows"])

    monkeypatch.setattr(Session, "__init__", with_graphs)
    monkeypatch.setattr(
        Session,
        "_burst",
        lambda self, running: min(session_module.BURST, *(x.max_new_tokens - len(x.tokens) for x in running)),
    )
    got, _ = said(engine_of(model, max_rows=6, end_ids=range(2, 12)), prompts, Sampling(0.9, 20))
    assert got == want
    assert set(recorded) <= {1, 2, 4, 6}
    assert len(recorded) == len(set(recorded)) > 1
    assert graphs.buckets(6) == [1, 2, 4, 6]
    assert graphs.buckets(1) == [1]
    assert graphs.buckets(64) == [1, 2, 4, 8, 16, 32, 64]


def test_prefill_layout_writes_the_slots_it_is_told() -> None:
    from kinkajou.engine.cache import Slots
    from kinkajou.models.attention import Shape

    slots = Slots(4, 6)
    key = torch.randn(1, 2, 5, 3)
    value = torch.randn(1, 2, 5, 3)
    slots.prefill(Packed((0, 2, 5)), [3, 1]).attend(torch.randn(1, 2, 5, 3), key, value, Shape(0, 1.0))
    assert torch.equal(slots.keys[0][3, :, :2], key[0, :, :2])
    assert torch.equal(slots.values[0][1, :, :3], value[0, :, 2:])
    assert not slots.keys[0][[0, 2]].any()
    slots.move(1, 0, 3)
    assert torch.equal(slots.keys[0][0, :, :3], key[0, :, 2:])
