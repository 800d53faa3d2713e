"""Every setting: a field is a TOML key and a command-line flag of the same name; its docstring is the help.

A stage's config is made of groups whose fields share one flat namespace, so recipes and flags have no dots.
A field with the default "" must be given.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from kinkajou.config import findings
from kinkajou.errors import UserError

NO_OUTPUT = "-"
"""The output folder of a command that writes none."""

NO_RECORDS = {stage: {"data": "-"} for stage in ("sft", "reward", "prefer")} | {
    stage: {"prompts": "-", "reward": "rule:ended"} for stage in ("ppo", "grpo")
}
"""Records and judges of a command that reads none."""


def require(group: Any, *names: str) -> None:
    for name in names:
        if not getattr(group, name):
            raise UserError(f"--{name} is missing", fix=f"give --{name}, or `{name} = ...` in the recipe")


UNBOUNDED = ("max_norm",)
"""Settings that may be infinite."""


def at_least(group: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(group, name)
        if value is not None and not value >= low:
            raise UserError(f"--{name} must be at least {low:g}", evidence=f"--{name} {value}")
        if value == math.inf and name not in UNBOUNDED:
            raise UserError(f"--{name} must be finite", evidence=f"--{name} {value}")


def within(group: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(group, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} must lie between {low:g} and {high:g}", evidence=f"--{name} {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    model: str = ""
    """Folder, run folder, hub id, or a preset to start from scratch (`llama-tiny`, `gpt2-tiny`, ...)."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, if it is not the model's own. A preset without one trains one;
    `characters`: one token for each character of the records."""
    vocab_size: int = 4096
    """Entries of a tokenizer trained for a preset."""
    family: str | None = None
    """Architecture family that the weights must have (gpt2, bloom, opt, llama, ...). Detected if omitted."""
    template: Literal["auto", "tokenizer", "alpaca", "human_assistant", "plain"] = "auto"
    """Chat template. `auto`: the tokenizer's own, else `alpaca`. It is saved with the model."""
    max_len: int = 512
    """Longest sequence in tokens. Longer chats are cut at the end, longer pairs at the beginning."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Compute type. Weights and optimiser state are always float32."""
    lora_rank: int = 0
    """Rank of LoRA adapters on every linear layer; 0 trains all weights."""
    lora_alpha: float | None = None
    """LoRA scale; twice the rank if omitted."""
    lora_save: Literal["merged", "adapter"] = "merged"
    """Save full weights with the adapters merged in, or the adapters alone."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        at_least(self, 8, "max_len")
        at_least(self, 0, "lora_rank")
        at_least(self, 1e-6, "lora_alpha")
        at_least(self, 270, "vocab_size")  # 256 bytes and the special tokens


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    data: str = ""
    """Training records: .json, .jsonl, .csv, any of them .gz, .parquet, or a hub id."""
    eval_data: str | None = None
    """Held-out records, in the same formats."""
    eval_share: float = 0.0
    """Share of `data` held out for evaluation when there is no `eval_data`."""
    subset: str | None = None
    """Subset of the data set (for hh-rlhf: helpful-base, harmless-base, ...)."""
    max_rows: int | None = None
    """Use the first N good records."""
    bad_rows: Literal["error", "skip", "skip_any"] = "error"
    """Stop at a bad record, or skip it and count it: up to 1 % of the records (`skip`), or any number (`skip_any`)."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_rows")
        within(self, 0.0, 0.9, "eval_share")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up, over the whole run."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises linearly."""
    weight_decay: float = 0.0
    """AdamW's decay, on matrices only."""
    max_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    tokens_per_microbatch: int = 8192
    """Tokens that go through the model at once. Changes memory and speed, never results."""
    max_skipped: int = 3
    """Optimiser steps in a row that may be left out because a loss, gradient or score is not finite; the next one stops
    the run. 0: the first one does."""

    def __post_init__(self) -> None:
        at_least(self, 0, "lr", "weight_decay", "max_skipped")
        at_least(self, 1, "tokens_per_microbatch")
        at_least(self, 1e-12, "max_norm")
        within(self, 0.0, 1.0, "warmup")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    output: str = ""
    """Run folder: settings, metrics, samples, checkpoints, report."""
    overwrite: bool = False
    """Delete a run that is already in `output`."""
    export: str | None = None
    """Also write the final model to this folder."""
    seed: int = 0
    """Decides weights, order and samples."""
    log_every: int = 10
    """Console line every N steps. `metrics.jsonl` has every step."""
    eval_every: int = 0
    """Evaluate every N steps; 0: only at the end."""
    sample_every: int = 10
    """Write samples every N steps (PPO, GRPO)."""
    stop_on: tuple[str, ...] = ()
    """Findings that stop the run, by name; `any` for all of them. docs/diagnosis.md lists the names."""
    preflight: Literal["warn", "strict", "off"] = "warn"
    """Before the first step: check data, template, tokenizer and model, and say what is wrong; `strict` stops there."""

    def __post_init__(self) -> None:
        at_least(self, 1, "log_every", "sample_every")
        at_least(self, 0, "eval_every", "seed")
        findings.check_names(self.stop_on)
