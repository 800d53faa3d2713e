"""Every setting: a field is a TOML key and a command-line flag of the same name; its docstring is the help.

A stage's config is made of groups whose fields share one flat namespace, so recipes and flags have no dots.
A field with the default "" must be given.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kinkajou.errors import UserError, did_you_mean

STRATEGIES = ("naive", "ddp")
PLANNED_STRATEGIES = ("zero2", "zero2_cpu", "zero3", "gemini")
STRATEGY_ALIASES = {
    "single": "naive",
    "fsdp": "zero3",
    "colossalai_zero2": "zero2",
    "colossalai_zero2_cpu": "zero2_cpu",
    "colossalai_gemini": "gemini",
}


def require(group: Any, *names: str) -> None:
    for name in names:
        if not getattr(group, name):
            raise UserError(f"--{name} is missing", fix=f"give --{name}, or `{name} = ...` in the recipe")


def at_least(group: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(group, name)
        if value is not None and not value >= low:
            raise UserError(f"--{name} must be at least {low:g}", evidence=f"--{name} {value}")


def within(group: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(group, name)
        if not low <= value <= high:
            raise UserError(f"--{name} must lie between {low:g} and {high:g}", evidence=f"--{name} {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    model: str = ""
    """Folder, run folder, hub id, or a preset to start from scratch (`llama-tiny`, `gpt2-tiny`, ...)."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, if it is not the model's own. A preset without one trains one."""
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
    bad_rows: Literal["error", "skip"] = "error"
    """Stop at a bad record, or skip it and count it."""

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

    def __post_init__(self) -> None:
        at_least(self, 0, "lr", "weight_decay")
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
    strategy: str = "naive"
    """How weights lie over processes: naive (one process), ddp (torchrun, replicated)."""
    log_every: int = 10
    """Console line every N steps. `metrics.jsonl` has every step."""
    eval_every: int = 0
    """Evaluate every N steps; 0: only at the end."""
    save_every: int = 0
    """Checkpoint every N steps; 0: only at the end."""
    save_optimizer: bool = False
    """Also save the optimiser's state with each checkpoint."""
    sample_every: int = 10
    """Write samples every N steps (PPO)."""

    def __post_init__(self) -> None:
        at_least(self, 1, "log_every", "sample_every")
        at_least(self, 0, "eval_every", "save_every", "seed")
        name = STRATEGY_ALIASES.get(self.strategy, self.strategy)
        object.__setattr__(self, "strategy", name)
        if name in PLANNED_STRATEGIES:
            raise UserError(f"strategy {name!r} is not built yet", fix=f"use one of: {', '.join(STRATEGIES)}")
        if name not in STRATEGIES:
            raise UserError(f"unknown strategy {name!r}", fix=did_you_mean(name, STRATEGIES))


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    base: ModelConfig = field(default_factory=ModelConfig)
    source: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    epochs: float = 3
    """Passes over the data."""
    batch_size: int = 32
    """Sequences in one optimiser step, over all processes."""

    def __post_init__(self) -> None:
        require(self.base, "model")
        require(self.source, "data")
        require(self.run, "output")
        at_least(self, 1, "batch_size")
        at_least(self, 0, "epochs")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    base: ModelConfig = field(default_factory=ModelConfig)
    source: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    epochs: float = 1
    """Passes over the pairs."""
    batch_size: int = 32
    """Pairs in one optimiser step, over all processes."""
    loss: Literal["log_sig", "log_exp"] = "log_sig"
    """InstructGPT's or Anthropic's name of the ranking loss; they are one function."""

    def __post_init__(self) -> None:
        require(self.base, "model")
        require(self.source, "data")
        require(self.run, "output")
        at_least(self, 1, "batch_size")
        at_least(self, 0, "epochs")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    prompts: str = ""
    """Prompts to answer, in any format of `data`."""
    max_prompts: int | None = None
    """Use the first N good prompts."""
    bad_rows: Literal["error", "skip"] = "error"
    """Stop at a bad or too long prompt, or skip it and count it."""
    prompts_per_step: int = 64
    """Prompts answered in one step, over all processes."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""
    temperature: float = 1.0
    """Divides the logits before sampling; log-probabilities are of the same distribution."""
    top_k: int = 0
    """Sample among the K likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this mass."""

    def __post_init__(self) -> None:
        at_least(self, 1, "prompts_per_step", "max_new_tokens", "max_prompts")
        at_least(self, 0, "top_k")
        at_least(self, 1e-3, "temperature")
        within(self, 1e-6, 1.0, "top_p")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    reward: str = ""
    """What the policy is trained on: a reward model's folder, or a rule such as `rule:mentions:happy`."""
    critic: str | None = None
    """Folder the critic starts from; the reward model if omitted (the policy's trunk with a rule)."""
    gold: str | None = None
    """A second judge, of the same forms, that never trains anything: it scores the held-out prompts."""
    eval_prompts: str | None = None
    """Held-out prompts, answered every `eval_every` steps and scored by reward and gold."""
    keep_best: Literal["none", "score", "gold"] = "none"
    """Keep the checkpoint that is best on the held-out prompts by this judge."""


