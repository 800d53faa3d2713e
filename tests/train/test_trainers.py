"""SFT and the reward model as a whole: they learn, repeat, save, evaluate."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from kinkajou.data.sources import read_chats, read_pairs
from kinkajou.errors import UserError
from small import Small, metrics, steps_kept, weights, write_rows


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def mean_loss(folder: Path | str, chats: str) -> float:
    """Nats per token of all answers and their end tokens, by transformers alone."""
    module = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for chat in read_chats(chats).rows:
        asked, said = (tokenizer(message.content).input_ids for message in chat.messages)
        ids = torch.tensor([[*asked, *said, tokenizer.eos_token_id]])
        with torch.no_grad():
            logp = module(ids).logits[0, :-1].double().log_softmax(-1)
        picked = logp.gather(1, ids[0, 1:, None])[len(asked) - 1 :]
        total, count = total - float(picked.sum()), count + len(picked)
    return total / count


def test_sft_lowers_the_loss_and_its_first_loss_is_the_sources(small: Small, tmp_path: Path) -> None:
    """One batch of all chats: the first loss is the source model's mean over what the assistant says."""
    rows = small.run("sft", tmp_path / "run", batch_size=40, epochs=20, lr=3e-3, schedule="constant")
    assert rows[0]["loss"] == pytest.approx(mean_loss(small.policy, small.chats), rel=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "sft-lora", "sft-preset"])
