"""Engine and trainer agree on every token's log-probability, and a run corrects for an engine that does not."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kinkajou.batch import Rollout, Sampling
from kinkajou.engine.engine import LocalEngine
from kinkajou.models.forward import LanguageModel
from kinkajou.train import grpo, parts, policy, ppo
from rl import causal, changed, rows_of, samples, token_logps, watch
from small import Small, weights
from tiny import FOUR, naive_distribution, ours, peer, tiny_config

VOCAB = 311
SAMPLINGS = {
    "greedy": Sampling(0.0),
    "plain": Sampling(),
    "temperature 0.7": Sampling(0.7),
    "top-k 50": Sampling(1.0, 50),
    "top-p 0.9": Sampling(1.0, 0, 0.9),
    "mix": Sampling(0.7, 50, 0.9),
}
PROMPTS = [[5, 6, 7, 8, 9], [11], [20, 21, 22], [33, 34, 35, 36, 37, 38, 39], [41, 42], [250] * 12]


def rollout_of(family: str, sampling: Sampling) -> tuple[Any, LanguageModel, Rollout]:
    """Answers of up to 40 tokens to prompts of 1 to 12, by transformers' weights."""

    def form() -> Any:  # each load writes its attention into it
        return tiny_config(family, vocab_size=VOCAB, pad_token_id=310)

    reference = peer(AutoModelForCausalLM, form())
    model = LanguageModel(ours(AutoModelForCausalLM, form(), reference))
    engine = LocalEngine(model, end_ids=[2], pad_id=310, max_rows=4)
    return reference, model, engine.generate(PROMPTS, sampling, max_new_tokens=40, seeds=range(6))


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("kind", SAMPLINGS)
def test_engine_trainer_and_definition_agree(family: str, kind: str) -> None:
    """Worst token within 1e-5 nats, float32 on CPU; both against the distribution by sorting, in float64."""
    sampling = SAMPLINGS[kind]
    reference, model, rollout = rollout_of(family, sampling)
    with torch.no_grad():
        trainer = model(rollout.tokens, rollout.mask, sampling).logp
    assert int(rollout.mask.sum()) > 150
    assert float((rollout.sampler_logp - trainer)[rollout.mask].abs().max()) < 1e-5
    reference.double()
    for i in (1, 5):  # by loops over the vocabulary
        at = rollout.mask[i].nonzero().flatten().tolist()
        with torch.no_grad():
            logits = reference(rollout.tokens[i : i + 1, : at[-1] + 1]).logits[0]
        for j in at[:: max(1, len(at) // 8)]:
            chances = naive_distribution(
                logits[j].tolist(), temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
            )
            said = int(rollout.tokens[i, j + 1])
            assert float(trainer[i, j]) == pytest.approx(math.log(chances[said]), abs=2e-5)
            assert sampling.temperature or chances[said] == max(chances)


ONE_MOVE = {"steps": 1, "epochs": 1, "max_norm": 1e9, "lr": 1e-3, "warmup": 0.0, "save_every": 1}


class Late(LocalEngine):
    """Takes no weights before the first step is over."""

    begun = False

    def load(self, params: Any) -> None:
        if self.begun:
            super().load(params)
        self.begun = True


def stale(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """The engine samples from a copy of the policy whose weights are off by noise, as quantised or late ones are."""

    def perturbed(cfg: Any, language: LanguageModel, form: Any, s: Any) -> LocalEngine:
        module = AutoModelForCausalLM.from_pretrained(cfg.base.model, attn_implementation="kinkajou")
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for param in module.parameters():
                param.add_(size * param.abs().mean() * torch.randn(param.shape, generator=noise))
        return Late(LanguageModel(module.eval()), end_ids=form.end_ids, pad_id=form.pad_id)

    monkeypatch.setattr(parts, "make_engine", perturbed)


def naive_weights(logp: list[float], sampler: list[float], how: str, cap: float) -> list[float]:
    ratios = [math.exp(new - old) for new, old in zip(logp, sampler, strict=True)]
    if how == "truncate":
        return [min(cap, r) for r in ratios]
    if how == "mask":
        return [r if 1 / cap <= r <= cap else 0.0 for r in ratios]
    if how == "sequence_mask":
        whole = math.exp(sum(logp) - sum(sampler))
        return [whole if whole <= cap else 0.0] * len(logp)
    return [1.0] * len(logp)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
@pytest.mark.parametrize("how", ["truncate", "mask", "sequence_mask", "none"])
def test_a_stale_engine_is_corrected(
    stage: str, how: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gap is that of transformers' log-probabilities; weights are the importance ratios; so is the gradient."""
    stale(monkeypatch, 0.15)
    seen = watch(monkeypatch, ppo if stage == "ppo" else grpo)
    rows = {"minibatch_size": 8} if stage == "ppo" else {"minibatch_size": 16, "aggregation": "token_mean"}
    cap = {} if how == "none" else {"correction_cap": 1.3}
    changes = {**ONE_MOVE, **rows, **cap, "rollout_correction": how, "kl_coef": 0.0}
    row = small.run(stage, tmp_path / "run", **changes)[0]
    rollout, batch = seen.steps[0].sampled.rollout, seen.steps[0].batch
    module = causal(small.policy)
    with torch.no_grad():
        logp = [x.tolist() for x in token_logps(module, rollout.tokens, rollout.mask)]
    sampler = rows_of(rollout.sampler_logp, rollout.mask)
    gaps = [abs(a - b) for pair in zip(logp, sampler, strict=True) for a, b in zip(*pair, strict=True)]
    assert row["engine_gap_max"] == pytest.approx(max(gaps), abs=1e-4)
    assert row["engine_gap"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)
    assert max(gaps) > 0.3
    want = [naive_weights(*pair, how, 1.3) for pair in zip(logp, sampler, strict=True)]
    got = rows_of(batch.correction, batch.mask)
    for one, other in zip(got, want, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    flat = [x for weights_ in want for x in weights_]
    assert (how == "none") == (set(flat) == {1.0})
    assert how == "none" or max(flat) <= 1.3
    assert how != "mask" or 0.0 in flat
    move = seen.of_policy()[0]
    terms = [
        -(new - new.detach()).exp() * gain.double() * weight.double()
        for new, gain, weight in zip(
            token_logps(module, move.batch.tokens, move.batch.mask),
            (x[m] for x, m in zip(move.batch.advantages, move.batch.mask, strict=True)),
            (x[m] for x, m in zip(move.batch.correction, move.batch.mask, strict=True)),
            strict=True,
        )
    ]
    loss = torch.cat(terms).mean()
    module.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in module.parameters() if p.grad is not None))
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_a_small_gap_is_left_alone(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the bound the run is, to the bit, that without correction; beyond it, it is not."""
    stale(monkeypatch, 0.01)
    changes, cap = {**ONE_MOVE, "steps": 2}, {"correction_cap": 1.0001}
    none = small.run("grpo", tmp_path / "none", **changes, rollout_correction="none")
    worst = max(row["engine_gap_max"] for row in none)
    assert worst > 1e-4
    small.run("grpo", tmp_path / "below", **changes, **cap, correction_bound=worst * 1.01)
    small.run("grpo", tmp_path / "beyond", **changes, **cap, correction_bound=worst * 0.2)
    assert not changed(weights(tmp_path / "none", 2), weights(tmp_path / "below", 2))
    assert changed(weights(tmp_path / "none", 2), weights(tmp_path / "beyond", 2))


def test_the_engine_of_a_run_is_the_trainer(small: Small, tmp_path: Path) -> None:
    """Nothing to correct in a run as users start it: the same weights, step after step."""
    row_of = {"steps": 3, "lr": 1e-2, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "sample_every": 3}
    for stage in ("ppo", "grpo"):
        for how in ("auto", "trainer"):
            rows = small.run(stage, tmp_path / stage / how, **row_of, max_new_tokens=30, old_logp=how)
            for row in rows:
                assert row["engine_gap"] < 1e-5
                assert row["first_ratio"] == pytest.approx(1, abs=1e-5)
            asked = [row["engine_gap_max"] < 1e-5 for row in rows if "engine_gap_max" in row]
            assert asked == [True] * (1 if how == "auto" else 3)
            assert samples(tmp_path / stage / how)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_the_engines_log_probabilities_save_a_pass(
    stage: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are asked for in the first step and every tenth after it, and the run is the one that always asks."""
    asked: list[int] = []
    real = policy.in_parts
    monkeypatch.setattr(policy, "in_parts", lambda *args: asked.append(1) or real(*args))
    settings = {"steps": 12, "lr": 1e-3, "warmup": 0.0, "save_every": 12}
    rows = small.run(stage, tmp_path / "auto", **settings)
    assert len(asked) == 2
    assert [i for i, row in enumerate(rows) if "engine_gap_max" in row] == [0, 10]
    small.run(stage, tmp_path / "trainer", **settings, old_logp="trainer")
    assert len(asked) == 2 + 12
    small.run(stage, tmp_path / "engine", **settings, old_logp="engine")
    assert len(asked) == 2 + 12
    want = weights(tmp_path / "trainer", 12)
    for how in ("auto", "engine"):
        for name, x in weights(tmp_path / how, 12).items():
            torch.testing.assert_close(x, want[name], atol=2e-5, rtol=0)


def test_an_engine_that_differs_is_not_believed(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale(monkeypatch, 0.15)
    rows = small.run("grpo", tmp_path / "run", steps=3)
    assert rows[0]["engine_gap_max"] > 1e-3
    assert rows[1]["engine_gap_max"] < 1e-5  # asked again; it has taken the policy's weights after the first step
    assert "engine_gap_max" not in rows[2]
