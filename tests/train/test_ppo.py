"""PPO as a whole: its numbers hang together, it learns, and what must not change does not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from kinkajou.engine.sampling import derive_seed
from kinkajou.models.forward import LanguageModel
from kinkajou.models.load import find_model
from kinkajou.parallel.strategy import Single
from kinkajou.train import inputs, parts, ppo, rollouts
from small import Small, metrics, steps_kept, weights, write_rows
from tiny import save_source, tiny_tokenizer

PENALTY = {"missing_end_penalty": 0.7}
WANTED = {
    *("score", "reward", "kl_ref", "kl_old", "entropy", "clip_frac", "explained_variance", "first_ratio"),
    *("response_length", "ended", "lr", "critic_lr", "grad_norm", "critic_grad_norm"),
}
TIMED = {"step", "time_s", "rollout_tokens_per_s", "score_tokens_per_s", "update_tokens_per_s"}


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def load(small: Small, tmp_path: Path, **changes: Any) -> tuple[parts.RLParts, Any]:
    """The parts, and the critic's model (None over a shared trunk)."""
    cfg = small.settings("ppo", tmp_path / "run", **changes)
    made = parts.load_parts(cfg, inputs.rl_records(cfg), Single())
    critic = parts.load_critic(cfg, made, Single())
    return made, critic and critic.model


@pytest.fixture
def run(small: Small, tmp_path: Path) -> list[dict[str, Any]]:
    """Two steps whose every answer is in `samples.jsonl`."""
    return small.run("ppo", tmp_path / "run", steps=2, sample_every=1, kl_coef=0.4, **PENALTY)


def test_every_number_that_users_asked_for(run: list[dict[str, Any]], tmp_path: Path) -> None:
    """Contract item 12: no metric told whether PPO worked."""
    for row in run:
        assert set(row) >= WANTED
        assert all(isinstance(row[name], float) for name in WANTED)
        assert not TIMED & set(row) - {"step"}
    timing = metrics(tmp_path / "run", "timing.jsonl")
    assert [set(row) for row in timing] == [TIMED, TIMED]
    assert [row["step"] for row in timing] == [1, 2]
    assert all(row[name] > 0 for row in timing for name in TIMED)
    assert timing[0]["time_s"] < timing[1]["time_s"]


def test_reward_is_score_less_penalty_less_kl(run: list[dict[str, Any]]) -> None:
    for row in run:
        assert row["reward"] == pytest.approx(row["score"] - 0.7 * (1 - row["ended"]) - 0.4 * row["kl_ref"], abs=1e-5)
    assert abs(run[1]["kl_ref"]) > 1e-3
    assert run[0]["ended"] < 1


