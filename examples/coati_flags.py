"""What the scripts share: the old command line, how it is refused, and how the settings it became are shown."""

import argparse
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from kinkajou import config
from kinkajou.errors import UserError, did_you_mean

STRATEGIES = ("naive", "ddp", "colossalai_gemini", "colossalai_zero2", "colossalai_zero2_cpu")
FAMILIES = ("gpt2", "bloom", "opt", "llama")
Became = Mapping[str, str]
"""Setting -> the old flags it comes from, or why it has its value."""
C = TypeVar("C", config.SFTConfig, config.RewardConfig, config.PPOConfig)

RUN_BECAME: Became = {
    "strategy": "--strategy",
    "model": "--pretrain",
    "family": "--model",
    "lora_rank": "--lora_rank",
    "gradient_checkpointing": "--grad_checkpoint",
    "lr": "--lr",
    "export": "--save_path",
    "output": "--save_path: the run's records",
    "overwrite": "--overwrite",
    "save_state": "--need_optim_ckpt",
    "log_every": "--log_interval",
}


class Flags(argparse.ArgumentParser):
    """An old script's flags, spelt exactly as then; a fault is a UserError, a typo gets a suggestion."""

    def __init__(self, script: str, purpose: str) -> None:
        super().__init__(
            prog=script,
            description=purpose,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def add_switch(self, name: str, purpose: str) -> None:
        """`--name`, `--name True`, `--name false`, `--name 0`: the old `type=bool` took every word for True."""
        self.add_argument(name, nargs="?", type=switch, const=True, default=False, metavar="true|false", help=purpose)

    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix=f"{self.prog} --help")

    def read(self, arguments: Sequence[str] | None = None) -> Namespace:
        flags, unknown = self.parse_known_args(arguments)
        if unknown:
            word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            known = sorted(self._option_string_actions)
            raise UserError(f"{self.prog} has no flag {word}", fix=did_you_mean(word, known))
        return flags


def switch(word: str) -> bool:
    if word.lower() not in ("true", "false", "0", "1"):
        raise argparse.ArgumentTypeError(f"true or false expected, not {word!r}")
    return word.lower() in ("true", "1")


def training_flags(script: str, purpose: str, *, save_path: str, lr: float, log_interval: int) -> Flags:
    """The flags that all three stages have."""
    flags = Flags(script, purpose)
    flags.add_argument("--strategy", choices=STRATEGIES, default="naive", help="how processes share the work")
    flags.add_argument("--pretrain", help="folder or hub id of the weights to start from")
    flags.add_argument("--save_path", default=save_path, help="folder for the final model; SAVE_PATH/run has the rest")
    flags.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in --save_path (new)")
    flags.add_switch("--need_optim_ckpt", "also save the optimiser's state")
    flags.add_argument("--lora_rank", type=int, default=0, help="rank of LoRA adapters; 0 trains all weights")
    flags.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    flags.add_argument("--log_interval", type=int, default=log_interval, help="console line every N steps")
    flags.add_switch("--grad_checkpoint", "recompute activations: less memory, more time")
    flags.add_switch("--use_wandb", "accepted; metrics go to SAVE_PATH/run/metrics.jsonl")
    return flags


# --- from flags to settings -------------------------------------------------------------------------------


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def need(flags: Namespace, name: str, what: str) -> str:
    value = getattr(flags, name)
    if not value:
        raise UserError(f"--{name} is missing", fix=f"give --{name}: {what}")
    return str(value)


def need_folder(flags: Namespace, name: str, what: str, *, base: str | None = None) -> str:
    """A model's folder or hub id; weights that the old system kept become one: `base` says what they are of."""
    import coati_weights

    value = need(flags, name, what)
    local = value.startswith(("/", ".", "~")) or value.count("/") > 1  # a hub id is owner/name
    if local and not Path(value).exists():
        raise UserError(f"--{name} {value} does not exist", fix=f"give {what}")
    return coati_weights.converted(f"--{name}", value, base) if coati_weights.is_old(Path(value)) else value


def base_config(flags: Namespace, model: str, max_len: int) -> config.ModelConfig:
    flag = "--model_path" if getattr(flags, "model_path", None) else "--pretrain"
    check_family(flag, model, flags.model, since=f"--model {flags.model}", fix="leave --model out: it is detected")
    return config.ModelConfig(
        model=model,
        family=flags.model,
        max_len=max_len,
        lora_rank=flags.lora_rank,
        gradient_checkpointing=flags.grad_checkpoint,
    )


def run_config(flags: Namespace) -> config.RunConfig:
    """The final model lies in `--save_path` itself, so that whatever reads a Hugging Face folder reads it."""
    return config.RunConfig(
        output=str(Path(flags.save_path) / "run"),
        export=str(Path(flags.save_path)),
        overwrite=flags.overwrite,
        log_every=flags.log_interval,
    )


