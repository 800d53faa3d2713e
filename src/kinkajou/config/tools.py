"""Settings of the commands that train nothing by themselves."""

import re
from dataclasses import dataclass, field
from typing import Literal

from kinkajou.config.groups import DataConfig, ModelConfig, at_least, require, within
from kinkajou.config.rl import ScoringConfig
from kinkajou.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    system: str = ""
    """System message."""
    bits: Literal[16, 8, 4] = 16
    """8 or 4: quantise the weights while loading. 16: as they are."""
    versus: str = ""
    """A second model's folder or run: both answer, side by side."""
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
    min_p: float = 0.0
    """Sample among tokens of at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1 what was said before becomes less likely."""
    stop: tuple[str, ...] = ()
    """Texts at which an answer ends, besides its end token."""
    seed: int = 0
    """Decides the samples."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_new_tokens")
        at_least(self, 0, "temperature", "top_k", "seed")
        at_least(self, 1e-3, "repetition_penalty")
        within(self, 1e-6, 1.0, "top_p")
        within(self, 0.0, 1.0, "min_p")


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


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    num_shown: int = 2
    """Records shown token by token, trained tokens in colour."""
    colour: Literal["auto", "always", "never"] = "auto"
    """Colour the trained tokens; without colour they stand in brackets."""
    whole: bool = False
    """Tokenise every record. Otherwise at most 4 million characters, evenly from the first record to the last, so that
    large data takes seconds too; duplicates, overlap and control words are always sought in all."""

    def __post_init__(self) -> None:
        at_least(self, 0, "num_shown")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    steps: int = 3
    """Steps that are measured. One more is traced, operator by operator."""
    warmup: int = 1
    """Steps before those, not measured: the first ones also allocate and compile."""
    trace: str = "profile-trace.json"
    """File for the traced step, .json or .json.gz: ui.perfetto.dev and chrome://tracing open it. `none`: no file."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")
        at_least(self, 0, "warmup")
        if self.trace != "none" and not self.trace.endswith((".json", ".json.gz")):
            raise UserError("a trace is a .json or .json.gz file", evidence=f"--trace {self.trace}")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    gpus: int | None = None
    """Processes of the run, a GPU each; those that torchrun has started if omitted, else 1."""
    per_node: int = 8
    """GPUs of one machine, whose processes share its main memory."""
    memory: str = ""
    """Memory of each GPU, such as 24GB; the named or the present one's if omitted."""
    host: str = ""
    """Main memory of each machine, such as 64GB; the present one's if omitted."""
    gpu: str = ""
    """A GPU by name, for its memory and rates: h200, h100, a100, a100-40g, v100, l40s, a10, 4090, 3090, t4;
    `cpu`: no GPU. The present device if omitted."""
    tflops: float | None = None
    """Stated rate of products in the compute type, 10^12 operations a second."""
    bandwidth: float | None = None
    """Stated rate of the device's memory, 10^9 bytes a second."""
    link: float | None = None
    """Stated rate between devices, 10^9 bytes a second."""
    row_tokens: int | None = None
    """Tokens of a row, prompt and answer; max_len if omitted, which is the most there can be."""
    simulate: bool = False
    """Also make a step of the real trainer on tensors without data: memory by PyTorch's tracker, and traffic.
    Seconds for small models, minutes for the largest."""
    json: bool = False
    """Print the plan as JSON."""

    def __post_init__(self) -> None:
        at_least(self, 1, "gpus", "per_node")
        at_least(self, 2, "row_tokens")
        at_least(self, 1e-6, "tflops", "bandwidth", "link")
        for name in ("memory", "host"):
            if getattr(self, name):
                size_of(getattr(self, name), name)

    @property
    def memory_bytes(self) -> int | None:
        return size_of(self.memory, "memory") if self.memory else None

    @property
    def host_bytes(self) -> int | None:
        return size_of(self.host, "host") if self.host else None


UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def size_of(words: str, name: str) -> int:
    """Bytes of a size such as 24GB, 1.5 TiB or 800M.  Units are binary: a card of 24 GB has 24 x 2^30 bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?\s*", words.upper())
    size = float(found[1]) * 2 ** UNITS[found[2]] if found else 0.0
    if not 1 <= size < 2**60:
        raise UserError(f"--{name} is no size of memory", evidence=f"--{name} {words}", fix=f"--{name} 24GB")
    return int(size)


@dataclass(frozen=True, kw_only=True)
class EvalRewardConfig:
    base: ModelConfig = field(default_factory=ModelConfig)
    source: DataConfig = field(default_factory=DataConfig)
    subset_field: str | None = None
    """Field of the records by whose value accuracy is also shown apart."""
    output: str | None = None
    """Also write the figures to this JSON file."""
    overwrite: bool = False
    """Replace `output` if it is there."""
    seed: int = 0
    """With `eval_share`: the seed of the run that held this share out."""
    tokens_per_microbatch: int = 8192
    """Tokens that go through the model at once. Changes memory and speed, never results."""

    def __post_init__(self) -> None:
        require(self.base, "model")
        require(self.source, "data")
        at_least(self, 0, "seed")
        at_least(self, 1, "tokens_per_microbatch")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    model: str = ""
    """Folder, run folder, or hub id of the model that answers."""
    template: Literal["auto", "tokenizer", "alpaca", "human_assistant", "plain"] = "auto"
    """Chat template. `auto`: the tokenizer's own, else `alpaca`."""
    prompts: str = ""
    """Prompts to answer, in any format of `data`."""
    max_prompts: int | None = None
    """Use the first N good prompts."""
    bad_rows: Literal["error", "skip", "skip_any"] = "error"
    """Stop at a bad or too long prompt, or skip it and count it: up to 1 % bad ones, or any number (`skip_any`)."""
    max_len: int = 512
    """Longest prompt and answer together in tokens."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_k: int = 0
    """Sample among the K likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this mass."""
    min_p: float = 0.0
    """Sample among tokens of at least this share of the likeliest one's probability."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Compute type."""
    seed: int = 0
    """Decides the samples."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_prompts", "max_new_tokens")
        at_least(self, 8, "max_len")
        at_least(self, 1e-3, "temperature")
        at_least(self, 0, "top_k", "seed")
        within(self, 1e-6, 1.0, "top_p")
        within(self, 0.0, 1.0, "min_p")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    output: str = ""
    """The .jsonl file to write."""
    overwrite: bool = False
    """Replace `output` if it is there."""
    group_size: int = 8
    """Answers to each prompt."""
    write: Literal["best", "threshold", "pairs"] = "best"
    """The best answer to each prompt (best of N, for SFT), the best answers that reach `threshold` (rejection
    sampling, for SFT), or best against worst (for the reward model and `prefer`)."""
    threshold: float | None = None
    """Lowest score of an answer that is kept; for pairs, lowest distance of the two scores."""
    max_per_prompt: int = 1
    """Answers kept of one prompt with `--write threshold`."""

    def __post_init__(self) -> None:
        require(self.sampler, "model", "prompts")
        self.scoring.require()
        require(self, "output")
        at_least(self, 1, "group_size", "max_per_prompt")
        if self.write == "threshold" and self.threshold is None:
            raise UserError("--write threshold needs a threshold", fix="give --threshold")
        if self.write != "threshold" and self.max_per_prompt != 1:
            raise UserError(
                f"--max_per_prompt does nothing with --write {self.write}",
                evidence=f"--max_per_prompt {self.max_per_prompt}",
                fix="leave it out, or give --write threshold and a --threshold",
            )
        if self.write == "pairs" and self.group_size < 2:
            raise UserError("a pair needs two answers, and group_size is 1", fix="--group_size 8")
