"""Cached decoding against the packed forward and transformers' generate; text that depends on its own seed only."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kinkajou.batch import Rollout, Sampling
from kinkajou.engine.engine import LocalEngine
from kinkajou.models.forward import LanguageModel
from tiny import FAMILIES, FOUR, PAD, ours, peer, tiny_config

PROMPTS = [[5, 6, 7, 8, 9], [11], [20, 21, 22], [33, 34, 35, 36, 37, 38, 39], [41, 42]]
SEEDS = [101, 202, 303, 404, 505]
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "plain": Sampling(),
    "cold": Sampling(0.7),
    "top-k": Sampling(1.0, 5),
    "top-p": Sampling(1.0, 0, 0.8),
    "mix": Sampling(1.3, 20, 0.9),
}


def model_of(name: str) -> tuple[nn.Module, LanguageModel]:
    reference = peer(AutoModelForCausalLM, tiny_config(name))
    return reference, LanguageModel(ours(AutoModelForCausalLM, tiny_config(name), reference))


def engine_of(model: LanguageModel, *, end_ids: Sequence[int] = (2,), max_rows: int = 64) -> LocalEngine:
    return LocalEngine(model, end_ids=end_ids, pad_id=PAD, max_rows=max_rows)


def answers(rollout: Rollout) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(rollout.tokens[:, 1:], rollout.mask, strict=True)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", SAMPLINGS)
def test_engine_logp_is_the_trainers(name: str, kind: str) -> None:
    """Contract, item 9: log-probabilities are of the distribution that was sampled."""
    _, model = model_of(name)
    sampling = SAMPLINGS[kind]
    rollout = engine_of(model).generate(PROMPTS, sampling, max_new_tokens=12, seeds=SEEDS)
    with torch.no_grad():
        scored = model(rollout.tokens, rollout.mask, sampling)
    assert int(rollout.mask.sum()) > 30
    torch.testing.assert_close(rollout.sampler_logp, scored.logp, atol=1e-5, rtol=0)
    assert torch.isfinite(rollout.sampler_logp).all()
    for prompt, row, mask in zip(PROMPTS, rollout.tokens.tolist(), rollout.mask.tolist(), strict=True):
        assert row[: len(prompt)] == prompt
        assert not any(mask[: len(prompt) - 1])
        assert mask[len(prompt) - 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_transformers_generate(name: str) -> None:
    reference, model = model_of(name)
    got = answers(
        engine_of(model, end_ids=[2, 17]).generate(PROMPTS, SAMPLINGS["greedy"], max_new_tokens=12, seeds=SEEDS)
    )
    for prompt, answer in zip(PROMPTS, got, strict=True):
        want = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=[2, 17],
            pad_token_id=PAD,
        )
        assert answer == want[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", FOUR)
def test_a_sample_depends_on_its_own_seed_only(name: str) -> None:
    _, model = model_of(name)
    sampling = SAMPLINGS["mix"]
    together = answers(engine_of(model).generate(PROMPTS, sampling, max_new_tokens=10, seeds=SEEDS))
    assert len({tuple(a) for a in together}) == len(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = engine_of(model).generate([prompt], sampling, max_new_tokens=10, seeds=[SEEDS[i]])
        assert answers(alone) == [together[i]]
    for max_rows in (1, 2, 3):
        order = [3, 0, 4, 2, 1]
        moved = engine_of(model, max_rows=max_rows).generate(
            [PROMPTS[i] for i in order], sampling, max_new_tokens=10, seeds=[SEEDS[i] for i in order]
        )
        assert answers(moved) == [together[i] for i in order]
        assert [int(n) for n in moved.mask.sum(1)] == [len(together[i]) for i in order]
    torch.manual_seed(1)
    again = answers(engine_of(model).generate(PROMPTS, sampling, max_new_tokens=10, seeds=SEEDS))
    assert again == together
    others = answers(engine_of(model).generate(PROMPTS, sampling, max_new_tokens=10, seeds=[s + 1 for s in SEEDS]))
    assert all(a != b for a, b in zip(others, together, strict=True))


def test_same_prompt_different_seeds_says_different_things() -> None:
    """Contract, item 10: every rank generated the same samples."""
    _, model = model_of("llama")
    got = answers(engine_of(model).generate([[5, 6]] * 6, Sampling(), max_new_tokens=10, seeds=range(6)))
    assert len({tuple(answer) for answer in got}) == 6


def test_stops_at_any_end_token_and_says_so() -> None:
    _, model = model_of("llama")
    free = engine_of(model, end_ids=[]).generate(PROMPTS, Sampling(), max_new_tokens=12, seeds=SEEDS)
    assert all(len(answer) == 12 for answer in answers(free))
    assert not free.ended.any()
    # Make ends of two tokens that were in fact drawn, one early and one late.
    ends = {answers(free)[0][2], answers(free)[3][8]}
    got = engine_of(model, end_ids=ends).generate(PROMPTS, Sampling(), max_new_tokens=12, seeds=SEEDS)
    stopped = 0
    for full, answer, ended in zip(answers(free), answers(got), got.ended.tolist(), strict=True):
        places = [i for i, token in enumerate(full) if token in ends]
        assert answer == (full[: places[0] + 1] if places else full)
        assert ended == bool(places)
        stopped += ended
    assert stopped >= 2
    kept = [row[mask] for row, mask in zip(got.sampler_logp, got.mask, strict=True)]
    full = [row[mask] for row, mask in zip(free.sampler_logp, free.mask, strict=True)]
    for ours_, theirs in zip(kept, full, strict=True):
        torch.testing.assert_close(ours_, theirs[: len(ours_)], atol=2e-5, rtol=0)
    assert not got.sampler_logp[~got.mask].any()


def test_an_end_token_at_the_last_place_counts_as_ended() -> None:
    _, model = model_of("llama")
    free = answers(engine_of(model, end_ids=[]).generate([PROMPTS[0]], Sampling(), max_new_tokens=4, seeds=[7]))[0]
    assert free[3] not in free[:3]
    got = engine_of(model, end_ids=[free[3]]).generate([PROMPTS[0]], Sampling(), max_new_tokens=4, seeds=[7])
    assert answers(got) == [free]
    assert got.ended.tolist() == [True]


def test_an_end_token_in_the_prompt_stops_nothing() -> None:
    _, model = model_of("llama")
    got = engine_of(model, end_ids=[8]).generate([[5, 8, 6]], Sampling(), max_new_tokens=3, seeds=[1])
    assert len(answers(got)[0]) >= 1
    assert int(got.mask[0, :2].sum()) == 0


def test_generation_leaves_no_trace_while_training() -> None:
    """Checkpointed layers in training mode decode the same, and no gradient is recorded."""
    _, model = model_of("bloom")
    want = engine_of(model).generate(PROMPTS, SAMPLINGS["mix"], max_new_tokens=6, seeds=SEEDS)
    inner = model.inner
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable()
    model.train()
    got = engine_of(model).generate(PROMPTS, SAMPLINGS["mix"], max_new_tokens=6, seeds=SEEDS)
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.sampler_logp, want.sampler_logp)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_engine_is_near_the_trainer(name: str) -> None:
    _, model = model_of(name)
    model.dtype = "bf16"
    rollout = engine_of(model).generate(PROMPTS, Sampling(), max_new_tokens=10, seeds=SEEDS)
    with torch.no_grad():
        scored = model(rollout.tokens, rollout.mask)
    assert (rollout.sampler_logp - scored.logp)[rollout.mask].abs().mean() < 0.05
    assert rollout.sampler_logp.dtype == torch.float32


def test_load_takes_weights_by_name() -> None:
    _, model = model_of("llama")
    other = LanguageModel(peer(AutoModelForCausalLM, tiny_config("llama"), seed=9))
    engine = engine_of(model)
    before = engine.generate(PROMPTS, SAMPLINGS["greedy"], max_new_tokens=5, seeds=SEEDS)
    engine.load(other.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    after = engine.generate(PROMPTS, SAMPLINGS["greedy"], max_new_tokens=5, seeds=SEEDS)
    assert answers(before) != answers(after)
