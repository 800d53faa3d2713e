"""Settings of learning from preferences without rollouts: DPO's family, KTO, ORPO, CPO, SimPO, AlphaPO."""

from dataclasses import dataclass, field
from typing import Literal

from kinkajou.config.groups import DataConfig, ModelConfig, OptimConfig, RunConfig, at_least, require


@dataclass(frozen=True, kw_only=True)
class PreferenceLossConfig:
    loss: tuple[str, ...] = ("sigmoid",)
    """Name of the loss, `WEIGHT*` before it if not 1; several are summed. docs/numerics.md lists the names."""
    beta: float = 0.1
    """How strongly the policy is held to the reference (or the scale of the implicit reward)."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Which divergence to the reference DPO's implicit reward belongs to."""

    def __post_init__(self) -> None:
        if isinstance(self.loss, str):
            object.__setattr__(self, "loss", (self.loss,))
        at_least(self, 0, "beta")


@dataclass(frozen=True, kw_only=True)
class PreferConfig:
    base: ModelConfig = field(default_factory=ModelConfig)
    source: DataConfig = field(default_factory=DataConfig)
    method: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    epochs: float = 1
    """Passes over the records."""
    batch_size: int = 32
    """Records in one optimiser step, over all processes."""

    def __post_init__(self) -> None:
        require(self.base, "model")
        require(self.source, "data")
        require(self.run, "output")
        at_least(self, 1, "batch_size")
        at_least(self, 0, "epochs")
