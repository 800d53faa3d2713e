"""Settings of the commands that use a model: `quantize`, `export`, `serve`."""

from dataclasses import dataclass, field, fields
from typing import Literal

from kinkajou.config.groups import at_least, require, within
from kinkajou.errors import UserError


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    bits: Literal[8, 4] = 8
    """8: int8, row by row; 4: nf4, in blocks of 64 weights."""
    output: str = ""
    """Folder to write."""
    overwrite: bool = False
    """Replace `output` if it is there."""
    data: str = ""
    """Held-out text that the gate reads: records in any format of `data`, or a plain .txt file."""
    calibrate: str = ""
    """Text to which the rounding of the weights is fitted (GPTQ), in the same formats; another file than `data`.
    Each weight goes to its nearest level if omitted."""
    gate_tokens: int = 8192
    """Tokens that the gate reads at most."""
    max_kl: float | None = None
    """Nats a token by which the quantised model may differ from the original; beyond it nothing is saved.
    0.01 for 8 bits and 0.1 for 4 if omitted."""
    reward: str = ""
    """Reward model that scores answers of both models."""
    head: bool = True
    """Quantise the LM head too (where it is not tied to the embeddings)."""
    embeddings: bool = False
    """Store what has no quantised form (embeddings, norms, biases, a tied head) as bfloat16."""
    seed: int = 0
    """Decides the text that the gate lets the original write where there is no `data`."""

    def __post_init__(self) -> None:
        require(self, "output")
        at_least(self, 64, "gate_tokens")
        at_least(self, 0, "max_kl", "seed")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    to: Literal["merged", "gguf"] = "merged"
    """`merged`: a plain Hugging Face folder, adapters folded in, nothing quantised; `gguf`: one file for llama.cpp."""
    output: str = ""
    """Folder (merged) or file (gguf) to write."""
    overwrite: bool = False
    """Replace `output` if it is there."""
    dtype: Literal["f32", "f16", "bf16", "q8_0"] = "f32"
    """Type of the matrices that are written; `q8_0` is gguf's int8 in blocks of 32."""

    def __post_init__(self) -> None:
        require(self, "output")
        if self.to == "merged" and self.dtype == "q8_0":
            raise UserError("a plain folder has no q8_0", fix="--to gguf, or `kinkajou quantize` for an int8 folder")


OF_A_MODEL = ("bits", "dtype", "slots", "context", "threads", "template")
"""How a folder is hosted; a reward model beside another server is hosted here all the same."""
OF_A_REWARD = ("dtype", "threads", "template")


@dataclass(frozen=True, kw_only=True)
class HostingConfig:
    bits: Literal[16, 8, 4] = 16
    """8 or 4: quantise the weights while loading. 16: as they are."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Compute type."""
    slots: int = 16
    """Answers that are decoded at once."""
    queue: int = 64
    """Answers that may wait for a slot; beyond that the server says 429."""
    context: int | None = None
    """Longest prompt and answer together in tokens; what the model has positions for if omitted, 4096 at most."""
    threads: int | None = None
    """Threads of each model on a CPU; OMP_NUM_THREADS if omitted, else one less than there are processors."""
    template: Literal["auto", "tokenizer", "alpaca", "human_assistant", "plain"] = "auto"
    """Chat template. `auto`: the tokenizer's own, else `alpaca`."""
    reward: str = ""
    """Reward model that `/v1/rewards` asks."""
    backend: str = ""
    """Instead of a folder: the URL of an OpenAI-compatible server (vLLM, `transformers serve`) that answers."""
    words: str = ""
    """File of words, one a line; an answer with one of them is replaced by a fixed sentence."""
    safe_answer: str = "I'm sorry, but I can't help with that."
    """That sentence."""

    def __post_init__(self) -> None:
        at_least(self, 1, "slots", "threads")
        at_least(self, 0, "queue")
        at_least(self, 8, "context")
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        if "safe_answer" in changed and not self.words:
            raise UserError("--safe_answer is for a word filter, and there is none", fix="--words FILE")
        idle = [name for name in OF_A_MODEL if name in changed and not (self.reward and name in OF_A_REWARD)]
        if self.backend and idle:
            flags = ", ".join(f"--{name}" for name in idle)
            raise UserError(
                f"{flags}: with --backend the other server hosts the model, and decides this itself",
                fix="leave them out here, and set them there",
            )


@dataclass(frozen=True, kw_only=True)
class DoorConfig:
    host: str = "127.0.0.1"
    """Address to listen at. Another than this machine's own needs a key."""
    port: int = 7070
    """Port to listen at; 0 takes a free one and prints it."""
    key_file: str = ""
    """File with the API key. Otherwise the environment's KINKAJOU_API_KEY, else no key is asked for."""
    allow_hosts: tuple[str, ...] = ()
    """Names by which browsers and programs may call this server, besides this machine's own."""
    allow_origins: tuple[str, ...] = ()
    """Origins of web pages that may call it, such as https://chat.example.org, besides its own page."""
    deadline_s: float = 120.0
    """Seconds that a request may take, waiting included."""
    drain_s: float = 30.0
    """Seconds that open answers are given to end when the server is told to stop."""
    rate: float = 1.0
    """Requests a second that one client may send to /generate and /generate/stream; 0: any number."""
    max_new_tokens: int | None = None
    """Longest answer that may be asked for, in tokens; 1024 if omitted. With `backend` a request that names no length
    gets this one, or the other server's own if this is omitted."""
    max_connections: int = 512
    """Connections that are open at once."""

    def __post_init__(self) -> None:
        require(self, "host")
        within(self, 0, 65_535, "port")
        at_least(self, 0.1, "deadline_s")
        at_least(self, 0, "drain_s", "rate")
        at_least(self, 1, "max_new_tokens", "max_connections")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    hosting: HostingConfig = field(default_factory=HostingConfig)
    door: DoorConfig = field(default_factory=DoorConfig)
