"""What a server asks of a session: samples that leave, bits that do not depend on the company, other likely tokens."""

import random
from contextlib import nullcontext

import pytest
import torch
from test_session import PROMPTS, engine_of, model_of

from kinkajou.batch import Sampling
from kinkajou.engine import session as session_module
from kinkajou.engine.scheduler import Sample
from kinkajou.engine.session import Said, Session
from kinkajou.models import quantised
from kinkajou.models.attention import Packed
from kinkajou.models.forward import LanguageModel
from tiny import FOUR

GREEDY = Sampling(temperature=0.0)


def sample_of(i: int, *, budget: int = 12, likeliest: int | None = None) -> Sample:
    """Sample i asks for the same whenever it is made."""
    dice = random.Random(i)
    prompt = tuple(dice.randrange(3, 90) for _ in range(dice.randrange(1, 24)))
    sampling = (GREEDY, Sampling(), Sampling(0.7, top_k=9), GREEDY)[i % 4]
    return Sample(i, prompt, i, dice.randrange(2, budget), sampling, likeliest=likeliest)


def alone(session: Session, count: int) -> list[Sample]:
    found = [sample_of(i) for i in range(count)]
    for sample in found:
        session.add(sample)
        while session.busy:
            session.step()
    return found


def in_company(session: Session, count: int, seed: int) -> list[Sample]:
    """The samples in any order, arriving at any step; every fifth has a twin that is dropped on its way."""
    dice = random.Random(seed)
    todo = list(range(count))
    dice.shuffle(todo)
    found, twins = {}, []
    while todo or session.busy:
        for _ in range(min(len(todo), dice.choice([0, 0, 1, 2, 5]))):
            i = todo.pop()
            found[i] = sample_of(i)
            session.add(found[i])
            if i % 5 == 0:
                twins.append(sample_of(i + 1000))
                session.add(twins[-1])
        session.step()
        if twins and dice.random() < 0.5:
            session.drop(twins.pop())
    return [found[i] for i in range(count)]


@pytest.mark.parametrize("layers", ["packed", "plain", "int8", "nf4"])
@pytest.mark.parametrize("name", FOUR)
def test_a_steady_sample_has_the_same_bits_in_any_company(
    name: str, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plain`: as where the weights cannot be laid out anew, because there are too many of them say."""
    model = model_of(name)
    if layers == "plain":
        monkeypatch.setattr(session_module.Repacked, "in_place", lambda self: nullcontext())
    elif layers != "packed":
        quantised.quantise(model.module, 8 if layers == "int8" else 4)
    session = engine_of(model).session([], rows=6, room=48, steady=True)
    by_itself = alone(session, 20)
    assert len({len(sample.tokens) for sample in by_itself}) > 3
    for seed in range(2):
        together = in_company(session, 20, seed)
        for one, other in zip(by_itself, together, strict=True):
            assert other.tokens == one.tokens
            assert other.logps == one.logps
    if layers == "packed":
        told = torch.tensor(by_itself[0].logps)
        assert float((told - whole_logps(model, by_itself[0])).abs().max()) < 1e-4


def whole_logps(model: LanguageModel, sample: Sample) -> torch.Tensor:
    """Of the sample's tokens, by one pass over prompt and answer.  (n,)."""
    ids = torch.tensor([[*sample.prompt, *sample.tokens]])
    with torch.no_grad():
        hidden = model.hidden(ids, torch.arange(ids.shape[1])[None], Packed((0, ids.shape[1])))
        logps = model.logits(hidden).log_softmax(-1)
    start = len(sample.prompt) - 1
    return logps[range(start, start + len(sample.tokens)), sample.tokens]


def test_a_dropped_sample_leaves_its_slot_before_the_next_step_and_the_others_unchanged() -> None:
    session = engine_of(model_of("llama")).session([], rows=2, room=48)
    by_itself = alone(session, 4)
    first, second, third, fourth = (sample_of(i) for i in range(4))
    for sample in (first, second, third, fourth):
        session.add(sample)
    session.step()
    assert session.scheduler.running == [first, second]
    session.drop(first)
    session.drop(third)
    assert session.scheduler.running == [second]
    assert list(session.scheduler.waiting) == [fourth]
    session.drop(first)
    while session.busy:
        session.step()
    assert (second.tokens, fourth.tokens) == (by_itself[1].tokens, by_itself[3].tokens)
    assert (first.finished, third.finished, len(first.tokens)) == ("dropped", "dropped", 1)


def test_nothing_is_kept_of_samples_that_have_gone() -> None:
    session = engine_of(model_of("llama")).session([], rows=2, room=48, steady=True)
    in_company(session, 30, 3)
    group = [Sample(i, (5, 6, 7), i, 4) for i in range(6)]  # some wait for the first token of their prompt
    for sample in group:
        session.add(sample)
    session.step()
    assert session._first
    for sample in group:
        session.drop(sample)
    assert not session.busy
    assert not session._first
    assert not session.scheduler.wanted


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.5, top_k=2), Sampling(2.0)])
def test_likely_tokens_are_those_of_the_model_itself(sampling: Sampling) -> None:
    """Before temperature and cuts; against a pass over the whole text.  Those who do not ask hear nothing."""
    model = model_of("gpt2")
    session = engine_of(model, end_ids=[]).session([], rows=4, room=48)
    asks = [None, 0, 3, 200]
    samples = [Sample(i, tuple(PROMPTS[i]), i, 5, sampling, likeliest=k) for i, k in enumerate(asks)]
    for sample in samples:
        session.add(sample)
    words: list[Said] = []
    while session.busy:
        words += session.step()
    for sample, asked in zip(samples, asks, strict=True):
        own = [word for word in words if word.sample is sample]
        assert len(own) == 5
        if asked is None:
            assert all(word.own != word.own for word in own)
            continue
        torch.testing.assert_close(torch.tensor([x.own for x in own]), whole_logps(model, sample), atol=1e-4, rtol=0)
        for word in own:
            assert len(word.likeliest) == min(asked, 97)
            assert [logp for _, logp in word.likeliest] == sorted((x for _, x in word.likeliest), reverse=True)
            if asked == 200:
                assert sum(2.718281828**logp for _, logp in word.likeliest) == pytest.approx(1, abs=1e-4)
