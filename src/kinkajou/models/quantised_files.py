"""Folders with quantised weights, in bitsandbytes' form: what is read of them, checked before any kernel sees it."""

import json
import re
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from kinkajou.errors import UserError
from kinkajou.models.quantised import FourBitLinear, Int8Linear, QuantisedLinear, is_quantised, library

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
KINDS = ("nf4", "fp4")
AS_TORCH = {"format": "pt"}


def bits_of(source: str, config: PreTrainedConfig) -> int:
    """8 or 4 of a quantised folder, 16 of any other; UserError for a form that is not bitsandbytes'."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return 16
    settings = found if isinstance(found, dict) else found.to_dict()
    method = str(settings.get("quant_method"))[:60]
    if method != "bitsandbytes":
        raise UserError(
            f"{source} is quantised by {method!r}, which kinkajou does not read",
            fix="take the model it was made from, and `kinkajou quantize` it",
        )
    four = settings.get("load_in_4bit") is True
    if four == (settings.get("load_in_8bit") is True) or (four and settings.get("bnb_4bit_quant_type") not in KINDS):
        raise UserError(f"the quantization_config in {source} is neither int8 nor nf4 nor fp4")
    names = settings.get("llm_int8_skip_modules") or []
    if not isinstance(names, list) or not all(isinstance(x, str) and re.fullmatch(r"[\w.]{1,200}", x) for x in names):
        raise UserError(f"the llm_int8_skip_modules in {source} are no plain names of modules")
    return 4 if four else 8


def settings_for(bits: int, kept: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model of which those layers are not quantised."""
    common = {"quant_method": "bitsandbytes", "load_in_8bit": bits == 8, "load_in_4bit": bits == 4}
    common |= {"llm_int8_skip_modules": sorted({*kept, "score"}), "llm_int8_threshold": 6.0}
    if bits == 4:
        common |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8",
        }
    return common


def stored_weights(module: nn.Module) -> dict[str, Tensor]:
    """A quantised model's state as transformers reads it from a folder."""
    found = dict(module.state_dict())
    for name, layer in module.named_modules():
        if isinstance(layer, QuantisedLinear):
            for part in ("scb", "absmax"):
                found.pop(f"{name}.{part}", None)
            found |= {f"{name}.{part}": x for part, x in layer.stored().items()}
    tied = cast(Any, module).config.get_text_config().tie_word_embeddings
    head = cast(Any, module).get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if tied and head is not None:
        found = {name: x for name, x in found.items() if name != head_weight(module, head)}
    return {name: x.contiguous() for name, x in found.items()}


def head_weight(module: nn.Module, head: nn.Module) -> str:
    return next(f"{name}.weight" for name, child in module.named_modules() if child is head)


def write_quantised(module: nn.Module, folder: Path, bits: int, kept: list[str], dtype: torch.dtype) -> None:
    """config.json, generation_config.json and model.safetensors of a model that `quantise` has changed.

    What is not quantised is stored as `dtype`, in which plain transformers then computes.
    """
    if not is_quantised(module):
        raise ValueError("nothing in it is quantised")
    stored = {name: x.to(stored_type(name, x, dtype)) for name, x in stored_weights(module).items()}
    save_file(stored, folder / "model.safetensors", AS_TORCH)
    inner = cast(Any, module)
    settings = inner.config.to_dict() | {
        "quantization_config": settings_for(bits, kept),
        "dtype": str(dtype).removeprefix("torch."),
    }
    settings["architectures"] = [type(inner).__name__]
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if getattr(inner, "generation_config", None) is not None:
        inner.generation_config.save_pretrained(str(folder))


