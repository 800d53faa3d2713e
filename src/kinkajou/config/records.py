"""Settings of the stages that train on records: SFT and the reward model."""

from dataclasses import dataclass, field
from typing import Literal

from kinkajou.config.groups import DataConfig, ModelConfig, OptimConfig, RunConfig, at_least, require
from kinkajou.config.keep import KeepConfig
from kinkajou.config.parallel import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    base: ModelConfig = field(default_factory=ModelConfig)
    source: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
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
