"""`kinkajou quantize`: a model with int8 or 4-bit weights, kept only if it still says what the original says."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich import text as words
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kinkajou.config import QuantizeConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.tokenizer import check_vocabulary, load_tokenizer
from kinkajou.errors import UserError
from kinkajou.evals.reward_scores import padded, values
from kinkajou.models import quantised, quantised_files
from kinkajou.models.adapters import adapter_base
from kinkajou.models.forward import LanguageModel, PackedModel, ScalarModel
from kinkajou.models.load import find_model, load_language_model, load_scalar_model, read_settings
from kinkajou.quant import gate, gptq
from kinkajou.quant.output import check_fits, check_output, whole
from kinkajou.quant.text import Text, calibration_rows, check_texts, gate_text

REFUSED = 3
"""Exit code where the quantised model is too far from the original."""
MAX_KL = {8: 0.01, 4: 0.1}
REPORT = "gate.json"


@dataclass(frozen=True)
class Work:
    """The original, and what it is to become."""

    source: str
    cfg: QuantizeConfig
    form: ChatFormat
    original: PackedModel
    text: Text
    calibration: list[list[int]]

    @property
    def scalar(self) -> bool:
        return isinstance(self.original, ScalarModel)

    @property
    def limit(self) -> float:
        return MAX_KL[self.cfg.bits] if self.cfg.max_kl is None else self.cfg.max_kl


def quantize(folder: str, cfg: QuantizeConfig) -> None:
    """Writes `cfg.output`, or nothing at all: UserError with exit code 3 where the gate refuses it."""
    output, source = Path(cfg.output), find_model(folder)
    check_texts(cfg)
    read = (cfg.data, cfg.calibrate, find_model(cfg.reward) if cfg.reward else "")
    check_output(output, source, overwrite=cfg.overwrite, read=[name for name in read if name])
    quantised.library()
    work = prepared(source, cfg)
    console = Console()
    with whole(output, overwrite=cfg.overwrite) as aside:
        aside.mkdir()
        module, kept = quantised_module(work)
        written = quantised_files.stored_weights(module)
        dtype = torch.bfloat16 if cfg.embeddings else torch.float32
        size = sum(x.numel() * quantised_files.stored_type(name, x, dtype).itemsize for name, x in written.items())
        check_fits(output, size, largest=size)
        quantised_files.write_quantised(module, aside, cfg.bits, kept, dtype)
        work.form.tokenizer.save_pretrained(str(aside))
        del module
        found = judged(work, aside, written)
        found |= {"not_quantised": sorted(kept), "bits": cfg.bits, "max_kl": work.limit, "text": work.text.told}
        console.print(page(found, work))
        check_gate(found, work)
        (aside / REPORT).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"done: {output}")


def prepared(source: str, cfg: QuantizeConfig) -> Work:
    settings = read_settings(adapter_base(source) or source)
    if (bits := quantised_files.bits_of(source, settings)) != 16 and not adapter_base(source):
        raise UserError(
            f"{source} is quantised already", evidence=f"{bits} bits", fix="name the model it was made from"
        )
    tokenizer, _ = load_tokenizer(source)
    form = ChatFormat(tokenizer)
    scalar = any(name.endswith("SequenceClassification") for name in settings.architectures or ())
    if scalar and cfg.reward:
        raise UserError("--reward scores answers; a reward model gives none", fix="leave --reward out")
    if cfg.reward:
        check_vocabulary(find_model(cfg.reward), tokenizer, other="reward model", fix="give one of the same tokenizer")
    original: PackedModel
    if scalar:
        original = load_scalar_model(source, tokenizer, fresh=False).freeze()
    else:
        original = load_language_model(source, tokenizer).freeze()
    original.to(device())
    calibration = calibration_rows(cfg, form, original) if cfg.calibrate else []
    return Work(source, cfg, form, original, gate_text(cfg, form, original), calibration)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quantised_module(work: Work) -> tuple[nn.Module, list[str]]:
    """The model again, quantised, and the linear layers that are not."""
    load = load_scalar_model if work.scalar else load_language_model
    module = load(work.source, work.form.tokenizer).freeze().inner
    cfg = work.cfg
    if cfg.bits == 4:
        quantised.widen(module)
    made = {}
    if cfg.calibrate:
        made = gptq.layers(module, work.calibration, cfg.bits, device=device())
    kept = quantised.quantise(module, cfg.bits, head=cfg.head, ready=made)
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if head is not None and not isinstance(head, quantised.QuantisedLinear):
        kept = sorted({*kept, next(name for name, layer in module.named_modules() if layer is head)})
    return module, kept


def judged(work: Work, folder: Path, written: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What lies in the folder, read again by us and by plain transformers, against the original."""
    stored = load_file(folder / "model.safetensors")
    if lost := [name for name, x in written.items() if not torch.equal(stored[name], x.to(stored[name].dtype).cpu())]:
        raise UserError(f"{folder} does not hold what was written", evidence=", ".join(lost[:3]), exit_code=4)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    full = 4 * sum(param.numel() for param in work.original.parameters())
    found: dict[str, Any] = {
        "bytes": size,
        "tensor_bytes": sum(x.nbytes for x in stored.values()),
        "fp32_bytes": full,
        "size_ratio": size / full,
    }
    if work.scalar:
        return found | scalar_figures(work, folder)
    return found | language_figures(work, folder)