@dataclass(frozen=True, kw_only=True)
class PPOAlgorithm:
    steps: int = 100
    """Rounds of rollout and update."""
    epochs: int = 4
    """Passes over each round's rollouts."""
    minibatch_size: int = 32
    """Samples in one optimiser step, over all processes."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference in the reward, per token in nats."""
    clip: float = 0.2
    """Bound on the probability ratio."""
    value_clip: float = 0.2
    """Bound on the critic's move."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    missing_end_penalty: float = 0.0
    """Taken from the score of an answer that did not end by itself."""
    critic_lr: float | None = None
    """Peak learning rate of the critic; `lr` if omitted."""
    ptx_data: str | None = None
    """Chats whose likelihood is mixed into the policy's loss (InstructGPT's PPO-ptx)."""
    ptx_coef: float = 0.0
    """Share of that loss: ptx_coef x ptx + (1 - ptx_coef) x policy."""
    ptx_batch_size: int = 8
    """Chats of it in one optimiser step, over all processes."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "epochs", "minibatch_size", "ptx_batch_size")
        at_least(self, 0, "kl_coef", "clip", "value_clip", "critic_lr")
        within(self, 0.0, 1.0, "gamma", "lam", "ptx_coef")
        if self.ptx_coef > 0 and not self.ptx_data:
            raise UserError("ptx_coef is above 0 but there is no ptx_data", fix="give --ptx_data, or --ptx_coef 0")


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    base: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    algo: PPOAlgorithm = field(default_factory=PPOAlgorithm)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require(self.base, "model")
        require(self.rollout, "prompts")
        require(self.judge, "reward")
        require(self.run, "output")
        if self.judge.keep_best != "none" and not (self.judge.eval_prompts and self.run.eval_every):
            raise UserError("keep_best needs held-out prompts", fix="give --eval_prompts and --eval_every")
        if self.judge.keep_best == "gold" and not self.judge.gold:
            raise UserError("keep_best is 'gold' but there is no gold judge", fix="give --gold")


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    system: str = ""
    """System message."""
    message: str | None = None
    """Answer this one message and leave, instead of a conversation."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.7
    """0 always takes the likeliest token."""
    top_k: int = 0
    """Sample among the K likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this mass."""
    seed: int = 0
    """Decides the samples."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_new_tokens")
        at_least(self, 0, "temperature", "top_k", "seed")
        within(self, 1e-6, 1.0, "top_p")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    output: str = "demo"
    """Folder for the demo's data, its three runs and the report."""
    overwrite: bool = False
    """Delete a demo that is already there."""
    scale: float = 1.0
    """Multiplies steps and data: 0.02 is a quick look that learns nothing."""
    seed: int = 0
    """Decides everything: same seed, same numbers."""

    def __post_init__(self) -> None:
        require(self, "output")
        within(self, 0.001, 100.0, "scale")
        at_least(self, 0, "seed")


StageConfig = SFTConfig | RewardConfig | PPOConfig


def flat(config: Any) -> dict[str, Any]:
    """A config's fields by flag name, groups dissolved: what a recipe holds."""
    rows: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        rows |= flat(value) if dataclasses.is_dataclass(value) else {item.name: value}
    return rows


def to_toml(tables: dict[str, dict[str, Any]]) -> str:
    """TOML of flat tables; None is left out, since it means 'not given'."""
    lines: list[str] = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {toml_value(value)}" for key, value in table.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def read_recipe(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a recipe file, one a stage."""
    import tomllib

    if not path.is_file():
        raise UserError(f"no recipe at {path}", fix="recipes/ has one for each stage")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise UserError(f"{path} is not valid TOML", evidence=str(fault)) from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(
                f"{path}: key {name!r} stands before any table",
                fix="put it under the stage's name, such as [sft]",
            )
    return tables
