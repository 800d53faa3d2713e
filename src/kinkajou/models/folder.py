"""The files of a model's folder: safetensors in shards, and a critic that shares the weights of its policy's folder."""

import copy
import json
import os
import shutil
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kinkajou.models.adapters import adapter_base, save_adapted

SHARD_BYTES = 5 * 10**9
SHARD = f"{SHARD_BYTES // 10**9}GB"
"""Said to transformers: version 5 writes shards of 50 GB, which many file stores do not take."""
INDEX, SCORE = "model.safetensors.index.json", "score.safetensors"
AS_TORCH = {"format": "pt"}


def write_weights(
    module: nn.Module, folder: Path, weights: dict[str, Tensor], *, shard: str = SHARD, apart: bool = False
) -> None:
    """config.json and weights.  `apart` gives an output embedding of its own a file that a critic does not open."""
    head = own_head(module) if apart else None
    if head is None:
        save_adapted(module, str(folder), weights, shard=shard)
        return
    whole = dict(weights)
    ends = {name: whole.pop(name).contiguous() for name in list(whole) if name.startswith(f"{head}.")}
    save_adapted(module, str(folder), whole, shard=shard)
    files = weight_files(folder)
    total = len(files) + 1
    for number, file in enumerate(files, 1):
        file.rename(folder / f"model-{number:05d}-of-{total:05d}.safetensors")
    save_file(ends, folder / f"model-{total:05d}-of-{total:05d}.safetensors", AS_TORCH)
    (folder / INDEX).unlink(missing_ok=True)
    write_index(folder, weight_files(folder))


def own_head(module: nn.Module) -> str | None:
    """The name of a language model's output embedding; None where it is the input's, or there is none."""
    inner = cast(Any, module)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None or inner.config.get_text_config().tie_word_embeddings:
        return None
    return next((name for name, child in module.named_modules() if child is head), None)


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def write_index(folder: Path, files: Iterable[Path]) -> None:
    """Says which file holds which weight, as transformers and vLLM read it."""
    places: dict[str, str] = {}
    size = 0
    for file in files:
        names, stored = header(file)
        places |= dict.fromkeys(names, file.name)
        size += stored
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def header(file: Path) -> tuple[list[str], int]:
    """Names of the weights in a file that was just written, and their bytes."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        names = json.loads(opened.read(length))
    return [name for name in names if name != "__metadata__"], file.stat().st_size - 8 - length


def save_shared_critic(
    config: PreTrainedConfig, head: Tensor, tokenizer: PreTrainedTokenizerBase, policy: Path
) -> None:
    """`policy/critic`, the critic on the policy's trunk as a folder of its own that costs no second trunk.

    The policy's files stand in it under second names (hard links), its head's weight (1, c) in one file more; of a
    policy that is an adapter there is a copy of the adapter.  The policy was written with its head `apart`.
    """
    folder = policy / "critic"
    folder.mkdir()
    tokenizer.save_pretrained(str(folder))
    head = head.detach().float().cpu().contiguous()
    if adapter_base(str(policy)) is not None:
        adapter_with_head(policy, folder, head)
        return
    kind = cast(type[PreTrainedModel], MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)])
    for file in weight_files(policy):
        if any(name.startswith(f"{kind.base_model_prefix}.") for name in header(file)[0]):
            second_name(file, folder / file.name.replace("model", "trunk", 1))
    save_file({"score.weight": head}, folder / SCORE, AS_TORCH)
    write_index(folder, sorted(folder.glob("*.safetensors")))
    scoring = copy.deepcopy(config)
    scoring.num_labels, scoring.pad_token_id = 1, tokenizer.pad_token_id
    scoring.architectures = [kind.__name__]
    scoring.save_pretrained(str(folder))


def second_name(file: Path, other: Path) -> None:
    """A hard link; a copy on a file system that knows none."""
    with suppress(OSError):
        os.link(file, other)
        return
    shutil.copyfile(file, other)


def adapter_with_head(policy: Path, folder: Path, head: Tensor) -> None:
    """The policy's adapter, as PEFT keeps that of a reward model: for sequence classification, its head beside it."""
    settings = json.loads((policy / "adapter_config.json").read_text(encoding="utf-8"))
    settings |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    weights = load_file(policy / "adapter_model.safetensors")
    save_file({**weights, "base_model.model.score.weight": head}, folder / "adapter_model.safetensors", AS_TORCH)
