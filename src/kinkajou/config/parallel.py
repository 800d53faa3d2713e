"""Settings of how a run lies over processes and machines, and of where its answers are sampled."""

from dataclasses import dataclass
from typing import Literal

from kinkajou.config.groups import at_least, within
from kinkajou.errors import UserError, did_you_mean

STRATEGIES = ("naive", "ddp", "zero2", "zero2_cpu", "zero3", "gemini")
STRATEGY_ALIASES = {
    "single": "naive",
    "fsdp": "zero3",
    "colossalai_zero2": "zero2",
    "colossalai_zero2_cpu": "zero2_cpu",
    "colossalai_gemini": "gemini",
}


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    strategy: str = "naive"
    """How weights lie over processes: naive (one process), and under torchrun ddp (replicated), zero2 (gradients and
    optimiser sharded), zero2_cpu (the same, on the host), zero3 (all sharded), gemini (all sharded, on device and
    host)."""
    tp: int = 1
    """Processes that share each matrix (tensor parallel); the others split the data."""
    device_share: float | None = None
    """gemini: share of the shards that lie on the device; what fits into its free memory if omitted."""
    engine_weights: Literal["auto", "copy", "sharded"] = "auto"
    """Where weights are sharded, answers are sampled from a gathered copy of them, or by the sharded model itself.
    `auto`: a copy where it fits."""
    interface: str | None = None
    """Network interface of the traffic between processes; on one machine the loopback if omitted."""
    start_timeout_s: float = 60.0
    """Longest wait for all processes to come up."""

    def __post_init__(self) -> None:
        at_least(self, 1, "tp", "start_timeout_s")
        within(self, 0.0, 1.0, "device_share")
        name = STRATEGY_ALIASES.get(self.strategy, self.strategy)
        object.__setattr__(self, "strategy", name)
        if name not in STRATEGIES:
            raise UserError(f"unknown strategy {name!r}", fix=did_you_mean(name, STRATEGIES))
        if self.device_share is not None and name != "gemini":
            raise UserError("--device_share is gemini's", evidence=f"--strategy {name}", fix="--strategy gemini")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    rollout: Literal["local", "ray", "vllm"] = "local"
    """Who samples answers: the trainer's own processes, workers on Ray, or vLLM servers."""
    workers: int = 1
    """Engines on Ray."""
    max_staleness: int = 0
    """Optimiser rounds that an answer's weights may be behind those it trains; 0: none, sampling waits."""
    ray_address: str | None = None
    """Address of a running Ray cluster; a local one on the loopback is started if omitted."""
    server: tuple[str, ...] = ()
    """vLLM servers, http://HOST:PORT each."""
    server_sync: Literal["auto", "transfer", "adapter", "reload", "restart"] = "auto"
    """How a vLLM server gets new weights: its weight-transfer API, a LoRA adapter, reloading a folder that both see,
    or a restart."""

    def __post_init__(self) -> None:
        at_least(self, 1, "workers")
        at_least(self, 0, "max_staleness")
        if isinstance(self.server, str):  # one server, as Python callers write it
            object.__setattr__(self, "server", (self.server,) if self.server else ())
        if self.rollout == "vllm" and not self.server:
            raise UserError("--rollout vllm needs a server", fix="--server http://127.0.0.1:8000")
        if self.rollout != "vllm" and self.server:
            raise UserError("--server is read by vLLM rollouts alone", fix="--rollout vllm, or leave --server out")
        if self.rollout != "ray" and (self.workers > 1 or self.ray_address or self.max_staleness):
            raise UserError(
                "--workers, --max_staleness and --ray_address are read by Ray rollouts alone", fix="--rollout ray"
            )