def language_figures(work: Work, folder: Path) -> dict[str, Any]:
    original, form, text = cast(LanguageModel, work.original), work.form, work.text
    ours = load_language_model(str(folder), form.tokenizer).freeze()
    ours.to(device())
    before = gate.our_logits(original)
    found: dict[str, Any] = {"kinkajou": asdict(gate.distance(before, gate.our_logits(ours), text.rows))}
    with quantised.quiet():
        found["transformers"] = asdict(gate.distance(before, plain_logits(folder), text.rows))
    prompts = text.prompts[:8]
    rates = gate.speeds([original, ours], form, prompts, new=text.room)
    found["tokens_per_s"] = {"before": rates[0], "after": rates[1], "answers": len(prompts)}
    if work.cfg.reward:
        judge = load_scalar_model(find_model(work.cfg.reward), form.tokenizer, fresh=False).freeze()
        judge.to(device())
        scores = [gate.reward_of(m, judge, form, text.prompts, new=text.room)[0] for m in (original, ours)]
        found["reward"] = dict(zip(("before", "after"), scores, strict=True)) | {"answers": len(text.prompts)}
    return found


def plain_logits(folder: Path) -> gate.Logits:
    """By transformers and bitsandbytes alone, as somebody else would load it."""
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True)
    model.eval().to(device())

    @torch.no_grad()
    def ask(row: Sequence[int]) -> torch.Tensor:
        return cast(torch.Tensor, model(torch.tensor([list(row)], device=model.device)).logits[0])

    return ask


def scalar_figures(work: Work, folder: Path) -> dict[str, Any]:
    ours = load_scalar_model(str(folder), work.form.tokenizer, fresh=False).freeze()
    ours.to(device())
    rows = work.text.rows

    def scores(model: ScalarModel) -> list[float]:
        found: list[float] = []
        for row in rows:
            batch = padded([row], work.form.pad_id).to(model.device)
            found += values(lambda b: cast(torch.Tensor, model(b.tokens, b.mask, at="end")), batch)
        return found

    before, tokens = scores(cast(ScalarModel, work.original)), sum(map(len, rows))
    with quantised.quiet(), torch.no_grad():
        plain: Any = AutoModelForSequenceClassification.from_pretrained(str(folder), local_files_only=True)
        plain.eval().to(device())
        theirs = [float(plain(torch.tensor([list(row)], device=plain.device)).logits[0, 0]) for row in rows]
    return {
        "kinkajou": asdict(gate.score_distance(before, scores(ours), tokens)),
        "transformers": asdict(gate.score_distance(before, theirs, tokens)),
    }


def check_gate(found: dict[str, Any], work: Work) -> None:
    """Both ways of computing must be near enough: NaN is not."""
    for who in ("kinkajou", "transformers"):
        kl, unit = found[who]["kl"], "nats a pair of texts" if work.scalar else "nats a token"
        if not kl <= work.limit:
            raise UserError(
                f"the gate refuses the {work.cfg.bits}-bit model: nothing is saved",
                evidence=f"KL to the original {kl:.4g} {unit} computed by {who}, at most {work.limit:g}",
                fix="--calibrate DATA, more bits, or a larger --max-kl if that is near enough",
                exit_code=REFUSED,
            )


def page(found: dict[str, Any], work: Work) -> Table:
    title = f"{work.source} with {work.cfg.bits}-bit weights, on {work.text.told}"
    table = Table(title=words.Text(title), title_justify="left")
    for name in ("", "original", "quantised", ""):
        table.add_column(name, justify="left" if name == "" else "right")
    mb = (found["fp32_bytes"] / 1e6, found["bytes"] / 1e6)
    table.add_row("weights on disk, MB", f"{mb[0]:.2f}", f"{mb[1]:.2f}", f"{found['size_ratio']:.3f} of float32")
    ours, plain = found["kinkajou"], found["transformers"]
    unit = "nats a pair of texts" if work.scalar else "nats a token"
    table.add_row("KL to the original", "0", f"{ours['kl']:.5f}", f"{unit}; at most {work.limit:g}")
    table.add_row("  by plain transformers", "0", f"{plain['kl']:.5f}", "")
    table.add_row("the same choice", "1", f"{ours['agreement']:.4f}", "order of two texts" if work.scalar else "top-1")
    if not work.scalar:
        table.add_row("perplexity", f"{ours['perplexity']:.4f}", f"{ours['perplexity_after']:.4f}", "")
        rates = found["tokens_per_s"]
        told = "one answer" if rates["answers"] == 1 else f"{rates['answers']} answers at once"
        table.add_row("decoding, tokens/s", f"{rates['before']:,.0f}", f"{rates['after']:,.0f}", told)
    if "reward" in found:
        r = found["reward"]
        table.add_row("reward of greedy answers", f"{r['before']:.4f}", f"{r['after']:.4f}", f"{r['answers']} answers")
    if found["not_quantised"]:
        names = found["not_quantised"]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        table.add_row("not quantised", "", "", words.Text(", ".join(names[:4]) + more))
    return table
