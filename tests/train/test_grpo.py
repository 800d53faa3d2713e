"""Critic-free methods: advantages and gradients by formulas typed again, options by what a run wrote."""

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kinkajou.errors import UserError
from kinkajou.parallel.strategy import Single
from kinkajou.train import grpo, inputs, parts
from rl import (
    Move,
    Rows,
    causal,
    changed,
    close,
    ending,
    naive_whiten,
    rows_of,
    same_gradient,
    samples,
    token_logps,
    watch,
)
from small import Small, steps_kept, weights, write_rows

ALGORITHMS = ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "reinforce++", "reinforce++_baseline"]
ALGORITHMS.append("reinforce_baseline")
NO_KL = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "reinforce_baseline")
KL = {"rloo": 0.05, "reinforce++": 0.01, "reinforce++_baseline": 0.001}
LONGEST = 8
WORDS = "rule:mentions:w5,w6,w7,w8,w9"


def naive_advantages(name: str, scores: list[float], kl: Rows) -> Rows:
    """One number a token.  scores: as shaped, groups of 4 after one another; kl: k1 of each token."""
    groups = [scores[i : i + 4] for i in range(0, len(scores), 4)]
    if name == "reinforce++":
        raw = [
            [sum(-0.01 * x for x in row[j:]) + score for j in range(len(row))]
            for row, score in zip(kl, scores, strict=True)
        ]
        return naive_whiten(raw, unbiased=False)
    if name == "rloo":
        rewards = [score - 0.05 * sum(row) for score, row in zip(scores, kl, strict=True)]
        whole = [x - fmean(rewards[i - i % 4 + k] for k in range(4) if k != i % 4) for i, x in enumerate(rewards)]
    elif name == "reinforce_baseline":
        whole = [x - fmean(scores) for x in scores]
    else:
        scaled = name not in ("dr_grpo", "reinforce++_baseline")
        whole = [(x - fmean(g)) / (stdev(g) + 1e-6 if scaled else 1.0) for g in groups for x in g]
    rows = [[x] * len(row) for x, row in zip(whole, kl, strict=True)]
    return naive_whiten(rows, unbiased=False) if name == "reinforce++_baseline" else rows


def row_loss(name: str, logp: Tensor, old: Tensor, ref: Tensor, gain: Tensor) -> Tensor:
    """The loss of each token of one answer, by the paper that the algorithm is named after."""
    ratio = (logp - old).exp()
    if name == "gspo":
        ratio = (logp - old).mean().exp().expand_as(logp)
    if name == "rloo":
        ratio = (logp - old).sum().exp().expand_as(logp)
    if name == "cispo":
        return -torch.clamp(ratio.detach(), max=5.0) * gain * logp
    if name == "sapo":
        tau = torch.where(gain > 0, 1.0, 1.05)
        return -4 / tau / (1 + (-tau * (ratio - 1)).exp()) * gain
    if name == "reinforce_baseline":
        return -gain * logp
    low, high = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}.get(name, (0.2, 0.2))
    loss = -torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain)
    return loss + 0.001 * 0.5 * (logp - ref) ** 2 if name == "reinforce++_baseline" else loss


