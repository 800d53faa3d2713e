"""`kinkajou export`: a model for other programs, as a plain Hugging Face folder or as a GGUF file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from kinkajou.config import ExportConfig
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.errors import UserError
from kinkajou.models.adapters import adapter_base
from kinkajou.models.folder import SHARD_BYTES
from kinkajou.models.forward import LanguageModel, PackedModel, ScalarModel, pack
from kinkajou.models.load import find_model, load_language_model, load_scalar_model, read_settings, save_model
from kinkajou.models.quantised import dequantise
from kinkajou.quant.gguf_file import package, tensor_bytes, write_gguf
from kinkajou.quant.output import FILE, FOLDER, check_fits, check_output, whole

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
NEAR = 1e-3
"""What two ways to compute the same logits in float32 may differ by, of the largest logit."""
PROBE = (2, 12)
"""Rows and tokens of what the written model is asked."""


@dataclass(frozen=True)
class Source:
    """What is exported: whole weights in float32, adapters folded in, nothing quantised."""

    folder: str
    tokenizer: PreTrainedTokenizerBase
    template: str
    model: PackedModel

    @property
    def scalar(self) -> bool:
        return isinstance(self.model, ScalarModel)

    @property
    def ends(self) -> list[int]:
        """All tokens that end an answer, as the model's generation settings say."""
        settings = getattr(self.model.inner, "generation_config", None)
        said = getattr(settings, "eos_token_id", None)
        own = said if isinstance(said, list) else [] if said is None else [said]
        return sorted({int(i) for i in (*own, cast(int, self.tokenizer.eos_token_id))})


def export(folder: str, cfg: ExportConfig) -> None:
    """Writes what `cfg` asks for and says what is in it; nothing is there if it fails."""
    output = Path(cfg.output)
    chosen = find_model(folder)
    check_output(output, chosen, overwrite=cfg.overwrite, kind=FOLDER if cfg.to == "merged" else FILE)
    if cfg.to == "gguf":
        package()
    source = read_source(chosen)
    if cfg.to == "merged":
        size = sum(param.numel() for param in source.model.parameters()) * DTYPES[cfg.dtype].itemsize
        check_fits(output, size, largest=min(size, SHARD_BYTES))
        with whole(output, overwrite=cfg.overwrite) as aside:
            lines = write_merged(source, aside, cfg.dtype)
    else:
        if not isinstance(source.model, LanguageModel):
            raise UserError(f"{chosen} is a reward model, and llama.cpp scores no answers", fix="--to merged")
        size = tensor_bytes(source.model, cfg.dtype)
        check_fits(output, size, largest=size)
        with whole(output, overwrite=cfg.overwrite) as aside:
            name = Path(folder).resolve().name
            lines = write_gguf(source.model, source.tokenizer, aside, dtype=cfg.dtype, ends=source.ends, name=name)
        lines.append(f"{output.stat().st_size / 1e6:,.1f} MB")
    if source.template != "tokenizer" and not source.scalar:
        lines.append(f"chat template {source.template}: the folder has none of its own")
    for line in lines:
        print(line)
    print(f"done: {output}")


def read_source(folder: str) -> Source:
    tokenizer, template = load_tokenizer(folder)
    if is_reward_model(folder):
        model: PackedModel = load_scalar_model(folder, tokenizer, fresh=False)
    else:
        model = load_language_model(folder, tokenizer)
    dequantise(model.inner)
    return Source(folder, tokenizer, template, model)


def is_reward_model(folder: str) -> bool:
    if adapter_base(folder) is not None:
        said = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        return bool(said.get("task_type") == "SEQ_CLS")
    return any(name.endswith("SequenceClassification") for name in read_settings(folder).architectures or ())


def write_merged(source: Source, folder: Path, dtype: str) -> list[str]:
    """A plain Hugging Face folder, asked the same as the source's model before it gets its name."""
    model, kind = source.model, DTYPES[dtype]
    ids = probe(model)
    before = answers(model, ids)
    tell = []
    if kind is not torch.float32:
        with torch.no_grad():
            for name, param in model.module.named_parameters():
                rounded = param.to(kind)
                if not rounded.isfinite().all():
                    raise UserError(
                        f"the weight {name} does not fit {dtype}",
                        evidence=f"its largest is {param.abs().max():g}",
                        fix="--dtype bf16",
                    )
                param.copy_(rounded)  # what is proven below is the rounded model
        change = float((answers(model, ids) - before).abs().max())
        tell.append(f"{dtype} changes the largest of {before.numel():,} {source_kind(source)} by {change:.2g}")
    folder.mkdir()
    wanted = answers(model, ids)
    model.module.to(kind)
    save_model(model, source.tokenizer, folder, end_ids=source.ends)
    name_dtype(folder / "config.json", kind)
    gap, top = difference(folder, wanted, ids, scalar=source.scalar)
    if not gap <= NEAR * max(1.0, top):
        raise UserError(
            "the written model does not compute what the loaded one does, so it was deleted",
            evidence=f"{source_kind(source)} differ by {gap:.3g}, the largest is {top:.3g}",
            exit_code=4,
        )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    said = f"transformers reads it: {source_kind(source)} differ by {gap:.2g} at most, the largest is {top:.3g}"
    return [*tell, said, f"{size / 1e6:,.1f} MB of weights in {dtype}"]


def source_kind(source: Source) -> str:
    return "scores" if source.scalar else "logits"


def name_dtype(path: Path, kind: torch.dtype) -> None:
    """Says the type that the weights are stored in, which is what other programs compute in."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["dtype"] = str(kind).removeprefix("torch.")
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def probe(model: PackedModel) -> Tensor:
    rows, length = PROBE
    size = int(model.inner.get_input_embeddings().weight.shape[0])
    return torch.randint(0, size, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def answers(model: PackedModel, ids: Tensor) -> Tensor:
    """Our packed pass over rows of one length, (b, t): logits (b, t, v), or scores of the last token (b, 1)."""
    rows = pack(ids, torch.full((len(ids),), ids.shape[1]))
    hidden = model.hidden(rows.ids, rows.positions, rows.layout).view(*ids.shape, -1)
    if isinstance(model, LanguageModel):
        return model.logits(hidden)
    return cast(Tensor, model.inner.score(hidden[:, -1].float()))


@torch.no_grad()
def difference(folder: Path, wanted: Tensor, ids: Tensor, *, scalar: bool) -> tuple[float, float]:
    """How far plain transformers is from that on the written folder, and the largest number."""
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    read: Any = kind.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    if scalar:  # it looks for the last token that is not pad
        read.config.pad_token_id = int(ids.max()) + 1
    found = read.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return float((found - wanted).abs().max()), float(wanted.abs().max())
