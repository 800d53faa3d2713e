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
    collective_timeout_s: float = 600.0
    """Longest wait of a process for the others: for the longest rollout of another, for what the first one does alone
    (new weights to a server), or for one that hangs.  One that was killed is noticed at once."""

    def __post_init__(self) -> None:
        at_least(self, 1, "tp", "start_timeout_s", "collective_timeout_s")
        within(self, 0.0, 1.0, "device_share")
        name = STRATEGY_ALIASES.get(self.strategy, self.strategy)
        object.__setattr__(self, "strategy", name)
        if name not in STRATEGIES:
            raise UserError(f"unknown strategy {name!r}", fix=did_you_mean(name, STRATEGIES))
        if self.device_share is not None and name != "gemini":
            raise UserError("--device_share is gemini's", evidence=f"--strategy {name}", fix="--strategy gemini")
        if name in ("naive", "ddp") and (self.tp > 1 or self.engine_weights != "auto"):
            raise UserError(
                "--tp and --engine_weights are read where weights are sharded",
                evidence=f"--strategy {name} --tp {self.tp} --engine_weights {self.engine_weights}",
                fix="--strategy zero3 (or zero2, zero2_cpu, gemini)",
            )


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
    """vLLM servers: http://HOST:PORT each, or start:ENVIRONMENT, a folder with vLLM in it (`python -m venv`) from which
    the run starts one of its own on the loopback."""
    server_sync: Literal["auto", "adapter", "reload", "restart"] = "auto"
    """How a vLLM server gets new weights: a LoRA adapter or all weights from a folder that both see, or a restart on
    that folder. `auto`: the adapter with LoRA, else a restart of servers that the run has started, else reload."""
    server_gap: float | None = None
    """Largest distance of a vLLM server's log-probabilities from the trainer's (nats, worst token) after new weights;
    beyond it the run stops. 0.001 for fp32 and 0.3 for bf16 if omitted."""
    server_timeout_s: float = 600.0
    """Longest wait for one answer of a vLLM server."""

    def __post_init__(self) -> None:
        at_least(self, 1, "workers")
        at_least(self, 0, "max_staleness")
        if isinstance(self.server, str):  # one server, as Python callers write it
            object.__setattr__(self, "server", (self.server,) if self.server else ())
        if self.rollout == "vllm" and not self.server:
            raise UserError("--rollout vllm needs a server", fix="--server http://127.0.0.1:8000")
        at_least(self, 0, "server_gap")
        at_least(self, 1e-3, "server_timeout_s")
        for where in self.server:
            if not where.startswith(("http://", "https://", "start:")):
                raise UserError(
                    f"--server {where!r} is no address",
                    fix="http://HOST:PORT of a running server, or start:ENVIRONMENT to start one",
                )
        own = (self.server, self.server_sync, self.server_gap, self.server_timeout_s)
        if self.rollout != "vllm" and own != ((), "auto", None, 600.0):
            raise UserError(
                "--server and --server_... are read by vLLM rollouts alone", fix="--rollout vllm, or leave them out"
            )
        if self.rollout != "ray" and (self.workers > 1 or self.ray_address or self.max_staleness):
            raise UserError(
                "--workers, --max_staleness and --ray_address are read by Ray rollouts alone", fix="--rollout ray"
            )
