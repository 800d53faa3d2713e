"""The original system's commands for real: each stage with tiny models, chained up to an answer."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import coati_flags
import pytest
import train_prompts
import train_sft
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tiny import save_source, tiny_tokenizer

EXAMPLES = Path(coati_flags.__file__).parent


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fifty records of each kind: fewer than the hundred below which the old scheduler crashed; one is bad."""
    folder = tmp_path_factory.mktemp("data")
    chats = [{"instruction": f"w{i} w7", "input": "", "output": f"w9 w{i}"} for i in range(10, 60)]
    pairs = [{"prompt": f"w{i}", "chosen": f"w{i} w8", "rejected": "w9"} for i in range(10, 60)]
    (folder / "chats.json").write_text(json.dumps([*chats, {"instruction": "w3", "output": ""}]))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    long = {"instruction": "w5 " * 200}
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in [*chats, long]) + '\n{"broken\n')
    return {name: next(folder.glob(f"{name}.*")) for name in ("chats", "pairs", "prompts")}


def run(script: str, *words: str | Path, torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it, from another folder."""
    start = [sys.executable]
    if torchrun:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(
        [*start, str(EXAMPLES / f"{script}.py"), *map(str, words)],
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tuned(base: str, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("runs") / "sft"
    words = ["--pretrain", base, "--model", "llama", "--dataset", files["chats"], "--save_path", out]
    small = ["--batch_size", "2", "--accimulation_steps", "5", "--max_epochs", "1", "--log_interval", "2"]
    return out, succeeded(run("train_sft", *words, *small, "--need_optim_ckpt", "False", "--use_wandb"))


def console_steps(said: str) -> list[int]:
    return [int(step) for step in re.findall(r"^\w+ (\d+)/\d+ ", said, re.MULTILINE)]


def test_sft_leaves_a_plain_model_where_save_path_says(tuned: tuple[Path, str]) -> None:
    out, said = tuned
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "llama"
    assert (out / "run" / "metrics.jsonl").is_file()
    assert not list(out.rglob("state"))
    assert "batch_size = 10" in said
    assert "note: --use_wandb sends nothing" in said


def test_log_interval_has_an_effect_and_fewer_than_100_rows_do_not_crash(tuned: tuple[Path, str]) -> None:
    out, said = tuned
    assert console_steps(said) == [2, 4, 5]
    assert len((out / "run" / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_second_run_is_refused_in_the_words_of_the_old_flags(
    tuned: tuple[Path, str], base: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pretrain", base, "--dataset", str(files["chats"]), "--save_path", str(tuned[0])]
    assert train_sft.main(words) == 2
    error = capsys.readouterr().err
    assert "already holds a run" in error
    assert "--save_path" in error


def test_the_chain_to_an_answer(tuned: tuple[Path, str], files: dict[str, Path], tmp_path: Path) -> None:
    sft, rm, actor = tuned[0], tmp_path / "rmstatic.pt", tmp_path / "actor"
    words = ["--pretrain", sft, "--dataset", files["pairs"], "--loss_fn", "log_exp", "--save_path", rm]
    said = succeeded(run("train_reward_model", *words, "--batch_size", "10", "--need_optim_ckpt"))
    assert "becomes a folder of that name" in said
    assert "eval_accuracy" in said
    assert list((rm / "run" / "checkpoints").glob("*/state/optimizer.safetensors"))

    words = ["--pretrain", sft, "--rm_path", rm, "--rm_pretrain", sft, "--save_path", actor]
    data = ["--prompt_path", files["prompts"], "--pretrain_dataset", files["chats"]]
    small = ["--max_epochs", "1", "--num_episodes", "1", "--max_input_len", "30", "--max_seq_len", "36"]
    done = run("train_prompts", *words, *data, *small)
    said = succeeded(done)
    assert "a step takes 48 prompts instead of 80: there are only 50 usable ones" in said
    assert "1 of 51 prompts are longer than 30 tokens and were skipped" in said
    assert "skipped 1 bad row" in done.stderr
    assert console_steps(said) == [1]

    said = succeeded(
        run("inference", "--model", "llama", "--model_path", actor, "--input", "w11 w7", "--max_length", 30)
    )
    assert said.strip()


def test_the_reward_model_may_be_of_another_family(base: str, files: dict[str, Path], tmp_path: Path) -> None:
    scorer = tmp_path / "opt"
    save_source(scorer, AutoModelForSequenceClassification, "opt", tiny_tokenizer(), max_position_embeddings=256)
    words = ["--pretrain", base, "--model", "llama", "--rm_path", str(scorer), "--rm_model", "opt", "--ptx_coef", "0"]
    data = ["--prompt_path", str(files["pairs"]), "--save_path", str(tmp_path / "actor"), "--max_epochs", "1"]
    small = ["--num_episodes", "1", "--max_timesteps", "1", "--max_input_len", "30", "--max_seq_len", "34"]
    assert train_prompts.main([*words, *data, *small, "--update_timesteps", "1"]) == 0


@pytest.mark.slow
def test_two_processes_train_as_one(base: str, files: dict[str, Path], tmp_path: Path) -> None:
    losses = []
    for batch, torchrun in (("10", False), ("5", True)):
        out = tmp_path / f"ddp-{torchrun}"
        words = ["--pretrain", base, "--dataset", files["chats"], "--save_path", out, "--max_epochs", "1"]
        strategy = "ddp" if torchrun else "naive"
        done = run(
            "train_sft", *words, "--strategy", strategy, "--batch_size", batch, "--accumulation_steps", "1",
            torchrun=torchrun,
        )  # fmt: skip
        assert succeeded(done).count("[sft]") == 1
        assert "Warning" not in done.stderr
        rows = (out / "run" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_naive_under_torchrun_is_refused(base: str, files: dict[str, Path], tmp_path: Path) -> None:
    words = ["--pretrain", base, "--dataset", files["chats"], "--save_path", tmp_path / "x"]
    done = run("train_sft", *words, torchrun=True)
    assert done.returncode != 0
    assert "strategy 'naive' is one process, but torchrun started several" in done.stderr
