"""Every option of PPO does what its help says, by transformers alone, by float64 loops and by what a run wrote."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kinkajou.errors import UserError
from kinkajou.train import ppo
from rl import (
    Move,
    Step,
    Watch,
    causal,
    changed,
    close,
    ending,
    naive_gae,
    naive_kl,
    naive_whiten,
    rows_of,
    same_gradient,
    samples,
    scalar,
    token_logps,
    token_values,
    watch,
)
from small import Small, weights

ONE_MOVE = {"steps": 2, "epochs": 1, "minibatch_size": 8, "lr": 3e-3, "max_norm": 1e9, "warmup": 0.0}
# The conventions, retyped from what is known of each system (docs/numerics.md).
PLAIN: dict[str, Any] = {
    **{"kl": "k1", "clamp": 0.0, "score_clip": 0.0, "lam": 0.95, "gamma": 1.0, "unbiased": False, "whiten": True},
    **{"after_last": False, "bandit": False, "temperature": 1.0, "top_k": 0, "lam_critic": None, "rewards": False},
    **{"low": 0.2, "high": 0.2, "dual": 0.0, "by_sample": False, "in_loss": False},
}
DIALECTS: dict[str, dict[str, Any]] = {
    "kinkajou": {},
    "trl-1.12": {"after_last": True, "unbiased": True, "temperature": 0.7},
    "openrlhf-0.11": {"clamp": 10.0, "score_clip": 10.0, "lam": 1.0},
    "verl-2026.01": {"unbiased": True, "lam": 1.0, "dual": 3.0},
    "deepspeed-chat": {"score_clip": 5.0, "whiten": False},
    "coati-2023": {"kl": "k3", "bandit": True, "whiten": False, "top_k": 50, "by_sample": True},
}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "score_clip": ({"score_clip": 0.3}, {"score_clip": 0.3}),
    "whiten_rewards": ({"whiten_rewards": True}, {"rewards": True}),
    "lam_critic": ({"lam": 0.5, "lam_critic": 1.0}, {"lam": 0.5, "lam_critic": 1.0}),
    "bandit": ({"advantage": "bandit"}, {"bandit": True}),
    "after_last": ({"score_at": "after_last"}, {"after_last": True}),
    "gamma": ({"gamma": 0.7}, {"gamma": 0.7}),
    "k3": ({"kl_estimator": "k3"}, {"kl": "k3"}),
    "kl_clamp": ({"kl_estimator": "abs", "kl_clamp": 0.01}, {"kl": "abs", "clamp": 0.01}),
    "unbiased": ({"whiten_variance": "unbiased"}, {"unbiased": True}),
    "kl_in loss": ({"kl_in": "loss", "kl_estimator": "k2"}, {"kl": "k2", "in_loss": True}),
    "sample mean": ({"aggregation": "sequence_mean"}, {"by_sample": True}),
}
CASES = {f"dialect {name}": ({"dialect": name}, how) for name, how in DIALECTS.items()} | OPTIONS


def expected(step: Step, small: Small, policy: str, how: dict[str, Any]) -> tuple[Any, ...]:
    """Log-probabilities, values, rewards, advantages and returns of a step, from its tokens and scores alone."""
    tokens, mask = step.sampled.rollout.tokens, step.sampled.rollout.mask
    drawn = {"temperature": how["temperature"], "top_k": how["top_k"]}
    with torch.no_grad():
        logp, ref = (
            [row.tolist() for row in token_logps(module, tokens, mask, **drawn)]
            for module in (causal(policy, step.policy), causal(policy))
        )
    beyond = 8 if how["after_last"] else 0
    values = token_values(scalar(small.judge, step.critic), tokens, mask, beyond=beyond)
    coefficient = 0.0 if how["in_loss"] else step.coefficient
    pairs = [list(zip(*rows, strict=True)) for rows in zip(logp, ref, strict=True)]
    kl = [[naive_kl(a, b, how["kl"], clamp=how["clamp"]) for a, b in row] for row in pairs]
    limit = how["score_clip"] or 1e9
    scores = [max(-limit, min(limit, x)) for x in step.sampled.rollout.scores.tolist()]
    if how["bandit"]:
        whole = [score - coefficient * sum(row) / len(row) for score, row in zip(scores, kl, strict=True)]
        raw = [[r - v[0]] * len(row) for r, v, row in zip(whole, values, kl, strict=True)]
        raw = naive_whiten(raw, unbiased=how["unbiased"]) if how["whiten"] else raw
        return logp, [v[:1] for v in values], whole, raw, [[r] for r in whole]
    rewards = [[-coefficient * x for x in row] + [0.0] * (len(v) - len(row)) for row, v in zip(kl, values, strict=True)]
    for row, score in zip(rewards, scores, strict=True):
        row[-1] += score
    if how["rewards"]:
        rewards = naive_whiten(rewards, unbiased=how["unbiased"], mean_kept=True)
    both = list(zip(rewards, values, strict=True))
    slower = how["lam"] if how["lam_critic"] is None else how["lam_critic"]
    full, slow = ([naive_gae(r, v, gamma=how["gamma"], lam=lam) for r, v in both] for lam in (how["lam"], slower))
    returns = [[a + x for a, x in zip(*row, strict=True)] for row in zip(slow, values, strict=True)]
    advantages = [row[: len(own)] for row, own in zip(full, logp, strict=True)]
    if how["whiten"]:
        advantages = naive_whiten(advantages, unbiased=how["unbiased"])
    return logp, values, [sum(row) for row in rewards], advantages, returns


def naive_loss(module: Any, move: Move, how: dict[str, Any], *, coefficient: float = 0.0) -> torch.Tensor:
    """PPO's clipped objective over the rows of a move, with gradient through transformers' model."""
    b, drawn = move.batch, {"temperature": how["temperature"], "top_k": how["top_k"]}
    rows, tokens = [], 0
    columns = (b.old_logp, b.ref_logp, b.advantages)
    old, ref, gain = ([x[m].double() for x, m in zip(column, b.mask, strict=True)] for column in columns)
    for i, logp in enumerate(token_logps(module, b.tokens, b.mask, **drawn)):
        ratio = (logp - old[i]).exp()
        near = ratio.clamp(1 - how["low"], 1 + how["high"])
        gained = torch.minimum(ratio * gain[i], near * gain[i])
        if how["dual"]:
            gained = torch.where(gain[i] < 0, torch.maximum(gained, how["dual"] * gain[i]), gained)
        loss = -gained
        if coefficient:
            loss = loss + coefficient * 0.5 * (logp - ref[i]) ** 2
        rows.append(loss)
        tokens += len(logp)
    if how["by_sample"]:
        return torch.stack([row.mean() for row in rows]).mean()
    return torch.cat(rows).sum() / tokens


@pytest.mark.parametrize("case", CASES)
def test_a_step_from_outside(case: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of the second step, where policy and critic have moved: what the update reads, and its gradient."""
    changes, own = CASES[case]
    how, policy, seen = PLAIN | own, ending(small), watch(monkeypatch, ppo)
    setting = {"dialect": "kinkajou", "kl_coef": 0.3, "model": policy, **ONE_MOVE, **changes}
    rows = small.run("ppo", tmp_path / "run", reward=f"12*{small.judge}", **setting)
    step, batch, move = seen.steps[1], seen.steps[1].batch, seen.of_policy()[1]
    logp, values, rewards, advantages, returns = expected(step, small, policy, how)
    assert step.coefficient == 0.3
    assert len({len(row) for row in logp}) > 2
    close(rows_of(batch.old_logp, batch.mask), logp)
    close(rows_of(batch.old_values, batch.value_mask), values)
    close(rows_of(batch.advantages, batch.mask), advantages, 5e-4)
    close(rows_of(batch.returns, batch.value_mask), returns, 5e-4)
    if not how["rewards"]:
        assert rows[1]["reward"] == pytest.approx(sum(rewards) / 8, abs=1e-3)
    module = causal(policy, step.policy)
    loss = naive_loss(module, move, how, coefficient=0.3 if how["in_loss"] else 0.0)
    assert move.found["policy_loss"] == pytest.approx(loss.item(), abs=1e-4)
    same_gradient(move, module, loss)
    assert [row["first_ratio"] for row in rows] == pytest.approx([1, 1], abs=1e-5)
    assert all(value is not None for name, value in rows[1].items() if name != "explained_variance")


CLIPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": ({"clip": 0.1}, {"low": 0.1, "high": 0.1}),
    "clip_high": ({"clip": 0.02, "clip_high": 0.6}, {"low": 0.02, "high": 0.6}),
    "dual_clip": ({"dual_clip": 1.05}, {"dual": 1.05}),
}


@pytest.mark.parametrize("case", CLIPS)
def test_clips_of_a_policy_that_moved(case: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second minibatch on the ratio is not 1, and each bound cuts where it says."""
    changes, own = CLIPS[case]
    how, seen = PLAIN | own, watch(monkeypatch, ppo)
    small.run("ppo", tmp_path / "run", **{**ONE_MOVE, "steps": 1, "epochs": 3, "lr": 1e-2}, **changes)
    move = seen.of_policy()[2]
    module = causal(small.policy, move.before)
    loss = naive_loss(module, move, how)
    assert abs(naive_loss(module, move, PLAIN).item() - loss.item()) > 1e-3  # the bound matters here
    assert move.found["policy_loss"] == pytest.approx(loss.item(), abs=1e-4)
    same_gradient(move, module, loss)
    with torch.no_grad():
        logp = token_logps(module, move.batch.tokens, move.batch.mask)
    old, gains = (rows_of(x, move.batch.mask) for x in (move.batch.old_logp, move.batch.advantages))
    ratios = [
        (math.exp(new - before), gain)
        for row in zip((x.tolist() for x in logp), old, gains, strict=True)
        for new, before, gain in zip(*row, strict=True)
    ]
    worst = how["dual"] or math.inf
    cut = [r > 1 + how["high"] if gain > 0 else gain < 0 and not 1 - how["low"] <= r <= worst for r, gain in ratios]
    assert move.found["clip_frac"] == pytest.approx(sum(cut) / len(cut), abs=1e-6)
    assert move.found["ratio"] == pytest.approx(sum(r for r, _ in ratios) / len(ratios), abs=1e-4)


def test_the_critic_is_clipped(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half squared error, the worse of plain and bounded move, over the tokens of the minibatch."""
    seen = watch(monkeypatch, ppo)
    changes = {**ONE_MOVE, "steps": 1, "epochs": 3, "value_clip": 0.05, "critic_lr": 2e-2}
    row = small.run("ppo", tmp_path / "run", **changes)[0]
    moves = [move for move in seen.moves if move.names == ["value_loss"]]
    assert len(moves) == 3
    b, module = moves[2].batch, scalar(small.judge, moves[2].before)
    terms = [
        0.5 * max((v - r) ** 2, (o + max(-0.05, min(0.05, v - o)) - r) ** 2)
        for row in zip(
            token_values(module, b.tokens, b.mask),
            rows_of(b.old_values, b.mask),
            rows_of(b.returns, b.mask),
            strict=True,
        )
        for v, o, r in zip(*row, strict=True)
    ]
    assert moves[2].found["value_loss"] == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert moves[2].found["value_clip_frac"] > 0
    assert row["critic_lr"] == pytest.approx(2e-2)


def test_adaptive_kl_follows_its_formula(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ziegler 2019, over the logged KL; saved with the checkpoint, and a further run goes on from there."""
    adaptive = {"kl_target": 0.1, "kl_horizon": 40.0, "kl_coef": 0.2}
    rows = small.run("ppo", tmp_path / "one", **adaptive, steps=4, lr=3e-3, save_every=2)
    coefficient = 0.2
    for row in rows:
        assert row["kl_coef"] == pytest.approx(coefficient, rel=1e-9)
        if row["step"] == 3:
            assert kept(tmp_path / "one", 2) == pytest.approx(coefficient, rel=1e-9)
        coefficient *= 1 + max(-0.2, min(0.2, row["kl_ref"] / 0.1 - 1)) * 8 / 40
    assert kept(tmp_path / "one", 4) == pytest.approx(coefficient, rel=1e-9)
    assert len({row["kl_coef"] for row in rows}) == 4
    capsys.readouterr()
    further = small.run("ppo", tmp_path / "two", model=str(tmp_path / "one"), **adaptive, steps=1)
    assert further[0]["kl_coef"] == pytest.approx(coefficient, rel=1e-9)
    assert f"kl_coef: {coefficient:.4g}" in capsys.readouterr().out
    assert abs(further[0]["kl_ref"]) > 1e-2  # still to the reference of the first run, by which it was measured
    fixed = small.run("ppo", tmp_path / "three", model=str(tmp_path / "one"), kl_coef=0.2, steps=1)
    assert fixed[0]["kl_coef"] == 0.2
    assert "adaptive KL" not in capsys.readouterr().out


def test_adaptive_kl_needs_a_start(small: Small, tmp_path: Path) -> None:
    """A coefficient of 0 stays 0 whatever it is multiplied by."""
    with pytest.raises(UserError, match="adaptive KL"):
        small.settings("ppo", tmp_path / "run", kl_target=1.0, kl_coef=0.0)


def kept(run: Path, step: int) -> float:
    state = json.loads((run / "checkpoints" / f"step-{step:06d}" / "state" / "run.json").read_text())
    return float(state["numbers"]["rl"]["kl_coef"])


@pytest.mark.parametrize("lora", [0, 2])
def test_the_moving_average(lora: int, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """average = 0.9 x average + 0.1 x weights after each optimiser step; saved as a model of its own."""
    seen = watch(monkeypatch, ppo)
    small.run("ppo", tmp_path / "run", steps=2, epochs=1, lr=1e-2, ema_decay=0.9, lora_rank=lora, save_every=1)
    folder = tmp_path / "run" / "checkpoints" / "step-000002" / "ema"
    average = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    last, source = weights(tmp_path / "run", 2), load_file(Path(small.policy) / "model.safetensors")
    assert changed(source, average)
    assert changed(last, average)
    if lora:  # of the adapters, then folded in: a product of averages, which no loop over full weights gives
        return
    want = {name: tensor.double() for name, tensor in source.items()}
    moves = [move.before for move in seen.of_policy()][1:]
    assert len(moves) == 3
    for state in [*moves, last]:
        want = {name: 0.9 * tensor + 0.1 * state[name].double() for name, tensor in want.items()}
    for name, tensor in want.items():
        torch.testing.assert_close(average[name].double(), tensor, atol=1e-6, rtol=0)
    reached = tmp_path / "run" / "checkpoints" / "step-000001"
    assert not changed(weights(tmp_path / "run", 1), load_file(reached / "model.safetensors"))


def test_the_average_changes_nothing(small: Small, tmp_path: Path) -> None:
    small.run("ppo", tmp_path / "with", steps=2, ema_decay=0.9, save_every=1)
    small.run("ppo", tmp_path / "without", steps=2, save_every=1)
    assert not changed(weights(tmp_path / "with", 2), weights(tmp_path / "without", 2))


def test_critic_warmup(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps in which the policy stands still and the critic learns, then both."""
    seen = watch(monkeypatch, ppo)
    changes = {"steps": 3, "critic_warmup": 2, "save_every": 1, "critic_lr": 1e-2}
    rows = small.run("ppo", tmp_path / "run", **changes)
    source = load_file(Path(small.policy) / "model.safetensors")
    assert not changed(source, weights(tmp_path / "run", 1))
    assert not changed(source, weights(tmp_path / "run", 2))
    assert changed(source, weights(tmp_path / "run", 3))
    assert changed(seen.steps[0].critic, seen.steps[1].critic)
    assert changed(seen.steps[1].critic, seen.steps[2].critic)
    assert [("policy_loss" in row, "value_loss" in row) for row in rows] == [(False, True), (False, True), (True, True)]
    assert rows[1]["kl_ref"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["first_ratio"] == pytest.approx(1, abs=1e-5)


def test_an_update_ends_by_kl(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops after the first minibatch beyond the bound: that one is still made, no further one."""
    seen = watch(monkeypatch, ppo)
    changes = {"steps": 1, "epochs": 6, "lr": 1e-2, "warmup": 0.0}
    free = small.run("ppo", tmp_path / "free", **changes)[0]
    moved = [move.found["kl_old"] for move in seen.of_policy()]
    assert free["updates"] == 12
    bound = moved[5] * 0.999
    first = next(i for i, kl in enumerate(moved) if kl > bound)
    seen.moves.clear()
    row = small.run("ppo", tmp_path / "run", **changes, stop_kl=bound)[0]
    again = [move.found["kl_old"] for move in seen.of_policy()]
    assert row["updates"] == len(again) == first + 1 < 12
    assert again == moved[: first + 1]


def shared_values(module: Any, head: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for row, counts in zip(tokens, mask, strict=True):
        at = counts.nonzero().flatten()
        hidden = module(row[None, : int(at[-1]) + 1], output_hidden_states=True).hidden_states[-1][0, at]
        found.append(hidden @ head.double()[0])
    return found


def test_a_shared_trunk(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are a linear unit on transformers' last hidden states; policy and head learn from one loss."""
    seen: Watch = watch(monkeypatch, ppo)
    changes = {**ONE_MOVE, "backbone": "shared", "vf_coef": 0.7, "value_clip": 0.0001}
    rows = small.run("ppo", tmp_path / "run", **changes)
    step, move = seen.steps[1], seen.moves[1]
    assert move.names == ["policy_loss"]
    module, head = causal(small.policy, move.before), move.before["head.weight"]
    b = move.batch
    with torch.no_grad():
        values = shared_values(module, head, b.tokens, b.value_mask)
        close(rows_of(b.old_values, b.value_mask), [row.tolist() for row in values])
        close(rows_of(b.old_logp, b.mask), [row.tolist() for row in token_logps(module, b.tokens, b.mask)])
    returns = [row[m].double() for row, m in zip(b.returns, b.value_mask, strict=True)]
    own = head.double().requires_grad_(True)
    off = torch.cat([v - r for v, r in zip(shared_values(module, own, b.tokens, b.value_mask), returns, strict=True)])
    value_loss = 0.5 * (off**2).mean()
    loss = naive_loss(module, move, PLAIN) + 0.7 * value_loss
    assert rows[1]["value_loss"] == pytest.approx(value_loss.item(), rel=1e-4)
    same_gradient(move, module, loss)
    assert own.grad is not None
    torch.testing.assert_close(move.gradient["head.weight"].double(), own.grad, atol=1e-5, rtol=1e-3)
    assert changed(seen.moves[0].before, move.before, lambda name: name == "head.weight")
    folder = tmp_path / "run" / "checkpoints" / "step-000002"
    AutoModelForCausalLM.from_pretrained(folder)
    assert set(weights(tmp_path / "run", 2)) == set(load_file(Path(small.policy) / "model.safetensors"))
    assert set(load_file(folder / "state" / "critic_head.safetensors")) == {"score.weight"}
    assert changed(step.policy, weights(tmp_path / "run", 2))


@pytest.mark.parametrize("backbone", ["shared", "separate"])
def test_cut_off_answers_teach_nothing(backbone: str, small: Small, tmp_path: Path) -> None:
    """Where no answer ends, `mask_truncated` leaves the policy as it is, whatever the judge says."""
    changes = {"reward": "rule:length:3", "max_new_tokens": 2, "mask_truncated": True, "backbone": backbone}
    rows = small.run("ppo", tmp_path / "run", steps=2, **changes)
    assert [row["ended"] for row in rows] == [0, 0]
    assert not changed(load_file(Path(small.policy) / "model.safetensors"), weights(tmp_path / "run", 2))


def test_options_that_cannot_go_together(small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shared trunk"):
        small.settings("ppo", tmp_path / "run", backbone="shared", critic_warmup=1)
    with pytest.raises(UserError, match="dual_clip"):
        small.settings("ppo", tmp_path / "run", dual_clip=0.5)
    with pytest.raises(UserError, match="unknown dialect"):
        small.settings("ppo", tmp_path / "run", dialect="trl")


def test_the_score_stays_what_the_judge_said(small: Small, tmp_path: Path) -> None:
    """`score` and samples are the judge's own numbers; bounds and penalties show in `reward` alone."""
    changes = {"reward": "3*rule:length:4", "score_clip": 1.0, "missing_end_penalty": 0.25, "kl_coef": 0.0}
    row = small.run("ppo", tmp_path / "run", steps=1, sample_every=1, **changes)[0]
    said = samples(tmp_path / "run")
    scores = [max(0.0, 1 - abs(len(x["response"].split()) - 4) / 4) * 3 for x in said]
    assert [x["score"] for x in said] == pytest.approx(scores, abs=1e-5)
    assert row["score"] == pytest.approx(sum(scores) / 8, abs=1e-5)
    penalty = 0.25 * (1 - sum(x["ended"] for x in said) / 8)
    assert row["reward"] == pytest.approx(sum(min(1.0, x) for x in scores) / 8 - penalty, abs=1e-5)
