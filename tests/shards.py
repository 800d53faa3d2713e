"""A small model and what Adam would keep of it, as a strategy lays them out; used by tests/parallel/test_files.py."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from kinkajou.models.load import LoadOptions, load_language_model, load_scalar_model
from kinkajou.parallel.ranks import Replicated
from kinkajou.parallel.sharded import ZERO2, ZERO3, Sharded
from kinkajou.parallel.strategy import Single
from tiny import save_source, tiny_tokenizer

LAYOUTS: dict[str, tuple[int, Any]] = {
    "naive": (1, Single),
    "ddp": (2, Replicated),
    "zero2": (2, lambda: Sharded(ZERO2)),
    "tp": (2, lambda: Sharded(ZERO3, tp=2)),
    "zero3": (4, lambda: Sharded(ZERO3)),
    "zero3-tp": (4, lambda: Sharded(ZERO3, tp=2)),
}
"""Processes, and the strategy of each."""


def save_model(folder: Path) -> None:
    """Sizes that neither 2 nor 4 processes divide; tied embeddings; norms of heads, which tensor parallel copies."""
    save_source(folder, AutoModelForCausalLM, "qwen3", tiny_tokenizer(), intermediate_size=46, tie_word_embeddings=True)


def load(folder: Path) -> dict[str, nn.Module]:
    """With a scalar head too: one row, of which all ranks but the first hold nothing."""
    kinds: dict[str, Any] = {"language": load_language_model, "scalar": load_scalar_model}
    return {name: kind(str(folder), tiny_tokenizer(), LoadOptions(seed=3)) for name, kind in kinds.items()}


def laid_out(s: Any, folder: Path) -> dict[str, Tensor]:
    return state_of({name: s.unwrap(s.wrap(model)) for name, model in load(folder).items()})


def state_of(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Like Adam's: a moment of each weight, in bfloat16 too, and a number."""
    found: dict[str, Tensor] = {}
    named = ((f"{kind}.{name}", x) for kind, model in models.items() for name, x in model.named_parameters())
    for name, x in named:
        found |= {name: x.detach(), f"{name}.exp_avg": -x.detach(), f"{name}.half": x.detach().bfloat16()}
        found[f"{name}.step"] = torch.tensor(7.0)
    return found


def write(layout: str, source: Path, folder: Path) -> None:
    s = LAYOUTS[layout][1]()
    state = laid_out(s, source)
    put = s.saver(state)
    for x in state.values():
        x.zero_()  # what was copied does not change
    folder.mkdir(exist_ok=True)
    put(folder / "state")
    s.barrier()


def read(layout: str, source: Path, folders: list[Path]) -> list[str]:
    """What differs from the model as it was loaded, bit for bit."""
    want = state_of(load(source))
    s = LAYOUTS[layout][1]()
    state, wrong = laid_out(s, source), []
    for folder in folders:
        versions = {name: x._version for name, x in state.items() if not isinstance(x, DTensor)}
        for x in state.values():
            x.fill_(3.0)
        s.fill(state, sorted(folder.glob("state*.safetensors")))
        wrong += [f"{folder.name}: {name}" for name, x in state.items() if not torch.equal(s.full(x), want[name])]
        wrong += [f"version of {name}" for name, v in versions.items() if state[name]._version <= v + 1]
    assert want.keys() == state.keys()
    return wrong
