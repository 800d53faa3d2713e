"""Tensor parallel (Shoeybi 2019): a block's matrices split over neighbours through DTensor, by the plan that
transformers has for the family."""

from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from kinkajou.errors import UserError

HEADS = 2
"""Where heads lie in what a norm over each head reads, (1, n, h, d)."""


def split_matrices(model: Any, mesh: DeviceMesh) -> None:
    """In place, before anything else shards the model.  Embeddings, norms and the head stay whole."""
    config, trunk = model.inner.config.get_text_config(), cast(nn.Module, model.inner.base_model)
    plan = config.base_model_tp_plan
    if not plan:
        raise UserError(
            f"{config.model_type} models have no plan for tensor parallel",
            evidence=f"--tp {mesh.size()}; transformers has plans for llama, mistral, qwen3, gemma3 and others",
            fix="--tp 1: --strategy zero3 shards every family's weights",
        )
    check_divides(config, mesh.size())
    styles: dict[str, ParallelStyle] = {}
    names = {name for name, _ in trunk.named_modules()}
    for pattern, word in plan.items():
        adapted = any(name.endswith(".base_layer") and matches(pattern, name) for name in names)
        styles |= {f"{pattern}{suffix}": style for suffix, style in styles_of(word, adapted).items()}
    trained = {name: param.requires_grad for name, param in trunk.named_parameters()}
    # Every rank has the whole weights and takes its part; the default would have rank 0 send them.
    parallelize_module(trunk, mesh, styles, src_data_rank=None)
    for name, param in trunk.named_parameters():  # torch makes what it replicates trainable
        param.requires_grad_(trained[name])


def styles_of(word: str, adapted: bool) -> dict[str, ParallelStyle]:
    """What becomes of a linear layer (and its LoRA adapter), by the end of its name.

    Split by columns, x (W + B A) needs the columns of W and B; by rows, the rows of W and A.
    """
    match word:
        case "colwise":
            own = ("",) if not adapted else (".base_layer", ".lora_B.*")
            return {end: ColwiseParallel() for end in own}
        case "rowwise":
            own = ("",) if not adapted else (".base_layer", ".lora_A.*")
            return {end: RowwiseParallel() for end in own}
        case "replicated_with_grad_allreduce":  # each rank's heads give a part of the weight's gradient
            return {"": SequenceParallel(sequence_dim=HEADS, use_local_output=True)}
    raise UserError(f"transformers' plan splits a layer by {word!r}, which kinkajou does not know", fix="--tp 1")


def matches(pattern: str, name: str) -> bool:
    """Whether a module lies directly below one that the plan names, numbers standing for `*`."""
    atoms, parts = pattern.split("."), name.split(".")[:-1]
    return len(atoms) == len(parts) and all(a in ("*", b) for a, b in zip(atoms, parts, strict=True))


def check_divides(config: Any, tp: int) -> None:
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(config, name, None)
        if size is not None and size % tp:
            raise UserError(
                f"--tp {tp} does not divide the model's {name}",
                evidence=f"{name} {size}",
                fix="choose a divisor, or --tp 1",
            )
