"""The original system's commands: every flag and default, what they become, and what is refused."""

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import coati_flags
import inference
import pytest
import train_prompts
import train_reward_model
import train_sft

from kinkajou import cli
from kinkajou.config import flat, to_toml
from kinkajou.config.dialects import ppo_row
from kinkajou.errors import UserError

EXAMPLES = Path(coati_flags.__file__).parent
SCRIPTS = {"train_sft": train_sft, "train_reward_model": train_reward_model, "train_prompts": train_prompts}
COMMON = {"strategy": "naive", "model": None, "pretrain": None, "lora_rank": 0, "need_optim_ckpt": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "train_sft": {
        **COMMON,
        "dataset": None,
        "max_datasets_size": None,
        "save_path": "output",
        "max_epochs": 3,
        "batch_size": 4,
        "log_interval": 100,
        "lr": 5e-6,
        "accumulation_steps": 8,
        "max_len": 512,
        "grad_checkpoint": False,
        "use_wandb": False,
    },
    "train_reward_model": {
        **COMMON,
        "model_path": None,
        "dataset": "Dahoas/rm-static",
        "subset": None,
        "save_path": "rm_ckpt",
        "max_epochs": 1,
        "batch_size": 1,
        "max_len": 512,
        "loss_fn": "log_sig",
        "test": False,
    },
    "train_prompts": {
        **COMMON,
        "prompt_path": None,
        "pretrain_dataset": None,
        "rm_model": None,
        "rm_pretrain": None,
        "rm_path": None,
        "save_path": "actor_checkpoint_prompts",
        "num_episodes": 10,
        "max_timesteps": 10,
        "update_timesteps": 10,
        "max_epochs": 5,
        "train_batch_size": 8,
        "experience_batch_size": 8,
        "ptx_batch_size": 1,
        "kl_coef": 0.1,
        "ptx_coef": 0.9,
        "max_input_len": 96,
        "max_seq_len": 128,
    },
}
PUBLISHED = {
    "train_sft": "--pretrain BASE --model llama --strategy colossalai_zero2 --log_interval 10 --save_path OUT "
    "--dataset DATA --batch_size 4 --accimulation_steps 8 --lr 2e-5 --max_datasets_size 512 --max_epochs 1",
    "train_reward_model": "--pretrain BASE --model llama --strategy colossalai_zero2 --loss_fn log_exp --save_path OUT",
    "train_prompts": "--pretrain BASE --model llama --strategy colossalai_zero2 --prompt_path DATA "
    "--pretrain_dataset DATA --rm_pretrain BASE --rm_path RM",
}


