"""What the GPU's rows work on: random models of a shape, prompts, lengths; and how work is timed."""

import gc
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.gpu_limits import Peak, Shape, peak_of
from benchmarks.growth_points import peak_bytes
from kinkajou.models.attention import NAME, register
from kinkajou.models.forward import Dtype, LanguageModel

register()
PAD, FIRST = 0, 2


@dataclass(frozen=True)
class Setting:
    """Where rows run, and whether they are only tried out on small sizes."""

    device: str = "cuda"
    small: bool = False
    repetitions: int = 3

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    @property
    def peak(self) -> Peak | None:
        return peak_of(self.name)

    @property
    def memory(self) -> int:
        """Bytes of the card."""
        return torch.cuda.get_device_properties(0).total_memory if self.device == "cuda" else 16 * 2**30


def config_of(shape: Shape, context: int = 4096) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        vocab_size=shape.vocabulary,
        max_position_embeddings=context,
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=1,
    )


def random_model(shape: Shape, here: Setting, dtype: Dtype = "bf16") -> LanguageModel:
    torch.manual_seed(0)
    with torch.device(here.device):
        module: nn.Module = AutoModelForCausalLM.from_config(config_of(shape), attn_implementation=NAME)
    return LanguageModel(module, dtype=dtype)


def as_transformers_runs_it(model: LanguageModel, shape: Shape) -> nn.Module:
    """The same weights in a model of transformers' own, with its attention."""
    with torch.device("meta"):
        peer: Any = AutoModelForCausalLM.from_config(config_of(shape), attn_implementation="sdpa")
    peer.load_state_dict(model.module.state_dict(), assign=True)
    peer.tie_weights()
    for name, buffer in model.module.named_buffers():  # rotary frequencies are not in the state
        owner, _, last = name.rpartition(".")
        setattr(peer.get_submodule(owner), last, buffer)
    return peer.eval()  # type: ignore[no-any-return]


def random_rows(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(FIRST, vocabulary) for _ in range(length)] for _ in range(count)]


def end_ids(vocabulary: int, mean: int) -> list[int]:
    """As many tokens as end an answer after `mean` others on the average: a random model says each alike often."""
    return sorted(random.Random(7).sample(range(FIRST, vocabulary), max(1, vocabulary // mean)))


def timed(work: Callable[[], Any], here: Setting) -> tuple[float, Any]:
    """Seconds until the device is done, and what the work returned."""
    synchronise(here)
    began = time.perf_counter()
    found = work()
    synchronise(here)
    return time.perf_counter() - began, found


def synchronise(here: Setting) -> None:
    if here.device == "cuda":
        torch.cuda.synchronize()


def fresh(here: Setting) -> None:
    """Forgets what earlier work has left, and its peak."""
    gc.collect()
    if here.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_figures(here: Setting) -> dict[str, float]:
    """Peak of what torch gave out, in GiB, and as a share of the card's memory; on a CPU that of the process."""
    used = torch.cuda.max_memory_allocated() if here.device == "cuda" else peak_bytes()
    return {"peak_gib": used / 2**30, "memory_share": used / here.memory}


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
