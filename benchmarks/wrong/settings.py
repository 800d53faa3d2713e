"""Every setting of every command, wrong in every way: another name or type, out of range, beside what it excludes.

The ranges are written down here by themselves, from what the settings mean."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from benchmarks.wrong.cases import Case, Draw, Good
from kinkajou import config
from kinkajou.cli import STAGES

COMMANDS: dict[str, tuple[type[Any], list[str]]] = {
    **{name: (kind, [name]) for name, (kind, _) in STAGES.items()},
    "chat": (config.ChatConfig, ["chat", "folder"]),
    "demo": (config.DemoConfig, ["demo"]),
    "check": (config.CheckConfig, ["check", "sft"]),
    "profile": (config.ProfileConfig, ["profile", "sft"]),
    "plan": (config.PlanConfig, ["plan", "sft"]),
    "eval": (config.EvalRewardConfig, ["eval", "reward"]),
    "sample": (config.SampleConfig, ["sample"]),
}
NEEDS: dict[str, dict[str, str]] = {
    "sft": {"model": "m", "data": "d", "output": "o"},
    "reward": {"model": "m", "data": "d", "output": "o"},
    "prefer": {"model": "m", "data": "d", "output": "o"},
    "ppo": {"model": "m", "prompts": "p", "output": "o", "reward": "rule:ended"},
    "grpo": {"model": "m", "prompts": "p", "output": "o", "reward": "rule:ended"},
    "check": {"model": "m", "data": "d"},
    "profile": {"model": "m", "data": "d"},
    "plan": {"model": "m"},
    "eval": {"model": "m", "data": "d"},
    "sample": {"model": "m", "prompts": "p", "output": "o", "reward": "rule:ended"},
}
BOOLEAN, NUMBER, WHOLE, TEXT, CHOICE, LIST = "boolean", "number", "whole", "text", "choice", "list"

ABOVE_ZERO, NOT_NEGATIVE, SHARE, COUNT = (1e-300, math.inf), (0, math.inf), (0, 1), (1, math.inf)
ANY = (-math.inf, math.inf)
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("max_rows", "max_prompts", "tokens_per_microbatch", "tp", "log_every", "sample_every"), COUNT),
    **dict.fromkeys(("batch_size", "prompts_per_step", "max_new_tokens", "workers", "steps", "minibatch_size"), COUNT),
    **dict.fromkeys(("ptx_batch_size", "group_size", "gpus", "per_node", "max_per_prompt", "correction_cap"), COUNT),
    **dict.fromkeys(("kl_horizon", "start_timeout_s", "collective_timeout_s"), COUNT),
    **dict.fromkeys(("lora_rank", "weight_decay", "save_every", "save_minutes", "save_updates"), NOT_NEGATIVE),
    **dict.fromkeys(("keep_last", "keep_every", "from_step", "seed", "eval_every", "beta", "lr"), NOT_NEGATIVE),
    **dict.fromkeys(("desirable_weight", "undesirable_weight", "simpo_gamma", "cpo_alpha", "top_k"), NOT_NEGATIVE),
    **dict.fromkeys(("correction_bound", "max_staleness", "server_gap", "ensemble_penalty"), NOT_NEGATIVE),
    **dict.fromkeys(("reward_retries", "overlong_penalty", "kl_coef", "kl_clamp", "clip", "clip_high"), NOT_NEGATIVE),
    **dict.fromkeys(("k3_input_clamp", "k3_output_clamp", "dual_clip", "log_ratio_clamp", "value_clip"), NOT_NEGATIVE),
    **dict.fromkeys(("critic_lr", "critic_warmup", "vf_coef", "stop_kl", "score_clip", "whiten_eps"), NOT_NEGATIVE),
    **dict.fromkeys(
        ("ratio_cap", "dynamic_sampling", "group_eps", "num_shown", "epochs", "warmup", "max_skipped"), NOT_NEGATIVE
    ),
    **dict.fromkeys(("device_share", "ld_alpha", "min_p", "overlong_share", "gamma", "lam", "lam_critic"), SHARE),
    **dict.fromkeys(("ptx_coef", "ema_decay", "top_p"), SHARE),
    **dict.fromkeys(("max_norm", "discopop_tau", "server_timeout_s", "reward_timeout_s", "kl_target"), ABOVE_ZERO),
    **dict.fromkeys(("sapo_tau_positive", "sapo_tau_negative", "repetition_penalty", "scale"), ABOVE_ZERO),
    **dict.fromkeys(("tflops", "bandwidth", "link", "lora_alpha"), ABOVE_ZERO),
    **dict.fromkeys(("divergence_alpha", "alphapo_alpha", "missing_end_penalty", "threshold"), ANY),
    "vocab_size": (257, math.inf),
    "max_len": (8, math.inf),
    "row_tokens": (2, math.inf),
    "eval_share": (0, 0.9),
    "label_smoothing": (0, 0.49),
    "temperature": (0, math.inf),
}
INFINITE = ("max_norm",)
"""Where infinity means something."""
BESIDE: dict[str, dict[str, str]] = {
    "device_share": {"strategy": "gemini"},
    "workers": {"rollout": "ray"},
    "max_staleness": {"rollout": "ray"},
    "server_gap": {"rollout": "vllm", "server": "http://127.0.0.1:1"},
    "server_timeout_s": {"rollout": "vllm", "server": "http://127.0.0.1:1"},
    "label_smoothing": {"loss": "cdpo"},
    "discopop_tau": {"loss": "discopop"},
    "desirable_weight": {"loss": "kto"},
    "undesirable_weight": {"loss": "kto"},
    "simpo_gamma": {"loss": "simpo"},
    "alphapo_alpha": {"loss": "alphapo"},
    "cpo_alpha": {"loss": "cpo"},
    "divergence_alpha": {"divergence": "alpha"},
    "threshold": {"write": "threshold"},
    "max_per_prompt": {"write": "threshold", "threshold": "0"},
    "ratio_cap": {"surrogate": "clip"},
}
"""Settings without which a number would do nothing, which is refused for itself."""


@dataclasses.dataclass(frozen=True)
class Setting:
    command: str
    name: str
    kind: str


def settings() -> Iterator[Setting]:
    """Every setting of every command."""
    for command, (group, _) in COMMANDS.items():
        for name, hint in hints(group):
            yield Setting(command, name, kind_of(hint))


def hints(group: type[Any]) -> Iterator[tuple[str, Any]]:
    found = get_type_hints(group)
    for item in dataclasses.fields(group):
        hint = found[item.name]
        if dataclasses.is_dataclass(hint):
            yield from hints(hint)
        else:
            yield item.name, hint


def kind_of(hint: Any) -> str:
    hint = (
        next((one for one in get_args(hint) if one is not type(None)), hint) if type(None) in get_args(hint) else hint
    )
    if get_origin(hint) is Literal:
        return CHOICE
    return {bool: BOOLEAN, int: WHOLE, float: NUMBER, str: TEXT}.get(hint, LIST)


def given(setting: Setting, value: str) -> list[str]:
    """The command line with this setting, and what it needs besides."""
    needs = {**NEEDS.get(setting.command, {}), **BESIDE.get(setting.name, {}), setting.name: value}
    # "=": a value that begins with a dash is no flag.
    return [*COMMANDS[setting.command][1], *(f"--{name}={word}" for name, word in needs.items())]


def spelt(name: str) -> tuple[str, ...]:
    return (name, name.replace("_", "-"))


def misspelt(draw: Draw, setting: Setting) -> str:
    """A name that no setting of the command has."""
    known = {name for name, _ in hints(COMMANDS[setting.command][0])} | {"print_config", "stage"}
    if setting.command in ("check", "profile", "plan"):
        known |= {name for name, _ in hints(config.SFTConfig)}
    known |= {name.replace("_", "-") for name in known} | {f"no_{name}" for name in known}
    at = draw(st.integers(0, len(setting.name) - 1))
    letter = draw(st.sampled_from("qxz"))
    made = {
        "insert": setting.name[:at] + letter + setting.name[at:],
        "change": setting.name[:at] + letter + setting.name[at + 1 :],
        "drop": setting.name[:at] + setting.name[at + 1 :],
        "double": f"{setting.name}_{setting.name}",
    }[draw(st.sampled_from(["insert", "change", "drop", "double"]))]
    made = made.strip("_")
    return made if made and made not in known else f"{setting.name}{letter}"


def unknown_flag(draw: Draw, setting: Setting) -> Case:
    name = misspelt(draw, setting)
    needs = [f"--{key}={word}" for key, word in NEEDS.get(setting.command, {}).items()]
    arguments = [*COMMANDS[setting.command][1], *needs, f"--{name}", "1"]
    return Case("setting: unknown flag", arguments, [spelt(name)])


WRONG_WORDS = {
    WHOLE: ("two", "2.5", "", "1e999", "nan", "0x10", "1,000", "[1]", "²"),
    NUMBER: ("fast", "", "1,5", "1e", "[0.1]", "nan", "0.1.2", "--"),
    BOOLEAN: ("maybe", "2", "yess"),
    CHOICE: ("nonsense", "", "AUTO ", "0"),
}


def wrong_type(draw: Draw, setting: Setting) -> Case:
    word = draw(st.sampled_from(WRONG_WORDS[setting.kind]))
    return Case(f"setting: wrong type ({setting.kind})", given(setting, word), [spelt(setting.name)])


def beyond(draw: Draw, setting: Setting) -> Case:
    """Below or above the range, or not a number at all."""
    low, high = range_of(setting)
    words = ["nan"] if setting.kind == NUMBER else [str(10**30)]
    if setting.kind == NUMBER and setting.name not in INFINITE:
        words += ["inf", "-inf"]
    below, above = draw(st.floats(0.001, 1e6)), draw(st.floats(0.001, 1e6))
    if low > -math.inf:
        words.append(repr(math.floor(low - 1 - below) if setting.kind == WHOLE else low - below))
    if high < math.inf:
        words.append(repr(math.ceil(high + 1 + above) if setting.kind == WHOLE else high + above))
    word = draw(st.sampled_from(words))
    return Case("setting: out of range", given(setting, word), [spelt(setting.name)])


def range_of(setting: Setting) -> tuple[float, float]:
    if setting.name == "steps" or (setting.name == "epochs" and setting.kind == WHOLE):
        return COUNT
    if setting.name == "warmup" and setting.command != "profile":
        return SHARE
    return RANGES[setting.name]


WRONG_TOML = {
    WHOLE: ('"two"', "2.5", "true", "[1]", "{a = 1}", "1979-05-27", "[]"),
    NUMBER: ('"fast"', "true", "[0.5]", "{a = 1}", "07:32:00", "nan", "inf", "[]"),
    BOOLEAN: ('"maybe"', "2", "[true]", "1.5", "{}"),
    CHOICE: ("3", "true", '["a"]', '"nonsense"', '""', "{}"),
    TEXT: ("3", "true", '["a", "b"]', "2.5", "1979-05-27", "{a = 1}", "[]"),
    LIST: ("3", "true", "[1]", '[["a"]]', "{a = 1}", "2.5"),
}


def wrong_recipe(draw: Draw, setting: Setting, folder: Path) -> Case:
    value = draw(st.sampled_from([*WRONG_TOML[setting.kind]]))
    if setting.name in INFINITE and value == "inf":
        value = "true"
    needs = {name: f'"{word}"' for name, word in {**NEEDS[setting.command], **BESIDE.get(setting.name, {})}.items()}
    needs |= {setting.name: value}
    text = f"[{setting.command}]\n" + "".join(f"{name} = {word}\n" for name, word in needs.items())
    (folder / "given.toml").write_text(text)
    return Case(f"recipe: wrong type ({setting.kind})", [setting.command, "given.toml"], ["given.toml", setting.name])


def unknown_key(draw: Draw, setting: Setting, folder: Path) -> Case:
    name = misspelt(draw, setting)
    needs = "".join(f'{key} = "{word}"\n' for key, word in NEEDS[setting.command].items())
    (folder / "given.toml").write_text(f"[{setting.command}]\n{needs}{name} = 1\n")
    return Case("recipe: unknown key", [setting.command, "given.toml"], ["given.toml", spelt(name)])


EVERY = tuple(settings())
IN_RECIPES = tuple(setting for setting in EVERY if setting.command in STAGES)


def wrong_setting(draw: Draw, folder: Path, good: Good) -> Case:
    """A setting of any command, with another name, of another type or out of range, as a flag or in a recipe."""
    how = draw(st.sampled_from(["flag", "type", "range", "key", "recipe"]))
    if how == "key":
        return unknown_key(draw, draw(st.sampled_from(IN_RECIPES)), folder)
    if how == "recipe":
        return wrong_recipe(draw, draw(st.sampled_from(IN_RECIPES)), folder)
    if how == "type":
        return wrong_type(draw, draw(st.sampled_from([one for one in EVERY if one.kind in WRONG_WORDS])))
    if how == "range":
        return beyond(draw, draw(st.sampled_from([one for one in EVERY if one.kind in (NUMBER, WHOLE)])))
    return unknown_flag(draw, draw(st.sampled_from(EVERY)))


# Settings that exclude each other -> what must be named.
COMBINATIONS: tuple[tuple[str, dict[str, str], tuple[str, ...]], ...] = (
    ("sft", {"device_share": "0.5"}, ("device_share", "gemini")),
    ("sft", {"tp": "2"}, ("tp", "strategy")),
    ("reward", {"engine_weights": "copy"}, ("engine_weights", "strategy")),
    ("prefer", {"loss": "kto", "batch_size": "1"}, ("kto", "batch_size")),
    ("prefer", {"loss": "orpo", "reference": "r"}, ("reference", "orpo")),
    ("prefer", {"loss": "sigmoid", "label_smoothing": "0.1"}, ("label_smoothing", "sigmoid")),
    ("prefer", {"loss": "cdpo"}, ("cdpo", "label_smoothing")),
    ("prefer", {"divergence_alpha": "0.7"}, ("divergence_alpha", "divergence")),
    ("prefer", {"loss": "simpo", "divergence": "js"}, ("divergence", "simpo")),
    ("prefer", {"loss": "alphapo", "alphapo_alpha": "0"}, ("alphapo_alpha",)),
    ("prefer", {"loss": "none"}, ("none",)),
    ("prefer", {"loss": "-1*sigmoid"}, ("sigmoid",)),
    ("ppo", {"ptx_coef": "0.5"}, ("ptx_coef", "ptx_data")),
    ("ppo", {"keep_best": "gold"}, ("keep_best", "eval_prompts")),
    ("ppo", {"gold": "rule:ended"}, ("gold", "eval_prompts")),
    ("ppo", {"backbone": "shared", "critic": "c"}, ("backbone", "critic")),
    ("ppo", {"backbone": "shared", "critic_warmup": "3"}, ("critic_warmup",)),
    ("ppo", {"kl_horizon": "5"}, ("kl_horizon", "kl_target")),
    ("ppo", {"kl_target": "3", "kl_coef": "0"}, ("kl_coef",)),
    ("ppo", {"kl_target": "3", "kl_horizon": "2", "prompts_per_step": "64"}, ("kl_horizon",)),
    ("ppo", {"overlong_penalty": "2"}, ("overlong_penalty", "overlong_share")),
    ("ppo", {"rollout": "vllm"}, ("rollout", "server")),
    ("ppo", {"server": "http://127.0.0.1:1"}, ("server", "rollout")),
    ("ppo", {"rollout": "vllm", "server": "127.0.0.1"}, ("127.0.0.1", "server")),
    ("ppo", {"workers": "3"}, ("workers", "rollout")),
    ("ppo", {"advantage": "bandit", "lam": "0.5"}, ("lam", "advantage")),
    ("ppo", {"dialect": "trl"}, ("trl",)),
    ("ppo", {"dual_clip": "0.5"}, ("dual_clip",)),
    ("ppo", {"reward": "rule:nothing"}, ("nothing",)),
    ("ppo", {"reward": "x*rule:ended"}, ("x*rule:ended",)),
    ("grpo", {"reward": "nan*rule:ended"}, ("nan*rule:ended",)),
    ("grpo", {"reward": "rule:length:-3"}, ("rule:length", "-3")),
    ("grpo", {"reward": "no.such.module:f"}, ("no.such.module",)),
    ("grpo", {"reward": "json:no_such"}, ("no_such",)),
    ("grpo", {"reward": "no/such/folder"}, ("no/such/folder",)),
    ("grpo", {"reward": "ensemble:"}, ("ensemble:",)),
    ("grpo", {"reward": "http://"}, ("http://",)),
    ("grpo", {"group_size": "1"}, ("group_size",)),
    ("grpo", {"algorithm": "grop"}, ("grop", "grpo")),
    ("grpo", {"dialect": "coati-2023"}, ("coati-2023",)),
    ("grpo", {"surrogate": "sapo", "clip": "0.7"}, ("clip", "surrogate")),
    ("grpo", {"rollout": "ray", "max_staleness": "1", "dynamic_sampling": "2"}, ("dynamic_sampling", "max_staleness")),
    ("sample", {"write": "threshold"}, ("threshold",)),
    ("sample", {"max_per_prompt": "3"}, ("max_per_prompt", "write")),
    ("sample", {"write": "pairs", "group_size": "1"}, ("group_size",)),
    ("plan", {"memory": "many"}, ("memory", "many")),
    ("plan", {"host": "-3GB"}, ("host", "-3GB")),
    ("plan", {"gpu": "h300"}, ("h300",)),
    ("profile", {"trace": "trace.txt"}, ("trace", "trace.txt")),
    ("sft", {"stop_on": "everything"}, ("stop_on", "everything")),
    ("sft", {"strategy": "zero9"}, ("zero9",)),
    ("reward", {"output": ""}, ("output",)),
)


def wrong_combination(draw: Draw, folder: Path, good: Good) -> Case:
    stage, changes, names = draw(st.sampled_from(COMBINATIONS))
    real = {"sft": good.chats, "reward": good.pairs, "prefer": good.pairs, "ppo": good.prompts, "grpo": good.prompts}
    source = {"data": real[stage], "prompts": real[stage]} if stage in real else {}
    source |= {"prompts": good.prompts, "data": good.chats} if stage not in real else {}
    needs = {name: source.get(name, good.policy if name == "model" else word) for name, word in NEEDS[stage].items()}
    small = (
        {"prompts_per_step": "8", "minibatch_size": "8", "max_len": "48", "max_new_tokens": "8"}
        if stage in ("ppo", "grpo")
        else {}
    )
    words = [f"--{name}={word}" for name, word in {**needs, **small, **changes}.items()]
    return Case("settings that exclude each other", [*COMMANDS[stage][1], *words], [spelt(name) for name in names])
