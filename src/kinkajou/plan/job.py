"""What a plan is made for: models, sizes of a step, and how everything lies over processes.  Plain numbers."""

from dataclasses import dataclass
from math import ceil

from kinkajou.plan.activations import Pass
from kinkajou.plan.architecture import Architecture

SHARDED = ("zero2", "zero2_cpu", "zero3", "gemini")
HEAD_KEPT = {False: 2**27, True: 2**30}
HEAD_TILE = {False: 2**22, True: 2**28}
"""Logits kept and logits of a tile on a CPU and a GPU: models/linear_logp.py's KEPT and TILE."""
HEAD_ROWS = 128


@dataclass(frozen=True)
class Layout:
    """How weights lie over processes."""

    strategy: str = "naive"
    ranks: int = 1
    tp: int = 1
    device_share: float | None = None
    per_node: int = 8
    """Processes that share one host's memory, at most."""

    @property
    def data(self) -> int:
        """Processes with rows of their own."""
        return max(1, self.ranks // self.tp)

    @property
    def on_one_host(self) -> int:
        return min(self.ranks, self.per_node)


@dataclass(frozen=True)
class Job:
    stage: str
    policy: Architecture
    layout: Layout
    how: Pass
    length: int
    """Tokens of a row."""
    rows: int
    """Rows of one optimiser step, over all processes; a pair is two."""
    microbatch: int
    """Tokens that go through a model at once."""
    samples: int = 0
    """Answers of one step of reinforcement learning, over all processes."""
    new_tokens: int = 0
    slots: int = 64
    epochs: int = 1
    prompts: int = 0
    scorer: Architecture | None = None
    """A reward model's, and the critic's."""
    judges: int = 0
    critic: bool = False
    shared: bool = False
    reference: bool = False
    average: bool = False
    entropy: bool = False
    sampled_cut: bool = False
    """Log-probabilities are of a truncated distribution."""
    engine_copy: bool = True
    steps: int = 0

    @property
    def reinforced(self) -> bool:
        return self.stage in ("ppo", "grpo")

    @property
    def pack(self) -> int:
        """Tokens of a whole micro-batch of training: whole rows, pairs never apart."""
        together = 2 if self.stage in ("reward", "prefer") else 1
        most = max(1, self.microbatch // (self.length * together)) * together
        return min(most, self.own_rows) * self.length

    @property
    def passes(self) -> int:
        """Micro-batches of one optimiser step in a process."""
        return ceil(self.own_rows * self.length / self.pack)

    @property
    def own_rows(self) -> int:
        return ceil(self.rows / self.layout.data)

    @property
    def own_samples(self) -> int:
        return ceil(self.samples / self.layout.data)

    @property
    def score_pack(self) -> int:
        """Tokens of a whole micro-batch without gradients."""
        return min(max(1, self.microbatch // self.length), max(1, self.own_samples)) * self.length

    @property
    def counted(self) -> int:
        """Targets of a pack that the head reads, at most."""
        if self.reinforced:
            return self.pack // self.length * self.new_tokens
        return self.pack

    def tile(self, rows: int) -> int:
        """Positions of a tile of the head."""
        return max(1, min(rows, max(HEAD_ROWS, HEAD_TILE[self.how.gpu] // self.policy.vocabulary)))