def test_same_seed_same_numbers_and_another_seed_others(stage: str, small: Small, tmp_path: Path) -> None:
    name, _, kind = stage.partition("-")
    preset = {"model": "llama-nano", "vocab_size": 300, "max_len": 200, "epochs": 0.4}
    changes: dict[str, Any] = {"lora": {"lora_rank": 2}, "preset": preset}.get(kind, {})
    changes |= {"steps": 2} if name == "ppo" else {}
    found = {}
    for run, seed in (("one", 3), ("two", 3), ("other", 4)):
        rows = small.run(name, tmp_path / run, seed=seed, **changes)
        torch.rand(17)  # whoever else draws numbers must not matter
        found[run] = rows, weights(tmp_path / run, steps_kept(tmp_path / run)[-1])
    assert found["one"][0] == found["two"][0] != found["other"][0]
    one, two, other = (found[run][1] for run in ("one", "two", "other"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_the_order_of_micro_batches_and_log_every_change_no_number(small: Small, tmp_path: Path) -> None:
    want = small.run("sft", tmp_path / "one")
    got = small.run("sft", tmp_path / "two", tokens_per_microbatch=1, log_every=2)
    for a, b in zip(want, got, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.parametrize(("every", "shown"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (50, [5])])
def test_log_every(
    every: int, shown: list[int], small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Contract item 11: `--log_interval` did nothing."""
    rows = small.run("sft", tmp_path / "run", log_every=every)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sft ")]
    assert [int(line.split()[1].split("/")[0]) for line in lines] == shown
    assert all("loss" in line and "steps/s" in line for line in lines)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]  # the file has them all


def test_the_saved_model_is_a_plain_folder_with_the_same_numbers(small: Small, tmp_path: Path) -> None:
    """Contract item 12: transformers alone computes, from the checkpoint, the eval loss that the run reported."""
    rows = small.run("sft", tmp_path / "run", eval_data=small.chats, eval_every=5)
    folder = checkpoint(tmp_path / "run", 5)
    assert rows[-1]["eval_loss"] == pytest.approx(mean_loss(folder, small.chats), rel=1e-5)
    ends = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(folder).eos_token_id in ends


def scores_by_transformers(folder: Path | str, texts: list[str]) -> list[float]:
    module = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            scores.append(float(module(ids).logits))
    return scores


def test_the_saved_reward_model_is_a_plain_folder_with_the_same_numbers(small: Small, tmp_path: Path) -> None:
    """Accuracy, margin and interval of the run's evaluation, again from its checkpoint by transformers alone."""
    rows = small.run("reward", tmp_path / "run", eval_data=small.pairs)
    sides = {"chosen": [], "rejected": []}
    for pair in read_pairs(small.pairs).rows:
        for side, texts in sides.items():
            texts.append(f"{pair.prompt[0].content} {getattr(pair, side)[0].content}")
    chosen, rejected = (scores_by_transformers(checkpoint(tmp_path / "run", 5), texts) for texts in sides.values())
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    share = sum(margin > 0 for margin in margins) / 40
    last = rows[-1]
    assert last["eval_pairs"] == 40
    assert last["eval_accuracy"] == pytest.approx(share)
    assert last["eval_margin"] == pytest.approx(sum(margins) / 40, abs=1e-5)
    # Wilson 1927, in full.
    z, n = 1.96, 40
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    bounds = [(share + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert [last["eval_accuracy_low"], last["eval_accuracy_high"]] == pytest.approx(bounds, abs=1e-6)


@pytest.mark.parametrize("loss", ["log_sig", "log_exp"])
def test_the_reward_model_learns_what_is_easy(loss: str, small: Small, tmp_path: Path) -> None:
    """The chosen side says w7 somewhere: accuracy 1 on held-out pairs, and w7 makes any text better."""
    words = [f"w{i}" for i in range(10, 40)]
    pairs = [
        {"prompt": words[i], "chosen": f"{words[-i]} w7 {words[i - 5]}", "rejected": f"{words[-i]} w8 {words[i - 9]}"}
        for i in range(30)
    ]
    data = write_rows(tmp_path / "easy.jsonl", pairs)
    rows = small.run("reward", tmp_path / "run", data=data, eval_share=0.3, epochs=12, batch_size=7, lr=3e-3, loss=loss)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.1)  # the fresh head is nearly 0
    assert rows[-1]["eval_accuracy"] == 1.0
    assert rows[-1]["eval_accuracy_low"] > 0.6
    assert rows[-1]["eval_pairs"] == 9
    texts = ["w50 w60 w7 w61", "w50 w60 w8 w61"]
    good, bad = scores_by_transformers(checkpoint(tmp_path / "run", len(rows)), texts)
    assert good > bad


def test_eval_every_save_every_and_the_optimiser(small: Small, tmp_path: Path) -> None:
    changes = {"eval_share": 0.2, "batch_size": 6, "eval_every": 2, "save_every": 2, "save_state": True}
    rows = small.run("sft", tmp_path / "run", **changes, export=str(tmp_path / "model"))
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4, 5]
    assert steps_kept(tmp_path / "run") == [2, 4, 5]
    state = load_file(checkpoint(tmp_path / "run", 4) / "state" / "optimizer.safetensors")
    shapes = sorted(tuple(tensor.shape) for key, tensor in state.items() if key.endswith("exp_avg_sq"))
    assert shapes == sorted(tuple(tensor.shape) for tensor in weights(tmp_path / "run", 4).values())
    assert {float(tensor) for key, tensor in state.items() if key.endswith(".step")} == {4.0}
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(exported[key], tensor) for key, tensor in weights(tmp_path / "run", 5).items())
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))  # nothing half-written stays


def test_without_save_state_there_is_no_state(small: Small, tmp_path: Path) -> None:
    """Contract item 11: `--need_optim_ckpt False` saved it all the same."""
    small.run("sft", tmp_path / "run", save_state=False)
    assert not (checkpoint(tmp_path / "run", 5) / "state").exists()


def test_overwrite_deletes_a_runs_own_files_only(small: Small, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small.run("sft", run, save_every=1)
    (run / "notes.txt").write_text("mine")
    (run / "old").mkdir()
    before = (run / "config.toml").read_text()
    with pytest.raises(UserError, match="the settings are not those of the run") as refused:
        small.run("sft", run, save_every=1, seed=1)
    assert "seed: 0 then, 1 now" in str(refused.value)
    assert "--overwrite" in str(refused.value)
    assert (run / "config.toml").read_text() == before
    small.run("sft", run, overwrite=True, epochs=0.4)
    assert steps_kept(run) == [2]
    assert len(metrics(run)) == 2
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "old").is_dir()


def test_a_refused_run_leaves_the_old_one_alone(small: Small, tmp_path: Path) -> None:
    """--overwrite deletes when the new run begins, not before its data and model are known to be good."""
    small.run("sft", tmp_path / "run")
    with pytest.raises(UserError, match="no tokenizer could be read"):
        small.run("sft", tmp_path / "run", overwrite=True, model=str(tmp_path))
    assert steps_kept(tmp_path / "run") == [5]


@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_lora_trains_and_saves(save: str, small: Small, tmp_path: Path) -> None:
    """Contract item 7: merged or not, the next stage starts from what was trained."""
    rows = small.run("sft", tmp_path / "run", lora_rank=4, lora_save=save, lr=1e-2, epochs=2, eval_data=small.chats)
    assert rows[-1]["eval_loss"] < rows[0]["loss"] - 0.2
    again = small.run("sft", tmp_path / "again", model=str(tmp_path / "run"), batch_size=40, lr=0.0)
    assert again[0]["loss"] == pytest.approx(rows[-1]["eval_loss"], rel=1e-4)


def test_what_was_dropped_or_cut_is_said(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = " ".join(["w5"] * 40)
    rows = [{"instruction": prompt, "output": "w6"}] * 3 + [{"instruction": "w5", "output": prompt}] * 9
    data = write_rows(tmp_path / "long.jsonl", rows)
    small.run("sft", tmp_path / "run", data=data, max_len=20, preflight="off")  # no end token is left to train
    said = capsys.readouterr().out
    assert "12 of 12 chats are longer than 20 tokens and were cut" in said
    assert "3 of 12 chats have no answer within 20 tokens and were dropped" in said


def test_the_cosine_never_rises_again(small: Small, tmp_path: Path) -> None:
    """Contract: over epochs too."""
    rates = [row["lr"] for row in small.run("reward", tmp_path / "run", epochs=3, warmup=0.2)]
    assert max(rates) == pytest.approx(1e-3)
    top = rates.index(max(rates))
    assert top == 3
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_the_run_folder_says_what_it_was_made_with(small: Small, tmp_path: Path) -> None:
    import tomllib

    small.run("sft", tmp_path / "run", lr=2e-4)
    tables = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert tables["sft"]["lr"] == 2e-4
    assert tables["environment"]["torch"] == torch.__version__
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
