"""What the trials of `benchmarks.faults` train: models of 20 thousand weights, forty records, and a table of variants.

Words are w2, w3, ..., one token each, so that an answer is never cut inside a word.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import WhitespaceSplit

from benchmarks.models import VOCABULARY, tokenizer, write_models
from kinkajou import config

ROWS = 24
RUN = "run"
ALL = {"template": "plain", "max_len": 48, "lr": 1e-3, "log_every": 100, "sample_every": 2, "preflight": "off"}
RECORDS = {"epochs": 2.0, "batch_size": 8, "save_every": 2}
ROLLED = {"steps": 3, "epochs": 2, "max_new_tokens": 6, "save_every": 1, "save_updates": 1}
WATCHED = {"score_scale": "mean_std", "kl_coef": 0.05, "kl_target": 0.5, "kl_horizon": 200.0, "ema_decay": 0.8}
PPO = {**ROLLED, **WATCHED, "reward": "judge", "prompts_per_step": 8, "minibatch_size": 4}
GRPO = {**ROLLED, **WATCHED, "reward": "judge", "prompts_per_step": 4, "group_size": 2, "minibatch_size": 4}
LORA = {"lora_rank": 2}
ADAPTER = {**LORA, "lora_save": "adapter"}
IN_FRONT = {"dtype": "bf16", "save_behind": False, "keep_last": 2}
BEST = {"eval_prompts": "held_out", "eval_every": 1, "keep_best": "score"}
PATHS = ("model", "data", "prompts", "reward", "eval_prompts", "ptx_data")
"""Settings whose value is a name in the world's folder."""


@dataclass(frozen=True)
class Variant:
    stage: str
    changes: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "sft": Variant("sft"),
    "sft-lora": Variant("sft", LORA),
    "sft-adapter": Variant("sft", {**ADAPTER, "keep_last": 1}),
    "sft-bf16": Variant("sft", {**IN_FRONT, "eval_share": 0.2, "eval_every": 2}),
    "reward": Variant("reward"),
    "reward-lora": Variant("reward", {**LORA, "eval_share": 0.2, "eval_every": 2}),
    "reward-bf16": Variant("reward", IN_FRONT),
    "prefer": Variant("prefer"),
    "prefer-lora": Variant("prefer", LORA),
    "prefer-bf16": Variant("prefer", {**IN_FRONT, "eval_share": 0.2, "eval_every": 2}),
    "ppo": Variant("ppo", {"keep_last": 3}),
    "ppo-shared": Variant("ppo", {"backbone": "shared"}),
    "ppo-lora-ptx": Variant("ppo", {**LORA, "ptx_data": "chats", "ptx_coef": 0.3, "ptx_batch_size": 4}),
    "ppo-best": Variant("ppo", {**BEST, "keep_last": 2, "seed": 1}),  # its best is an early step
    "ppo-bf16": Variant("ppo", IN_FRONT),
    "grpo": Variant("grpo", {"keep_last": 3}),
    "grpo-dynamic": Variant("grpo", {"reward": "rule:ended", "dynamic_sampling": 2}),
    "grpo-adapter": Variant("grpo", ADAPTER),
    "grpo-best": Variant("grpo", {**BEST, "keep_last": 2}),
    "grpo-bf16": Variant("grpo", IN_FRONT),
}
OF_STAGE = {
    "sft": {**RECORDS, "model": "policy", "data": "chats"},
    "reward": {**RECORDS, "model": "policy", "data": "pairs"},
    "prefer": {**RECORDS, "model": "policy", "data": "pairs"},
    "ppo": {**PPO, "model": "policy", "prompts": "prompts"},
    "grpo": {**GRPO, "model": "policy", "prompts": "prompts"},
}
STAGES = tuple(OF_STAGE)


def make_world(folder: Path) -> None:
    dice = random.Random(0)
    write_models(folder)
    (folder / "reward").rename(folder / "judge")
    for name in ("policy", "judge"):
        words = tokenizer()
        words.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
        words.save_pretrained(folder / name)
    write(folder / "chats.jsonl", rows(dice, ROWS, instruction=9, output=12))
    write(folder / "pairs.jsonl", rows(dice, ROWS, prompt=9, chosen=12, rejected=12))
    write(folder / "prompts.jsonl", rows(dice, ROWS, prompt=9))
    write(folder / "held_out.jsonl", rows(dice, 3, prompt=9))


def write(path: Path, records: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def rows(dice: random.Random, count: int, **longest: int) -> list[dict[str, str]]:
    def say(most: int) -> str:
        return " ".join(f"w{dice.randrange(2, VOCABULARY)}" for _ in range(dice.randint(1, most)))

    return [{name: say(most) for name, most in longest.items()} for _ in range(count)]


def settings(world: Path, variant: str, **more: Any) -> dict[str, Any]:
    """The flat settings of a variant's run, which lies in `run` of the folder that it is started in.

    So no setting of two runs differs, and no file of theirs has to.
    """
    chosen = VARIANTS[variant]
    found = {**ALL, **OF_STAGE[chosen.stage], **chosen.changes, **more}
    for name in PATHS:
        if name in found and ":" not in found[name]:
            path = world / found[name]
            found[name] = str(path if path.is_dir() else path.with_suffix(".jsonl"))
    return {**found, "output": RUN}


def write_recipe(path: Path, world: Path, variant: str, **more: Any) -> None:
    table = settings(world, variant, **more)
    if "reward" in table:
        table["reward"] = (table["reward"],)
    path.write_text(config.to_toml({VARIANTS[variant].stage: table}), encoding="utf-8")