def test_scores_are_the_reward_models(run: list[dict[str, Any]], small: Small, tmp_path: Path) -> None:
    """transformers alone, from the text in `samples.jsonl`: a score sits on the last token that was said."""
    rows = [row for row in samples(tmp_path / "run") if row["step"] == 1]
    assert sum(row["score"] for row in rows) / 8 == pytest.approx(run[0]["score"], abs=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(small.judge)
    module = AutoModelForSequenceClassification.from_pretrained(small.judge).eval()
    whole = [row for row in rows if len(row["response"].split()) == 8 and not row["ended"]]
    assert len(whole) >= 3  # the others said a control token, which is not in the text
    for row in whole:
        ids = torch.tensor([tokenizer(f"{row['prompt']} {row['response']}").input_ids])
        with torch.no_grad():
            assert float(module(ids).logits) == pytest.approx(row["score"], abs=1e-4)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-k": {"top_k": 20},
    "top-p": {"top_p": 0.8, "temperature": 0.7},
    "lora": {"lora_rank": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "one row a pass": {"tokens_per_microbatch": 1},
    "bf16": {"dtype": "bf16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_step_starts_where_it_must(variant: str, small: Small, tmp_path: Path) -> None:
    """Ratio 1 and KL 0; contract items 3 and 9: log-probabilities are of the distribution that was sampled."""
    rows = small.run("ppo", tmp_path / "run", steps=2, lr=3e-3, **VARIANTS[variant])
    loose = variant == "bf16"
    for row in rows:
        assert row["first_ratio"] == pytest.approx(1, abs=2e-2 if loose else 1e-5)
        assert row["engine_gap"] < (5e-2 if loose else 1e-5)
    assert rows[0]["kl_ref"] == pytest.approx(0, abs=1e-2 if loose else 1e-6)
    assert abs(rows[1]["kl_ref"]) > 1e-2  # the policy moved away


QUIET = {"gpt2": ["resid_pdrop", "embd_pdrop", "attn_pdrop"], "opt": ["dropout"], "bloom": ["hidden_dropout"]}


@pytest.mark.parametrize("family", QUIET)
def test_other_families_with_dropout_in_their_config(family: str, small: Small, tmp_path: Path) -> None:
    """Contract item 8: dropout was on in the update, so the ratio was not 1."""
    model = tmp_path / "model"
    save_source(model, AutoModelForCausalLM, family, tiny_tokenizer(), **dict.fromkeys(QUIET[family], 0.5))
    rows = small.run("ppo", tmp_path / "run", model=str(model), reward="rule:length:3", steps=2)
    assert [row["first_ratio"] for row in rows] == pytest.approx([1, 1], abs=1e-5)
    assert rows[0]["kl_ref"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["engine_gap"] < 1e-5


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_the_penalty_for_no_end_reaches_the_policy(penalty: float, small: Small, tmp_path: Path) -> None:
    """The score stays what the judge said; with the penalty alone to go by, answers learn to end."""
    changes = {"reward": "rule:mentions:nothing", "kl_coef": 0.0, "lr": 1e-2, "prompts_per_step": 32, "steps": 15}
    rows = small.run("ppo", tmp_path / "run", **changes, minibatch_size=16, missing_end_penalty=penalty)
    assert {row["score"] for row in rows} == {0.0}
    assert rows[0]["reward"] == pytest.approx(-penalty * (1 - rows[0]["ended"]), abs=1e-6)
    assert (rows[-1]["ended"] > 0.6) == (penalty > 0)


def test_the_policy_learns_an_easy_rule(small: Small, tmp_path: Path) -> None:
    rule = "rule:mentions:w5,w6,w7,w8,w9"
    changes = {"reward": rule, "kl_coef": 0.0, "lr": 1e-2, "prompts_per_step": 32, "minibatch_size": 16, "steps": 15}
    rows = small.run("ppo", tmp_path / "run", **changes, sample_every=15)
    assert rows[0]["score"] < 0.6
    assert rows[-1]["score"] > 0.9
    for row in samples(tmp_path / "run"):
        assert row["score"] == float(bool({"w5", "w6", "w7", "w8", "w9"} & set(row["response"].split())))


def test_ptx_alone_is_sft(small: Small, tmp_path: Path) -> None:
    """With ptx_coef 1 nothing of the policy's own loss is left: the same weights as supervised tuning gives."""
    rates = {"schedule": "constant", "warmup": 0.0}
    ptx = {"ptx_data": small.chats, "ptx_coef": 1.0, "ptx_batch_size": 8}
    rows = small.run("ppo", tmp_path / "ppo", steps=2, epochs=1, minibatch_size=4, **ptx, **rates)
    want = small.run("sft", tmp_path / "sft", epochs=0.8, **rates)
    assert len(want) == 4
    means = [(want[i]["loss"] + want[i + 1]["loss"]) / 2 for i in (0, 2)]  # two minibatches a step
    assert [row["ptx_loss"] for row in rows] == pytest.approx(means, rel=1e-5)
    tuned = weights(tmp_path / "sft", 4)
    for key, tensor in weights(tmp_path / "ppo", 2).items():
        torch.testing.assert_close(tensor, tuned[key], atol=1e-6, rtol=0)


def test_the_shares_of_the_mix(small: Small, tmp_path: Path) -> None:
    """actor loss = ptx_coef x ptx + (1 - ptx_coef) x policy: gradient norms of first steps say so."""
    base = {"steps": 1, "epochs": 1, "minibatch_size": 8, "max_norm": 1e9}
    ptx = {"ptx_data": small.chats, "ptx_batch_size": 8}
    plain = small.run("ppo", tmp_path / "plain", **base)[0]
    (none, half, whole) = (
        small.run("ppo", tmp_path / f"ptx-{share}", **base, **ptx, ptx_coef=share)[0] for share in (1e-9, 0.5, 1.0)
    )
    assert none["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    low, high = abs(none["grad_norm"] - whole["grad_norm"]) / 2, (none["grad_norm"] + whole["grad_norm"]) / 2
    assert low <= half["grad_norm"] <= high
    assert half["ptx_loss"] == pytest.approx(whole["ptx_loss"], rel=1e-6)


def test_the_critic_starts_from_the_reward_model(small: Small, tmp_path: Path) -> None:
    _, critic = load(small, tmp_path)
    judge = load_file(Path(small.judge) / "model.safetensors")
    own = critic.module.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in judge.items())
    other = save_source(tmp_path / "other", AutoModelForSequenceClassification, "llama", tiny_tokenizer(), seed=9)
    named = load(small, tmp_path, critic=str(tmp_path / "other"))[1].module.state_dict()
    assert all(torch.equal(named[key], tensor) for key, tensor in other.state_dict().items())
    trunk = load_file(Path(small.policy) / "model.safetensors")
    ruled = load(small, tmp_path, reward="rule:length:3")[1].module.state_dict()
    assert torch.equal(ruled["model.norm.weight"], trunk["model.norm.weight"])
    assert 0 < float(ruled["score.weight"].std()) < 3 / 33  # N(0, 1 / (d + 1)) with d = 32


def test_a_critic_from_an_adapter_is_trained_whole(small: Small, tmp_path: Path) -> None:
    """Contract item 7: LoRA reward models did not load in stage 3."""
    small.run("reward", tmp_path / "judge", lora_rank=2, lora_save="adapter")
    made, critic = load(small, tmp_path, reward=str(tmp_path / "judge"))
    assert all(param.requires_grad for param in critic.parameters())
    assert not any(param.requires_grad for param in made.judge.terms[0].judge.model.parameters())


def test_the_reference_never_changes(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the judge; policy and critic do."""
    kept: list[Any] = []

    def watched(name: str) -> Any:
        load_one = getattr(parts, name)

        def load(*given: Any) -> Any:
            kept.append(load_one(*given))
            return kept[-1]

        return load

    for name in ("load_parts", "load_critic"):
        monkeypatch.setattr(ppo, name, watched(name))
    small.run("ppo", tmp_path / "run", steps=2)
    made, critic = kept
    source = load_file(Path(small.policy) / "model.safetensors")
    judge = load_file(Path(small.judge) / "model.safetensors")
    (frozen,) = (x.cell_contents for x in made.reference.__closure__ if isinstance(x.cell_contents, LanguageModel))
    reference, policy = frozen.module.state_dict(), made.policy.module.state_dict()
    assert all(torch.equal(reference[key], tensor) for key, tensor in source.items())
    assert not any(torch.equal(policy[key], tensor) for key, tensor in source.items())
    scorer, moved = made.judge.terms[0].judge.model.module.state_dict(), critic.model.module.state_dict()
    assert all(torch.equal(scorer[key], tensor) for key, tensor in judge.items())
    assert not all(torch.equal(moved[key], tensor) for key, tensor in judge.items())


def test_a_thousand_prompts_are_a_thousand(small: Small, tmp_path: Path) -> None:
    """Contract item 2: they counted as 2."""
    data = write_rows(tmp_path / "many.jsonl", [{"prompt": f"w{3 + i % 80} w{3 + i // 80}"} for i in range(1000)])
    made, _ = load(small, tmp_path, prompts=data)
    assert len(made.tasks) == 1000
    seen = [i for step in range(made.order.batches_per_epoch) for i in made.order.batch(step)]
    assert len(set(seen)) == len(seen) == 1000


def test_every_step_asks_other_prompts(small: Small, tmp_path: Path) -> None:
    small.run("ppo", tmp_path / "run", steps=5, sample_every=1, epochs=1)
    rows = samples(tmp_path / "run")
    asked = [json.loads(line)["prompt"] for line in Path(small.prompts).read_text().splitlines()]
    assert sorted(row["prompt"] for row in rows) == sorted(asked)


def test_the_same_prompt_gets_another_answer_each_time(small: Small, tmp_path: Path) -> None:
    """Contract item 10: one seed everywhere.  Nothing is learnt here, so only the seeds can make a difference."""
    data = write_rows(tmp_path / "same.jsonl", [{"prompt": "w5 w6 w7"}] * 8)
    small.run("ppo", tmp_path / "run", prompts=data, steps=2, sample_every=1, lr=0.0)
    assert len({row["response"] for row in samples(tmp_path / "run")}) == 16
    assert len({derive_seed(0, step, prompt) for step in range(50) for prompt in range(50)}) == 2500


def test_the_checkpoint_is_a_plain_folder(small: Small, tmp_path: Path) -> None:
    small.run("ppo", tmp_path / "run", steps=2, save_state=True, export=str(tmp_path / "model"))
    folder = tmp_path / "run" / "checkpoints" / "step-000002"
    assert {path.name for path in (folder / "state").iterdir()} == {
        "optimizer.safetensors",
        "critic_optimizer.safetensors",
        "random.json",
        "run.json",
        "clock.json",
    }
    module = AutoModelForCausalLM.from_pretrained(folder)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(exported[key], tensor) for key, tensor in module.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<end>"


@pytest.mark.parametrize(
    ("scores", "save_every", "best", "kept"),
    [
        ([0.1, 0.5, 0.3, 0.5, 0.2], 0, 1, [1, 4]),  # a tie goes to the earlier
        ([0.1, 0.2, 0.3, 0.4, 0.2], 2, 3, [2, 3, 4]),
        ([0.5, 0.2, 0.3, 0.4, 0.2], 0, 0, [0, 4]),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 0, 4, [4]),
    ],
)
def test_keep_best(
    scores: list[float],
    save_every: int,
    best: int,
    kept: list[int],
    small: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The best and the last stay, and what `save_every` asks for; the best is what is exported and found."""
    monkeypatch.setattr(rollouts, "held_out_scores", lambda run, cfg, parts: {"eval_score": scores[run.step]})
    changes = {"eval_prompts": small.held_out, "eval_every": 1, "keep_best": "score", "save_every": save_every}
    small.run("ppo", tmp_path / "run", steps=4, epochs=1, export=str(tmp_path / "model"), **changes)
    assert steps_kept(tmp_path / "run") == kept
    found = json.loads((tmp_path / "run" / "best.json").read_text())
    assert found == {"step": best, "metric": "eval_score", "value": scores[best]}
    assert find_model(str(tmp_path / "run")).endswith(f"step-{best:06d}")
    exported, source = load_file(tmp_path / "model" / "model.safetensors"), weights(tmp_path / "run", best)
    assert all(torch.equal(exported[key], tensor) for key, tensor in source.items())


def test_held_out_prompts_are_judged_twice(small: Small, tmp_path: Path) -> None:
    """Before the first step, every `eval_every` and at the end; by the reward and by the gold judge."""
    changes = {"eval_prompts": small.held_out, "eval_every": 2, "reward": "rule:ended", "gold": "rule:length:8"}
    rows = small.run("ppo", tmp_path / "run", steps=3, epochs=1, lr=0.0, **changes)
    judged = [row for row in rows if "eval_gold" in row]
    assert [row["step"] for row in judged] == [0, 2, 3]
    assert len({row["eval_gold"] for row in judged}) == 1  # the same seeds, and nothing was learnt
    assert judged[0]["eval_score"] == judged[0]["eval_ended"]
    assert judged[0]["eval_kl_ref"] == pytest.approx(0, abs=1e-4)