def became(script: str, *words: str, world: int = 1) -> dict[str, Any]:
    """What a script's flags become, as flat settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world))
        module = SCRIPTS[script]
        return flat(module.settings(module.flags().read(words)))


# --- the flags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", DEFAULTS)
def test_every_flag_has_the_default_of_the_contract(script: str) -> None:
    given = vars(SCRIPTS[script].flags().read([]))
    assert {name: given[name] for name in DEFAULTS[script]} == DEFAULTS[script]


@pytest.mark.parametrize("script", DEFAULTS)
@pytest.mark.parametrize("strategy", coati_flags.STRATEGIES)
def test_every_strategy_is_a_word_of_the_command_line(script: str, strategy: str) -> None:
    assert SCRIPTS[script].flags().read(["--strategy", strategy]).strategy == strategy


@pytest.mark.parametrize("script", DEFAULTS)
@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "llama"])
def test_every_family_is_a_word_of_the_command_line(script: str, family: str) -> None:
    assert SCRIPTS[script].flags().read(["--model", family]).model == family


@pytest.mark.parametrize(
    ("script", "words", "name", "value"),
    [
        ("train_sft", "--accimulation_steps 5", "accumulation_steps", 5),
        ("train_sft", "--accumulation_steps 5", "accumulation_steps", 5),
        ("train_reward_model", "--loss_fn log_exp", "loss_fn", "log_exp"),
        ("train_reward_model", "--loss_func log_exp", "loss_fn", "log_exp"),
        ("train_reward_model", "--test True", "test", True),
        ("train_reward_model", "--test", "test", True),
        ("train_prompts", "--prompt_path x", "prompt_path", "x"),
        ("train_prompts", "--prompt_dataset x", "prompt_path", "x"),
        ("train_prompts", "--rm_model opt", "rm_model", "opt"),
    ],
)
def test_both_spellings(script: str, words: str, name: str, value: object) -> None:
    assert getattr(SCRIPTS[script].flags().read(words.split()), name) == value


@pytest.mark.parametrize("script", DEFAULTS)
@pytest.mark.parametrize(
    ("words", "saved"),
    [("", False), ("False", False), ("false", False), ("0", False), ("True", True), ("true", True), ("1", True)],
)
def test_need_optim_ckpt_means_what_it_says(script: str, words: str, saved: bool) -> None:
    flag = ["--need_optim_ckpt", words] if words else []
    assert SCRIPTS[script].flags().read(flag).need_optim_ckpt is saved


def test_a_bare_switch_is_on() -> None:
    assert train_sft.flags().read(["--need_optim_ckpt", "--lr", "1e-4"]).need_optim_ckpt is True


# --- what they become -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", PUBLISHED)
def test_the_published_command_becomes_settings(script: str, base: str, scorer: str) -> None:
    words = PUBLISHED[script].replace("BASE", base).replace("RM", scorer).replace("colossalai_zero2", "ddp").split()
    settings = became(script, *words, world=4)
    assert settings["strategy"] == "ddp"
    assert settings["model"] == base
    assert settings["family"] == "llama"
    wanted = {
        "train_sft": {"batch_size": 128, "lr": 2e-5, "log_every": 10, "max_rows": 512, "epochs": 1, "export": "OUT"},
        "train_reward_model": {"batch_size": 4, "loss": "log_exp", "eval_share": 0.1, "lr": 5e-6, "export": "OUT"},
        "train_prompts": {
            "steps": 10,
            "prompts_per_step": 320,
            "minibatch_size": 32,
            "epochs": 5,
            "ptx_batch_size": 4,
            "reward": (scorer,),
            "ptx_data": "DATA",
            "max_len": 128,
            "max_new_tokens": 32,
            "top_k": 50,
            "temperature": 1.0,
            "clip": 0.2,
            "value_clip": 0.4,
            "lr": 1e-7,
            "kl_coef": 0.1,
            "ptx_coef": 0.9,
        },
    }
    assert {name: settings[name] for name in wanted[script]} == wanted[script]


@pytest.mark.parametrize("script", PUBLISHED)
def test_the_shown_recipe_is_the_whole_of_what_the_flags_became(
    script: str, base: str, scorer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = PUBLISHED[script].replace("BASE", base).replace("RM", scorer).replace("colossalai_zero2", "naive").split()
    module = SCRIPTS[script]
    cfg = module.settings(module.flags().read([*words, "--lora_rank", "2", "--grad_checkpoint", "--overwrite"]))
    plain = {
        name: value
        for group in (getattr(cfg, item) for item in cfg.__dataclass_fields__)
        if hasattr(group, "__dataclass_fields__")
        for name, value in ((name, field.default) for name, field in group.__dataclass_fields__.items())
    }
    row = ppo_row("kinkajou") if script == "train_prompts" else {}
    plain = {name: row.get(name) if value is None else value for name, value in plain.items()}
    changed = {name for name, value in flat(cfg).items() if name in plain and value != plain[name]}
    assert changed <= set(module.BECAME)
    shown = coati_flags.as_recipe(script, cfg, module.BECAME)
    capsys.readouterr()
    assert all(f"\n{name} = " in shown for name in changed)

    recipe = tmp_path / "saved.toml"
    recipe.write_text(shown)
    stage = re.search(r"^\[(\w+)\]$", shown, re.MULTILINE)
    assert stage
    assert cli.main([stage[1], str(recipe), "--print-config"]) == 0
    resolved = tomllib.loads(capsys.readouterr().out)
    assert resolved == tomllib.loads(to_toml({stage[1]: flat(cfg)}))


def test_reward_test_run_has_100_and_10_pairs(base: str) -> None:
    from kinkajou.data.loader import hold_out

    settings = became("train_reward_model", "--pretrain", base, "--test", "True")
    train, held = hold_out(settings["max_rows"], settings["eval_share"], seed=0)
    assert (len(train), len(held)) == (100, 10)


@pytest.mark.parametrize(
    ("words", "prompts", "minibatch", "steps"),
    [
        ("--experience_batch_size 8 --update_timesteps 1 --train_batch_size 3", 9, 3, 100),
        ("--experience_batch_size 1 --update_timesteps 1 --train_batch_size 8", 8, 8, 100),
        ("--num_episodes 1 --max_timesteps 1 --update_timesteps 5", 40, 8, 1),
        ("--num_episodes 3 --max_timesteps 5 --update_timesteps 2", 16, 8, 7),
    ],
)
def test_rollouts_fill_minibatches(
    words: str, prompts: int, minibatch: int, steps: int, base: str, scorer: str
) -> None:
    start = ["--pretrain", base, "--prompt_path", "p", "--ptx_coef", "0", "--rm_path", scorer]
    settings = became("train_prompts", *start, *words.split())
    found = (settings["prompts_per_step"], settings["minibatch_size"], settings["steps"])
    assert found == (prompts, minibatch, steps)


@pytest.mark.parametrize(
    ("size", "rows", "multiple", "world", "fits"),
    [(80, 100, 8, 1, 80), (80, 79, 8, 1, 72), (80, 5, 8, 1, 5), (320, 100, 32, 4, 96), (32, 7, None, 2, 6)],
)
def test_steps_shrink_to_what_there_is(
    size: int, rows: int, multiple: int | None, world: int, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert coati_flags.smaller(size, rows, "rows", multiple=multiple) == fits


# --- what is refused --------------------------------------------------------------------------------------

REFUSED = [
    ("train_sft", "", "--pretrain is missing"),
    ("train_sft", "--pretrain BASE", "--dataset is missing"),
    ("train_sft", "--max_epoch 3", "did you mean '--max_epochs'"),
    ("train_sft", "--max-epochs 3", "did you mean '--max_epochs'"),
    ("train_sft", "--model t5", "choose from"),
    ("train_sft", "--need_optim_ckpt maybe", "true or false expected"),
    ("train_sft", "--pretrain BASE --dataset x --model gpt2", "is a llama model, not gpt2"),
    ("train_sft", "--pretrain BASE --dataset x --log_interval 0", "--log_interval must be at least 1"),
    ("train_sft", "--pretrain /no/such/folder --dataset x", "/no/such/folder does not exist"),
    ("train_sft", "--pretrain BASE --dataset no.json --save_path BASE", "did not train"),
    ("train_sft", "--pretrain BASE --dataset no.json --save_path FILE", "is a file"),
    ("train_sft", "--pretrain BASE --dataset no.json", "no.json: no such file"),
    ("train_reward_model", "--model deberta --pretrain BASE", "trunk of a language model"),
    ("train_reward_model", "--model_path BASE", "not a reward model"),
    ("train_reward_model", "--model_path FILE", "holds weights alone"),
    ("train_reward_model", "--model_path RM --model opt", "is a llama model, not opt"),
    ("train_prompts", "--pretrain BASE", "--prompt_path is missing"),
    ("train_prompts", "--pretrain BASE --prompt_path x", "--pretrain_dataset is missing"),
    ("train_prompts", "--pretrain BASE --prompt_path x --ptx_coef 0", "--rm_path is missing"),
    ("train_prompts", "--pretrain BASE --prompt_path x --ptx_coef 0 --rm_path FILE", "holds weights alone"),
    (
        "train_prompts",
        "--pretrain BASE --prompt_path x --ptx_coef 0 --rm_path RM --rm_model opt",
        "llama model, not opt",
    ),
    ("train_prompts", "--pretrain BASE --prompt_path x --ptx_coef 0 --max_input_len 128", "leaves no room"),
    ("train_prompts", "--num_episodes 0", "a whole number from 1 expected"),
    ("inference", "", "--pretrain is missing"),
    ("inference", "--model_path FILE", "holds weights alone"),
    ("inference", "--model_path BASE --model bloom", "is a llama model, not bloom"),
    ("inference", "--model_path BASE --max_length 2", "--max_length leaves no room"),
    ("inference", "--model_path RM", "holds a reward model"),
]


@pytest.mark.parametrize(("script", "words", "said"), REFUSED)
def test_refusals(
    script: str, words: str, said: str, base: str, scorer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "old.pt"
    file.write_bytes(b"")
    paths = {"BASE": base, "RM": scorer, "FILE": str(file)}
    module = inference if script == "inference" else SCRIPTS[script]
    assert module.main([paths.get(word, word) for word in words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error


def test_errors_of_the_trainers_speak_of_the_old_flags() -> None:
    text = "--log_every and --minibatch_size and --max_len and --model and --unheard"
    wanted = "--log_interval and --train_batch_size and --max_seq_len and --model and --unheard"
    assert coati_flags.in_old_words(text, train_prompts.flags(), train_prompts.BECAME) == wanted


def test_a_batch_that_nobody_can_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="3 usable rows are too few for 4 processes"):
        coati_flags.smaller(32, 3, "rows")


# --- the shell files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "script"),
    [("train_sft", "train_sft"), ("train_rm", "train_reward_model"), ("train_prompts", "train_prompts")],
)
def test_the_shell_files_hold_the_published_flags(shell: str, script: str, tmp_path: Path) -> None:
    stand_in = tmp_path / "torchrun"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    path = EXAMPLES / f"{shell}.sh"
    subprocess.run(["bash", "-n", path], check=True)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STRATEGY": "colossalai_zero2"}
    done = subprocess.run([path], env=environment, capture_output=True, text=True, check=True)
    runner, place, *words = done.stdout.split("\n", 3)[1:3] + done.stdout.splitlines()[3:]
    assert runner == "--nproc_per_node=4"
    assert Path(place) == EXAMPLES / f"{script}.py"
    given = SCRIPTS[script].flags().read(words)
    published = SCRIPTS[script].flags().read(PUBLISHED[script].split())
    paths = {"pretrain", "dataset", "save_path", "prompt_path", "pretrain_dataset", "rm_pretrain", "rm_path"}
    assert {k: v for k, v in vars(given).items() if k not in paths} == {
        k: v for k, v in vars(published).items() if k not in paths
    }
    assert {k for k in paths if getattr(published, k, None)} <= {k for k in paths if getattr(given, k, None)}
