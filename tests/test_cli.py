"""Bad input on the command line: exit code 2, no traceback, the thing named and the way out; recipes; ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kinkajou.cli import main
from small import Small, metrics, write_rows
from tiny import VOCAB, save_source, tiny_tokenizer

Refused = Callable[..., str]
ANY = ("--model", "m", "--data", "d", "--output", "o")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command that must be refused; returns what it said."""
    monkeypatch.chdir(tmp_path)

    def check(*arguments: object, names: tuple[str, ...]) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert "Traceback" not in said
        for name in names:
            assert name in said
        return said

    return check


def sft(small: Small, **changes: object) -> list[str]:
    flags = {"model": small.policy, "data": small.chats, "output": "run", "template": "plain", "max-len": 48}
    return flagged("sft", {**flags, "batch-size": 8, "epochs": 0.2, **changes})


def ppo(small: Small, **changes: object) -> list[str]:
    flags = {"model": small.policy, "prompts": small.prompts, "reward": small.judge, "output": "run", "steps": 1}
    more = {"prompts_per_step": 8, "minibatch_size": 8, "template": "plain", "max_len": 48, "max_new_tokens": 8}
    return flagged("ppo", {**flags, **more, **changes})


def flagged(stage: str, flags: dict[str, object]) -> list[str]:
    return [stage, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


# --- data -------------------------------------------------------------------------------------------------

GOOD = '{"instruction": "w5", "output": "w6"}'
BAD_FILES = {
    "empty": ("", "no rows"),
    "broken": (f'{GOOD}\n{{"instruction": "w5", "outp\n', "data.jsonl:2"),
    "fields": ('{"instruction": "w5", "outptu": "w6"}\n', 'rename "outptu" to "output"'),
    "answer": (f'{GOOD}\n{{"instruction": "w5", "output": " "}}\n', 'data.jsonl:2: field "output" is empty'),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_data_names_file_and_line(fault: str, small: Small, tmp_path: Path, refused: Refused) -> None:
    text, words = BAD_FILES[fault]
    (tmp_path / "data.jsonl").write_text(text)
    said = refused(*sft(small, data="data.jsonl"), names=("data.jsonl", words))
    assert "fix:" in said
    assert not (tmp_path / "run").exists()


def test_a_missing_file_names_its_neighbour(small: Small, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "data.jsonl").write_text(GOOD)
    refused(*sft(small, data="dat.jsonl"), names=("dat.jsonl: no such file", "did you mean data.jsonl"))


def test_skipped_rows_are_counted_and_listed(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(f"{GOOD}\n" * 8 + "[]\n")
    assert main(sft(small, data="data.jsonl", **{"bad-rows": "skip"})) == 0
    assert "skipped 1 bad row: data.jsonl:9" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_bad_data_is_refused_before_torch_is_imported(stage: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    key = "prompts" if stage == "ppo" else "data"
    rest = ["--reward", "rule:ended"] if stage == "ppo" else []
    code = (
        "import sys; from kinkajou.cli import main; rc = main(sys.argv[1:]);"
        "heavy = [m for m in ('torch', 'transformers', 'peft') if m in sys.modules]; print(rc, heavy)"
    )
    command = [sys.executable, "-c", code, stage, "--model", "gpt2", f"--{key}", "bad.jsonl", "--output", "run", *rest]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"
    assert "bad.jsonl:1" in done.stderr


# --- models, context, batches, folders --------------------------------------------------------------------


def test_family_and_weights_that_do_not_fit(small: Small, refused: Refused) -> None:
    refused(*sft(small, family="gpt2"), names=("is a llama model, not gpt2", small.policy))


def test_a_tokenizer_larger_than_the_embedding(small: Small, tmp_path: Path, refused: Refused) -> None:
    tiny_tokenizer(words=VOCAB + 20).save_pretrained(tmp_path / "large")
    names = ("tokenizer does not fit", f"{VOCAB + 22} entries", f"{VOCAB} rows", "--tokenizer")
    refused(*sft(small, tokenizer=tmp_path / "large"), names=names)


def test_a_tokenizer_without_end_token(small: Small, tmp_path: Path, refused: Refused) -> None:
    tiny_tokenizer(end=None).save_pretrained(tmp_path / "endless")
    refused(*sft(small, tokenizer=tmp_path / "endless"), names=("no end token", "endless", "eos_token"))


def test_a_model_that_is_not_there(small: Small, tmp_path: Path, refused: Refused) -> None:
    refused(*sft(small, model=tmp_path / "nowhere"), names=("nowhere",))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_longer_than_the_context(stage: str, small: Small, tmp_path: Path, refused: Refused) -> None:
    """The tiny model has 64 positions."""
    words = " ".join(["w5"] * 60)
    if stage == "sft":
        data = write_rows(tmp_path / "long.jsonl", [{"instruction": "w5", "output": f"{words} {words}"}] * 8)
        arguments = sft(small, data=data, **{"max-len": 512})
    else:
        data = write_rows(tmp_path / "long.jsonl", [{"prompt": words}] * 8)
        arguments = ppo(small, prompts=data, max_len=512)
    names = ("longer than the model's context", "positions for 64", "--max_len 64")
    refused(*arguments, names=names)


def test_a_prompt_that_leaves_no_room(small: Small, tmp_path: Path, refused: Refused) -> None:
    rows = [{"prompt": "w5"}, {"prompt": " ".join(["w5"] * 41)}]
    data = write_rows(tmp_path / "long.jsonl", rows)
    names = ("long.jsonl:2: the prompt is too long", "41 tokens", "--max_len", "--bad_rows skip")
    refused(*ppo(small, prompts=data), names=names)


def test_not_enough_for_a_batch(small: Small, refused: Refused) -> None:
    refused(*ppo(small, prompts_per_step=64), names=("not enough", "40 usable rows", "a batch takes 64"))
    refused(*sft(small, **{"batch-size": 41}), names=("not enough", "40 usable rows", "a batch takes 41"))
    refused(*ppo(small, minibatch_size=3), names=("multiple of minibatch_size", "8 and 3"))


def test_a_folder_that_holds_a_run(small: Small, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("[sft]\n")
    for arguments in (sft(small), ppo(small)):
        refused(*arguments, names=("already holds a run", "run/config.toml", "--overwrite"))
    assert (tmp_path / "run" / "config.toml").read_text() == "[sft]\n"


def test_reward_models_that_cannot_judge(small: Small, tmp_path: Path, refused: Refused) -> None:
    refused(*ppo(small, reward=small.policy), names=("no scalar head", small.policy, "kinkajou reward"))
    save_source(tmp_path / "other", AutoModelForSequenceClassification, "llama", tiny_tokenizer(words=50))
    refused(*ppo(small, reward=tmp_path / "other"), names=("different vocabularies", "other", "52"))
    refused(*ppo(small, model=small.judge), names=("holds a reward model, not a language model",))
    refused(*ppo(small, reward="rule:lenght:3"), names=("unknown rule 'lenght'", "did you mean 'length'"))
    refused(*ppo(small, reward="rule:length:many"), names=("number of words", '"many"', "rule:length:40"))


def test_a_model_whose_pad_token_is_its_end_token_trains(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract item 6: the end token was masked out when pad == eos.  Not an error: pad gets its own token."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer(pad=None)
    tokenizer.pad_token = tokenizer.eos_token
    save_source(tmp_path / "shared", AutoModelForCausalLM, "llama", tokenizer, vocab_size=len(tokenizer))
    assert main(sft(small, model=tmp_path / "shared")) == 0


# --- flags ------------------------------------------------------------------------------------------------

FLAGS: list[tuple[list[str], tuple[str, ...]]] = [
    (["--strategy", "zero4"], ("unknown strategy 'zero4'", "did you mean 'zero")),
    (["--device-share", "0.5"], ("--device_share is gemini's", "naive")),
    (["--tp", "0"], ("--tp must be at least 1", "0")),
    (["--tp", "2"], ("where weights are sharded", "--strategy zero3")),
    (["--engine-weights", "sharded"], ("where weights are sharded", "--strategy naive")),
    (["--strategy", "dpp"], ("unknown strategy 'dpp'", "did you mean 'ddp'")),
    (["--batchsize", "4"], ("--batchsize", "--batch-size")),
    (["--batch-size", "two"], ("--batch-size", '"two"')),
    (["--batch-size", "2.5"], ("--batch-size", '"2.5"')),
    (["--batch-size", "0"], ("--batch_size must be at least 1", "0")),
    (["--warmup", "1.5"], ("--warmup must lie between 0 and 1", "1.5")),
    (["--lr", "nan"], ("--lr", "nan", "finite number")),
    (["--lr", "inf"], ("--lr", "inf", "finite number")),
    (["--max-norm", "nan"], ("--max-norm", "nan")),
    (["--lora-alpha", "-1"], ("--lora_alpha must be at least",)),
    (["--seed", "1e30"], ("--seed", "1e30")),
    (["--dtype", "fp16"], ("fp16", "bf16")),
    (["--overwrite", "False"], ("False",)),
]


@pytest.mark.parametrize(("flags", "names"), FLAGS)
def test_flags(flags: list[str], names: tuple[str, ...], refused: Refused) -> None:
    refused("sft", *ANY, *flags, names=names)


def test_what_is_missing_is_named(refused: Refused) -> None:
    refused("sft", names=("--model is missing",))
    refused("sft", "--model", "m", "--data", "d", names=("--output is missing",))
    refused("ppo", "--model", "m", "--prompts", "p", "--output", "o", names=("--reward is missing",))
    refused("stf", names=('"stf"', 'Did you mean "sft"', "kinkajou --help"))


def test_settings_of_ppo_that_need_each_other(refused: Refused) -> None:
    base = ["ppo", "--model", "m", "--prompts", "p", "--output", "o", "--reward", "rule:ended"]
    refused(*base, "--ptx_coef", "0.5", names=("ptx_data", "--ptx_coef 0"))
    refused(*base, "--keep_best", "score", names=("keep_best", "--eval_prompts", "--eval_every"))
    held = ("--eval_prompts", "h", "--eval_every", "1")
    refused(*base, "--keep_best", "gold", *held, names=("no gold judge", "--gold"))


# --- recipes ----------------------------------------------------------------------------------------------

FULL = 'model = "m"\ndata = "d"\noutput = "o"\n'
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "toml": ("[sft\n", ("not valid TOML", "line 1")),
    "key": (f"[sft]\n{FULL}batchsize = 3\n", ("batchsize", "batch-size")),
    "type": (f'[sft]\n{FULL}lr = "fast"\n', ("[lr]", '"fast"')),
    "bool": (f"[sft]\n{FULL}batch_size = true\n", ("[batch_size]", "True")),
    "fraction": (f"[sft]\n{FULL}batch_size = 2.5\n", ("[batch_size]", '"2.5"')),
    "choice": (f'[sft]\n{FULL}dtype = "fp16"\n', ("[dtype]", "bf16")),
    "text": (f"[sft]\n{FULL}family = 3\n", ("[sft] family must be one text", "family = 3")),
    "texts": (f'[sft]\n{FULL}stop_on = ["any", 3]\n', ("[sft] stop_on must be texts in brackets", "stop_on = 3")),
    "list": ('[sft]\nmodel = ["m"]\n', ("[sft] model must be one text",)),
    "table": (f"[stf]\n{FULL}", ("[stf]", "did you mean 'sft'")),
    "stage": ('[ppo]\nmodel = "m"\n', ("no table [sft]", "it has: ppo")),
    "top": (FULL, ("'model' stands before any table", "[sft]")),
}


@pytest.mark.parametrize("fault", RECIPES)
def test_recipes_are_checked_like_flags(fault: str, tmp_path: Path, refused: Refused) -> None:
    text, names = RECIPES[fault]
    (tmp_path / "my-recipe.toml").write_text(text)
    refused("sft", "my-recipe.toml", names=("my-recipe.toml", *names))


def test_a_recipe_that_is_not_there(refused: Refused) -> None:
    refused("sft", "recipes/stf.toml", names=("no recipe at recipes/stf.toml",))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, "--print-config"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_our_recipes_print_and_reproduce_themselves(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(__file__).parents[1] / "recipes" / f"{stage}.toml"
    flags = ["--seed", "7", "--export", 'a "b" \\ c\td', "--lr", "3e-7"]
    text = printed(capsys, stage, str(recipe), *flags)
    resolved = tomllib.loads(text)[stage]
    given = tomllib.loads(recipe.read_text())[stage]
    assert {name: resolved[name] for name in given} == {**given, "lr": 3e-7}  # a flag overrides the recipe
    assert resolved["export"] == flags[3]
    assert resolved["seed"] == 7
    (tmp_path / "again.toml").write_text(text)
    assert printed(capsys, stage, str(tmp_path / "again.toml")) == text


def test_a_runs_config_is_a_recipe(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers again, from the file that the run left behind."""
    monkeypatch.chdir(tmp_path)
    assert main(sft(small, epochs=0.6, seed=3)) == 0
    assert main(["sft", "run/config.toml", "--output", "again"]) == 0
    capsys.readouterr()
    one, two = ([row["loss"] for row in metrics(tmp_path / run)] for run in ("run", "again"))
    assert one == two
    assert len(one) == 3


# --- ctrl-C -----------------------------------------------------------------------------------------------


def test_an_interrupt_ends_quietly(small: Small, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kinkajou", *sft(small, epochs=20_000)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    try:
        while not (log.is_file() and log.stat().st_size > 0):
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < end, "no step was made"
            time.sleep(0.1)
        job.send_signal(signal.SIGINT)
        _, said = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 130
    assert re.search(r"stopped by SIGINT; saved: run/checkpoints/step-\d+; the same command goes on", said)
    assert "Traceback" not in said
    assert all("loss" in json.loads(line) for line in log.read_text().splitlines())


def test_the_reader_of_the_output_leaves(small: Small, tmp_path: Path) -> None:
    """`kinkajou sft ... | head -1`: the run is made to its end."""
    command = [sys.executable, "-m", "kinkajou", *sft(small), "--log_every", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout
    assert job.stderr
    with job.stderr:
        job.stdout.readline()
        job.stdout.close()
        said = job.stderr.read()
        assert job.wait(timeout=200) == 0
    assert said.strip() == "note: nobody reads the output any more; the work goes on"
    assert (tmp_path / "run" / "done.json").is_file()


def test_pydantic_beside_us_changes_no_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """cyclopts would check by it what a dialect has not filled in yet."""
    flags = ["--model", "m", "--prompts", "p", "--reward", "r", "--output", "o", "--print-config"]
    import pydantic

    assert main(["ppo", *flags]) == 0
    assert 'advantage = "gae"' in capsys.readouterr().out
    assert sys.modules["pydantic"] is pydantic
