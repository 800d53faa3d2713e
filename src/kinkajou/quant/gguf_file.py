"""One GGUF file of a model, written by the `gguf` package."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel
from kinkajou.quant.gguf_tensors import check_architecture, hparams, named
from kinkajou.quant.gguf_tokens import Vocabulary, vocabulary

KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
FILES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
BLOCK = 32
"""Weights of a row that share a scale in q8_0."""


def package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files are written by the package gguf", fix="pip install 'kinkajou[gguf]'") from None
    return gguf


def kind_of(name: str, x: Tensor, dtype: str) -> str:
    """The type that a tensor is stored in: vectors stay float32; a row that q8_0 cannot cut in blocks is float16."""
    if x.ndim < 2:
        return "F32"
    return "F16" if dtype == "q8_0" and x.shape[-1] % BLOCK else KINDS[dtype]


def tensor_bytes(model: LanguageModel, dtype: str) -> int:
    """What the matrices and vectors of the file take; UserError where llama.cpp does not run the model."""
    gguf, config = package(), cast(Any, model.inner).config
    check_architecture(config)
    return sum(
        math.prod(gguf.quants.quant_shape_to_byte_shape(tuple(x.shape), gguf.GGMLQuantizationType[kind]))
        for name, x in named(config, model.inner.state_dict())
        for kind in (kind_of(name, x, dtype),)
    )


def write_gguf(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    dtype: str,
    ends: Sequence[int],
    name: str,
) -> list[str]:
    """The file; returns sentences about what is in it otherwise than asked.  The model is whole and in float32."""
    gguf = package()
    config: Any = model.inner.config
    check_architecture(config)
    rows = int(model.inner.get_input_embeddings().weight.shape[0])
    known = vocabulary(tokenizer, rows, ends)
    weights = model.inner.state_dict()
    writer = gguf.GGUFWriter(str(path), config.model_type)
    try:
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[FILES[dtype]])
        if dtype == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in hparams(config).items():
            add(writer, f"{config.model_type}.{key}", value)
        write_vocabulary(writer, known)
        told = write_tensors(gguf, writer, list(named(config, weights)), dtype)
    finally:
        writer.close()
    unused = len(set(range(rows)).difference(tokenizer.get_vocab().values()))
    return told + ([f"{unused} rows of the embedding have no token: they are named [PADn]"] if unused else [])


def add(writer: Any, key: str, value: int | float | str) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def write_vocabulary(writer: Any, known: Vocabulary) -> None:
    writer.add_tokenizer_model(known.model)
    writer.add_tokenizer_pre(known.pre)
    writer.add_token_list(known.tokens)
    writer.add_token_types(known.kinds)
    if known.scores:
        writer.add_token_scores(known.scores)
    if known.merges:
        writer.add_token_merges(known.merges)
    for end, index in known.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{KEYS[end]}_token_id", index)
    for flag, said in known.flags.items():
        writer.add_bool(f"tokenizer.ggml.{flag}", said)
    if known.templates:
        writer.add_chat_template(known.templates["default"])
    if others := sorted(known.templates.keys() - {"default"}):
        writer.add_array("tokenizer.chat_templates", others)
        for name in others:
            writer.add_string(f"tokenizer.chat_template.{name}", known.templates[name])


KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}


def write_tensors(gguf: ModuleType, writer: Any, found: list[tuple[str, Tensor]], dtype: str) -> list[str]:
    """One after the other, so that no second copy of the model is made."""
    kinds = {name: gguf.GGMLQuantizationType[kind_of(name, x, dtype)] for name, x in found}
    for name, x in found:
        stored = gguf.quants.quant_shape_to_byte_shape(tuple(x.shape), kinds[name])
        numpy_type = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}.get(kinds[name].name)
        shape = tuple(x.shape) if numpy_type else stored
        writer.add_tensor_info(name, shape, numpy_type or np.dtype(np.uint8), int(np.prod(stored)), kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, x in found:
        plain = np.ascontiguousarray(x.detach().float().cpu().numpy())
        with np.errstate(over="ignore"):  # what does not fit is refused in the next line
            stored = gguf.quants.quantize(plain, kinds[name])
        if kinds[name].name in ("F16", "Q8_0") and not np.isfinite(gguf.quants.dequantize(stored, kinds[name])).all():
            raise UserError(
                f"the weight {name} does not fit {dtype}",
                evidence=f"its largest is {abs(plain).max():g}",
                fix="--dtype bf16",
            )
        writer.write_tensor_data(stored)
    other = [name for name, x in found if dtype == "q8_0" and kinds[name].name == "F16"]
    if not other:
        return []
    return [f"{len(other)} matrices are in f16: their rows are no multiple of {BLOCK}, {other[0]} among them"]