def naive_loss(name: str, module: Any, move: Move) -> Tensor:
    b = move.batch
    columns = ([x[m].double() for x, m in zip(y, b.mask, strict=True)] for y in (b.old_logp, b.ref_logp, b.advantages))
    logps = token_logps(module, b.tokens, b.mask)
    rows = [row_loss(name, *row) for row in zip(logps, *columns, strict=True)]
    if name == "reinforce_baseline":
        return torch.stack([row.sum() for row in rows]).mean()
    if name == "dr_grpo":
        return torch.stack([row.sum() / LONGEST for row in rows]).mean()
    if name in ("dapo", "cispo", "reinforce++", "reinforce++_baseline"):
        return torch.cat(rows).mean()
    return torch.stack([row.mean() for row in rows]).mean()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_from_outside(name: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step's advantages from its scores and tokens; loss and gradient of its second, off-policy update."""
    seen = watch(monkeypatch, grpo)
    changes = {"steps": 2, "epochs": 2, "minibatch_size": 16, "max_norm": 1e9, "reward": f"3*{small.judge}"}
    lr = 1e-6 if name == "gspo" else 3e-3  # its bounds are so near that a usual step leaves all answers beyond them
    policy = ending(small)
    rows = small.run("grpo", tmp_path / "run", model=policy, algorithm=name, lr=lr, warmup=0.0, **changes)
    step = seen.steps[1]
    rollout = step.sampled.rollout
    with torch.no_grad():
        logp, ref = (
            [row.tolist() for row in token_logps(module, rollout.tokens, rollout.mask)]
            for module in (causal(policy, step.policy), causal(policy))
        )
    kl = [[a - b for a, b in zip(*row, strict=True)] for row in zip(logp, ref, strict=True)]
    scores = rollout.scores.tolist()
    if name == "dapo":  # a fifth of 8 tokens is a buffer of 2
        scores = [x - min(1.0, max(0.0, (len(row) - 6) / 2)) for x, row in zip(scores, kl, strict=True)]
    close(rows_of(step.batch.old_logp, step.batch.mask), logp)
    close(rows_of(step.batch.advantages, step.batch.mask), naive_advantages(name, scores, kl), 5e-4)
    move = seen.of_policy()[3]
    module = causal(policy, move.before)
    loss = naive_loss(name, module, move)
    assert move.found["policy_loss"] == pytest.approx(loss.item(), abs=2e-4)
    same_gradient(move, module, loss)
    assert abs(move.found["ratio"] - 1) > (1e-7 if name == "gspo" else 1e-4)
    assert [row["first_ratio"] for row in rows] == pytest.approx([1, 1], abs=1e-5)
    groups = [step.sampled.rollout.scores[i : i + 4].tolist() for i in range(0, 16, 4)]
    if name != "dapo":
        assert rows[1]["zero_spread"] == fmean(len(set(group)) == 1 for group in groups)
    if name in NO_KL:
        assert "kl_ref" not in rows[1]
        assert rows[1]["reward"] == pytest.approx(fmean(scores), abs=1e-5)
    else:
        assert rows[0]["kl_ref"] == pytest.approx(0, abs=1e-6)
        assert rows[1]["kl_ref"] == pytest.approx(fmean(map(sum, kl)), abs=1e-4)
        taken = 0.0 if name == "reinforce++_baseline" else KL[name] * rows[1]["kl_ref"]
        assert rows[1]["reward"] == pytest.approx(fmean(scores) - taken, abs=1e-4)


@pytest.mark.parametrize("name", ["grpo", "dapo", "rloo"])
def test_an_easy_rule_is_learnt(name: str, small: Small, tmp_path: Path) -> None:
    changes = {"lr": 1e-2, "prompts_per_step": 8, "minibatch_size": 16, "steps": 25, "sample_every": 25}
    rows = small.run("grpo", tmp_path / "run", algorithm=name, reward=WORDS, overlong_share=0.0, **changes)
    assert rows[0]["score"] < 0.6
    assert fmean(row["score"] for row in rows[-5:]) > 0.85
    if name == "grpo":
        assert rows[-1]["zero_spread"] > rows[0]["zero_spread"]
    for row in samples(tmp_path / "run"):
        assert row["score"] == float(bool({"w5", "w6", "w7", "w8", "w9"} & set(row["response"].split())))


def test_nothing_is_learnt_from_equal_scores(small: Small, tmp_path: Path) -> None:
    """Groups without spread have advantage exactly 0, so the weights stay as they are, to the bit."""
    rows = small.run("grpo", tmp_path / "run", reward="rule:mentions:nothing", steps=2)
    assert [row["zero_spread"] for row in rows] == [1, 1]
    assert not changed(load_file(Path(small.policy) / "model.safetensors"), weights(tmp_path / "run", 2))


def test_answers_of_a_group_differ(small: Small, tmp_path: Path) -> None:
    """One prompt, asked in each place of three batches: no two answers of 8 tokens are the same."""
    data = write_rows(tmp_path / "same.jsonl", [{"prompt": "w5 w6 w7"}] * 12)
    changes = {"prompts": data, "steps": 3, "sample_every": 1, "lr": 0.0, "epochs": 1}
    small.run("grpo", tmp_path / "run", **changes)
    rows = samples(tmp_path / "run")
    assert len(rows) == 48
    long = [row["response"] for row in rows if len(row["response"].split()) == 8]
    assert len(long) > 30
    assert len(set(long)) == len(long)


def asked(run: Path, step: int, size: int = 4) -> list[list[dict[str, Any]]]:
    rows = [row for row in samples(run) if row["step"] == step]
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def taken(run: Path, step: int) -> int:
    return int(
        json.loads((run / "checkpoints" / f"step-{step:06d}" / "state" / "run.json").read_text())["numbers"]["rl"][
            "batches"
        ]
    )


def test_groups_with_equal_scores_are_replaced(small: Small, tmp_path: Path) -> None:
    """Against the same run without it: the batch holds the first useful groups of all that were asked."""
    rule = "rule:mentions:w5,w6,w7"
    frozen = {"reward": rule, "lr": 0.0, "sample_every": 1, "epochs": 1, "overlong_share": 0.0}
    changes = {**frozen, "dynamic_sampling": 9, "prompts_per_step": 4, "steps": 2, "save_every": 1}
    rows = small.run("grpo", tmp_path / "dynamic", **changes)
    # What each prompt says in step 1 does not depend on the batch that it is asked in: ask all 40 at once.
    small.run("grpo", tmp_path / "all", **frozen, prompts_per_step=16, steps=2)
    everything = {group[0]["prompt"]: group for step in (1,) for group in asked(tmp_path / "all", step)}
    groups = asked(tmp_path / "dynamic", 1)
    assert len(groups) == 4
    assert all(len({row["score"] for row in group}) > 1 for group in groups)
    assert rows[0]["zero_spread"] == 0
    assert rows[0].get("sampling_rounds", 1) == taken(tmp_path / "dynamic", 1) > 1
    order = list(everything)
    useful = [prompt for prompt in order if len({row["score"] for row in everything[prompt]}) > 1]
    known = [group[0]["prompt"] for group in groups if group[0]["prompt"] in everything]
    assert known == useful[: len(known)]
    assert known
    first = [prompt for prompt in known if prompt in order[:4]]
    for prompt in first:  # of the first round the answers are the same too
        group = next(group for group in groups if group[0]["prompt"] == prompt)
        assert [row["response"] for row in group] == [row["response"] for row in everything[prompt]]
    again = small.run("grpo", tmp_path / "again", **changes)
    assert [row["sampling_rounds"] for row in again] == [row["sampling_rounds"] for row in rows]
    assert samples(tmp_path / "again") == samples(tmp_path / "dynamic")
    assert rows[0]["score"] == pytest.approx(fmean(row["score"] for group in groups for row in group), abs=1e-5)


def test_what_is_missing_is_filled_up(small: Small, tmp_path: Path) -> None:
    """After the last round equal groups fill the batch; prompts go on where the step before left off."""
    changes = {"reward": "rule:mentions:nothing", "dynamic_sampling": 2, "steps": 3, "sample_every": 1, "save_every": 1}
    rows = small.run("grpo", tmp_path / "run", **changes)
    assert [row["sampling_rounds"] for row in rows] == [3, 3, 3]
    assert [row["zero_spread"] for row in rows] == [1, 1, 1]
    assert [taken(tmp_path / "run", step) for step in (1, 2, 3)] == [3, 6, 9]
    prompts = [group[0]["prompt"] for step in (1, 2, 3) for group in asked(tmp_path / "run", step)]
    assert len(prompts) == len(set(prompts)) == 12  # 36 of 40 were asked: no epoch is over
    kept = small.run("grpo", tmp_path / "usual", reward="rule:mentions:nothing", steps=3, sample_every=1)
    assert "sampling_rounds" not in kept[0]


def test_a_prompt_that_comes_again_in_a_step_says_something_else(small: Small, tmp_path: Path) -> None:
    """Four prompts and three rounds: with one seed for all rounds the same answers would be trained on thrice."""
    data = write_rows(tmp_path / "few.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(10, 14)])
    seen: list[str] = []
    cfg = small.settings("grpo", tmp_path / "run", prompts=data, dynamic_sampling=2, reward="rule:mentions:nothing")
    made = parts.load_parts(cfg, inputs.rl_records(cfg), Single())
    generate = made.engine.generate

    def watched(*given: Any, **named: Any) -> Any:
        seen.extend(map(str, named["seeds"]))
        return generate(*given, **named)

    made.engine.generate = watched  # type: ignore[method-assign]
    from kinkajou.train.rollouts import sample_groups
    from kinkajou.train.run import Run

    run = Run("grpo", cfg, Single(), total=1, shown=())
    run.step = 1
    sample_groups(run, cfg, made)
    assert len(seen) == len(set(seen)) == 48


def test_details_are_of_the_answers_that_are_trained_on(small: Small, tmp_path: Path) -> None:
    """Metrics of a reward's parts after replacement: means over the batch, not over the last round."""
    changes = {"reward": ("rule:mentions:w5,w6,w7", "0.5*rule:ended"), "dynamic_sampling": 5, "sample_every": 1}
    row = small.run("grpo", tmp_path / "run", steps=1, lr=0.0, **changes)[0]
    said = samples(tmp_path / "run")
    parts_of = [name for name in row if name.startswith("score/")]
    assert row["sampling_rounds"] > 1
    assert len(parts_of) == 2
    for name in parts_of:
        assert row[name] == pytest.approx(fmean(x[name.removeprefix("score/")] for x in said), abs=1e-5)
    assert row["score"] == pytest.approx(row["score/rule:mentions"] + 0.5 * row["score/rule:ended"], abs=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.6, 1.0])
def test_the_penalty_for_length(share: float, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DAPO's equation 13 over lengths of the samples; the score itself stays the judge's."""
    seen = watch(monkeypatch, grpo)
    changes = {"overlong_share": share, "overlong_penalty": 0.7, "max_new_tokens": 20, "steps": 1, "sample_every": 1}
    row = small.run("grpo", tmp_path / "run", model=ending(small), reward="rule:ended", **changes)[0]
    lengths = [int(n) for n in seen.steps[0].sampled.rollout.mask.sum(1)]
    assert len(set(lengths)) > 2
    buffer = round(share * 20)
    penalties = [0.7 * min(1.0, max(0.0, (n - (20 - buffer)) / buffer)) for n in lengths]
    scores = [float(x["ended"]) for x in samples(tmp_path / "run")]
    assert row["score"] == pytest.approx(fmean(scores), abs=1e-6)
    assert row["reward"] == pytest.approx(fmean(scores) - fmean(penalties), abs=1e-5)


def test_cut_off_answers_teach_nothing(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that ended do: the gradient is that of the batch without the others' tokens."""
    changes = {"reward": small.judge, "mask_truncated": True, "steps": 1}
    row = small.run("grpo", tmp_path / "none", **changes, max_new_tokens=2)[0]
    assert (row["ended"], row["updates"]) == (0, 0)
    assert not changed(load_file(Path(small.policy) / "model.safetensors"), weights(tmp_path / "none", 1))
    seen, policy = watch(monkeypatch, grpo), ending(small)
    some = {**changes, "model": policy, "minibatch_size": 16, "epochs": 1, "tokens_per_microbatch": 8, "max_norm": 1e9}
    row = small.run("grpo", tmp_path / "some", **some)[0]
    rollout, move = seen.steps[0].sampled.rollout, seen.of_policy()[0]
    assert 0 < float(rollout.ended.float().mean()) < 1
    assert torch.equal(seen.steps[0].batch.mask, rollout.mask & rollout.ended[:, None])
    module, counts = causal(policy, move.before), move.batch.mask.any(1)
    logps = token_logps(module, move.batch.tokens[counts], move.batch.mask[counts])
    gains = [row[0] for row in rows_of(move.batch.advantages[counts], move.batch.mask[counts])]
    terms = [-gain * (logp - logp.detach()).exp().mean() for gain, logp in zip(gains, logps, strict=True)]
    same_gradient(move, module, torch.stack(terms).sum() / 16)
    assert math.isfinite(row["policy_loss"])


def test_kl_in_reward_or_in_loss(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the reward it moves scores and no loss; in the loss the other way round, k3's value by loops."""
    seen = watch(monkeypatch, grpo)
    changes = {"kl_coef": 0.5, "steps": 2, "lr": 3e-3, "epochs": 1, "minibatch_size": 16}
    reward = small.run("grpo", tmp_path / "reward", **changes, kl_in="reward", kl_estimator="k1")
    assert all("kl_loss" not in row for row in reward)
    assert reward[1]["reward"] == pytest.approx(reward[1]["score"] - 0.5 * reward[1]["kl_ref"], abs=1e-5)
    assert abs(reward[1]["kl_ref"]) > 1e-3
    seen.steps.clear()
    loss = small.run("grpo", tmp_path / "loss", **changes)
    assert loss[1]["reward"] == pytest.approx(loss[1]["score"], abs=1e-6)
    b = seen.steps[1].batch
    pairs = zip(rows_of(b.old_logp, b.mask), rows_of(b.ref_logp, b.mask), strict=True)
    want = fmean(fmean(math.exp(r - p) - 1 - (r - p) for p, r in zip(*rows, strict=True)) for rows in pairs)
    assert want > 1e-3
    assert loss[1]["kl_loss"] == pytest.approx(want, rel=1e-3)


def test_the_base_below_adapters_is_the_reference(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA needs no second model: KL 0 at first, later that of the merged policy to the source, by transformers."""
    seen = watch(monkeypatch, grpo)
    rows = small.run("grpo", tmp_path / "run", lora_rank=4, kl_coef=0.1, lr=1e-2, steps=3, save_every=1)
    assert rows[0]["kl_ref"] == pytest.approx(0, abs=1e-6)
    assert rows[2]["first_ratio"] == pytest.approx(1, abs=1e-5)
    rollout = seen.steps[2].sampled.rollout
    merged, base = causal(str(tmp_path / "run" / "checkpoints" / "step-000002")), causal(small.policy)
    with torch.no_grad():
        now, then = (token_logps(module, rollout.tokens, rollout.mask) for module in (merged, base))
    want = fmean(float((one - other).sum()) for one, other in zip(now, then, strict=True))
    assert abs(want) > 1e-2
    assert rows[2]["kl_ref"] == pytest.approx(want, abs=1e-4)
    close(rows_of(seen.steps[2].batch.ref_logp, rollout.mask), [row.tolist() for row in then])


def test_a_reference_only_where_it_is_needed(small: Small, tmp_path: Path) -> None:
    def reference(**changes: Any) -> Any:
        cfg = small.settings("grpo", tmp_path / "run", **changes)
        return parts.load_parts(cfg, inputs.rl_records(cfg), Single()).reference

    assert reference() is None
    assert reference(kl_coef=0.01) is not None
    assert reference(lora_rank=2) is not None  # it costs nothing there
    assert reference(algorithm="rloo") is not None
    assert reference(algorithm="rloo", kl_coef=0.0) is None


def test_a_moving_average_and_a_stop(small: Small, tmp_path: Path) -> None:
    changes = {"lr": 1e-2, "warmup": 0.0, "steps": 1, "epochs": 4}
    free = small.run("grpo", tmp_path / "free", **changes)[0]
    row = small.run("grpo", tmp_path / "run", **changes, ema_decay=0.9, stop_kl=1e-4)[0]
    assert free["updates"] == 8
    assert 1 < row["updates"] < 8
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step-000001" / "ema")
    assert changed(weights(tmp_path / "run", 1), average.state_dict())
    assert steps_kept(tmp_path / "run") == [1]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"group_size": 1}, "group_size is 1"),
        ({"group_size": 1, "algorithm": "rloo"}, "group_size is 1"),
        ({"algorithm": "gpro"}, "unknown algorithm"),
        ({"dialect": "coati-2023"}, "no critic-free methods"),
        ({"kl_target": 1.0}, "adaptive KL"),
        ({"minibatch_size": 7}, "multiple of minibatch_size"),
    ],
)
def test_bad_settings(changes: dict[str, Any], problem: str, small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem) as refused:
        small.run("grpo", tmp_path / "run", **changes)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("name", ["reinforce++", "reinforce_baseline"])
def test_methods_that_need_no_group(name: str, small: Small, tmp_path: Path) -> None:
    rows = small.run("grpo", tmp_path / "run", algorithm=name, group_size=1, prompts_per_step=8, steps=2)
    assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows)