def stored_type(name: str, x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype` of what is not quantised."""
    scales = (".SCB", ".absmax", ".quant_map")
    return dtype if x.dtype == torch.float32 and not name.endswith(scales) else x.dtype


def file_in(folder: Path) -> Path:
    return folder / "model.safetensors"


@torch.no_grad()
def adopt(module: nn.Module, source: str) -> nn.Module:
    """Puts our layers in place of bitsandbytes', once their numbers fit each other.

    UserError (exit code 4) for weights that do not fit their scales: bitsandbytes' kernels would read beyond them.
    """
    kinds = library().nn
    for name, layer in list(module.named_modules()):
        if isinstance(layer, kinds.Linear8bitLt | kinds.Linear4bit):
            eight = isinstance(layer, kinds.Linear8bitLt)
            module.set_submodule(
                name, int8_layer(layer, name, source) if eight else four_bit_layer(layer, name, source)
            )
    for param in module.parameters():
        if param.is_floating_point():
            param.data = param.data.float()  # transformers leaves it in the type of the files
    own = cast(Any, module)
    own.config.dtype = torch.float32
    own.hf_quantizer = None
    for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit", "quantization_method"):
        if hasattr(own, flag):
            delattr(own, flag)
    return module


def damaged(source: str, name: str, what: str) -> UserError:
    return UserError(
        f"the quantised weights of {source} are damaged", evidence=f"{name}: {what}", fix="make it again", exit_code=4
    )


def int8_layer(layer: Any, name: str, source: str) -> Int8Linear:
    weight, scb = layer.weight.data, layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    if weight.dtype != torch.int8 or tuple(weight.shape) != (layer.out_features, layer.in_features):
        raise damaged(source, name, f"{weight.dtype} weights of shape {tuple(weight.shape)}")
    if scb is None or scb.numel() != layer.out_features:
        raise damaged(source, name, f"{0 if scb is None else scb.numel()} scales for {layer.out_features} rows")
    check_scales(scb, name, source)
    bias = None if layer.bias is None else layer.bias.data
    return Int8Linear(weight, scb.float().flatten(), bias, transposed=layer.source_cls is Conv1D)


def four_bit_layer(layer: Any, name: str, source: str) -> FourBitLinear:
    state, shape = layer.weight.quant_state, (layer.out_features, layer.in_features)
    if state is None:
        raise damaged(source, name, "it has no scales")
    size, weight = shape[0] * shape[1], layer.weight.data.view(torch.uint8)
    if tuple(state.shape) != shape or weight.numel() * 2 != size + size % 2:
        raise damaged(source, name, f"{weight.numel()} bytes for {shape[0]} x {shape[1]} weights")
    if state.blocksize not in BLOCKS or state.quant_type not in KINDS:
        raise damaged(source, name, f"blocks of {state.blocksize} {str(state.quant_type)[:20]!r}")
    if shape[1] % state.blocksize and shape[0] > 1:
        raise UserError(f"kinkajou cannot run {source}", evidence=f"a row of {name} ends within a block of weights")
    functions = library().functional
    levels = functions.get_4bit_type(state.quant_type, device="cpu")
    if state.code.shape != levels.shape or not torch.allclose(state.code.float().cpu(), levels, atol=1e-4):
        raise damaged(source, name, "other levels than its kind has")
    absmax = flat_scales(state, size, name, source)
    check_scales(absmax, name, source)
    bias = None if layer.bias is None else layer.bias.data
    return FourBitLinear(
        weight.reshape(-1, 1),
        absmax,
        bias,
        shape,
        transposed=layer.source_cls is Conv1D,
        kind=state.quant_type,
        block=state.blocksize,
    )


def flat_scales(state: Any, size: int, name: str, source: str) -> Tensor:
    """One float32 for each block, also where the scales are quantised themselves (Dettmers 2023, section 3)."""
    blocks = -(-size // state.blocksize)
    if state.absmax.numel() != blocks:
        raise damaged(source, name, f"{state.absmax.numel()} scales for {blocks} blocks")
    if not state.nested:
        return cast(Tensor, state.absmax.float())
    outer = state.state2
    if (
        outer.blocksize not in BLOCKS
        or outer.absmax.numel() != -(-blocks // outer.blocksize)
        or outer.code.numel() != 256
    ):
        raise damaged(source, name, f"{outer.absmax.numel()} scales for {blocks} scales")
    return cast(Tensor, library().functional.dequantize_blockwise(state.absmax, outer).float() + state.offset)


def check_scales(scales: Tensor, name: str, source: str) -> None:
    if not scales.isfinite().all() or bool((scales < 0).any()):
        raise damaged(source, name, "a scale that is negative, NaN or infinite")