def keep_config(flags: Namespace) -> config.KeepConfig:
    return config.KeepConfig(save_state=flags.need_optim_ckpt)


def smaller(size: int, rows: int, what: str, *, multiple: int | None = None) -> int:
    """A batch that `rows` can fill and all processes share; the old loader went on with what there was."""
    shared = rows // world() * world()
    if shared < 1:
        raise UserError(f"{rows} usable {what} are too few for {world()} processes", fix="give more data")
    unit = min(multiple or world(), shared)
    fits = min(size, rows // unit * unit)
    if fits < size:
        say(f"note: a step takes {fits} {what} instead of {size}: there are only {rows} usable ones")
    return fits


def hub_config(source: str) -> dict[str, Any]:
    """A model's config.json; empty where there is none to read, which the loader will then say better."""
    from transformers import PreTrainedConfig

    from kinkajou.models.load import find_model

    try:
        return dict(PreTrainedConfig.get_config_dict(find_model(source))[0])
    except (OSError, ValueError):
        return {}


def check_family(flag: str, source: str, wanted: str | None, *, since: str, fix: str) -> None:
    """Refuses a model of another family than something else says it is, with both names."""
    if not wanted:
        return
    found = hub_config(source).get("model_type")
    if found and found != wanted:
        raise UserError(f"{flag} {source} is a {found} model, not {wanted}", evidence=since, fix=fix)


# --- running ----------------------------------------------------------------------------------------------


def train(
    flags: Flags,
    became: Became,
    settings: Callable[[Namespace], C],
    start: Callable[[C], None],
    arguments: Sequence[str] | None = None,
    fitted: Callable[[C], C] = lambda cfg: cfg,
) -> int:
    """Reads the flags, shows what they became and trains; returns the exit code."""

    def work(given: Namespace) -> None:
        cfg = settings(given)
        check_save_path(Path(given.save_path), overwrite=given.overwrite)
        cfg = fitted(cfg)
        say(as_recipe(flags.prog, cfg, became))
        if given.use_wandb:
            say(f"note: --use_wandb sends nothing: every step's metrics are in {cfg.run.output}/metrics.jsonl")
        start(cfg)
        say(f"model: {given.save_path}")

    return guarded(flags, became, work, arguments)


def guarded(flags: Flags, became: Became, work: Callable[[Namespace], None], arguments: Sequence[str] | None) -> int:
    try:
        work(flags.read(arguments))
    except UserError as fault:
        if rank():
            time.sleep(5)  # rank 0 most likely says the same, and torchrun then ends this process
        print(in_old_words(str(fault), flags, became), file=sys.stderr, flush=True)
        return fault.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def check_save_path(path: Path, *, overwrite: bool) -> None:
    """Nothing that lies there is lost unless the user says so.  Only rank 0 looks."""
    if rank():
        return
    if path.is_file():
        raise UserError(f"--save_path {path} is a file", fix="a model is saved as a folder: choose another name")
    if path.suffix in (".pt", ".pth", ".bin"):
        say(f"note: --save_path {path} becomes a folder of that name: a model here is a folder of safetensors")
    if (path / "run" / "config.toml").is_file():
        if not overwrite:
            raise UserError(
                f"{path} already holds a run",
                evidence=f"{path / 'run' / 'config.toml'} exists",
                fix="choose another --save_path, or pass --overwrite to replace that run and its model",
            )
    elif (path / "config.json").is_file():
        raise UserError(
            f"--save_path {path} holds a model that these scripts did not train",
            evidence=f"{path / 'config.json'} exists",
            fix="choose another --save_path",
        )


def as_recipe(script: str, cfg: config.StageConfig, became: Became) -> str:
    """What the flags became, in the form of a recipe for `kinkajou STAGE`."""
    stage = {config.SFTConfig: "sft", config.RewardConfig: "reward", config.PPOConfig: "ppo"}[type(cfg)]
    values = config.flat(cfg)
    rows = [(f"{name} = {config.toml_value(values[name])}", why) for name, why in became.items()]
    rows = [row for row, name in zip(rows, became, strict=True) if values[name] is not None]
    width = min(48, max(len(row) for row, _ in rows))
    lines = [f"{row:<{width}}  # {why}" for row, why in rows]
    processes = "1 process" if world() == 1 else f"{world()} processes"
    return "\n".join([f"# {script} on {processes}, as a recipe of `kinkajou {stage}`:", f"[{stage}]", *lines, ""])


def in_old_words(text: str, flags: Flags, became: Became) -> str:
    """A message with the names of settings replaced by the old flags that they come from."""

    def old(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        if f"--{name}" in flags._option_string_actions:
            return f"--{name}"
        named = re.match(r"--\w+", became.get(name, ""))
        return named[0] if named else found[0]

    return re.sub(r"--(\w+(?:-\w+)*)", old, text)


def parallel_config(flags: Namespace) -> config.ParallelConfig:
    return config.ParallelConfig(strategy=flags.strategy)
