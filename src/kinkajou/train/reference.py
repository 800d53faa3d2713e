"""Log-probabilities of answers under the reference: computed once, kept in the run's folder."""

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kinkajou.algos.dpo import length_weights
from kinkajou.batch import TokenBatch, pad_rows
from kinkajou.config import PreferConfig
from kinkajou.data.chat import ChatFormat, Encoded
from kinkajou.data.tokenizer import check_vocabulary
from kinkajou.memory import Budget
from kinkajou.models.adapters import base_weights
from kinkajou.models.forward import LanguageModel
from kinkajou.models.load import LoadOptions, find_model, load_language_model
from kinkajou.models.presets import PRESETS
from kinkajou.parallel.strategy import Strategy
from kinkajou.train import setup
from kinkajou.train.console import Console
from kinkajou.train.update import in_parts

FILE = "reference.safetensors"
CHUNK = 256
"""Answers that are padded to one batch; the model sees them packed, in micro-batches."""


@dataclass(frozen=True)
class Questions:
    """Answers that the reference is asked for: `tail` weighs the targets beyond the first `heads` of each."""

    rows: Sequence[Encoded]
    heads: Sequence[int]
    tail: float = 1.0


def reference_logps(
    cfg: PreferConfig,
    policy: LanguageModel,
    form: ChatFormat,
    asked: Questions,
    s: Strategy,
    say: setup.Say,
    budget: Budget,
) -> Tensor:
    """Log-probability of each answer, (n,) float32 on the CPU: from the run's folder where it still fits.

    Without `--reference` the policy itself answers, before its first step or without its adapters.
    """
    path = Path(cfg.run.output) / FILE
    with reference_model(cfg, policy, form, s) as model:
        setup.check_context(model, max(len(row.tokens) for row in asked.rows))
        key = fingerprint(model, asked, s)
        known = s.gather(read(path, key, len(asked.rows), say) if s.main else [])
        logps = torch.tensor(known or s.gather(score(model, asked, form.pad_id, budget, s)))
    if not known and s.main:
        write(path, key, logps)
    return logps


@contextmanager
def reference_model(cfg: PreferConfig, policy: LanguageModel, form: ChatFormat, s: Strategy) -> Iterator[LanguageModel]:
    """The named reference, gone again at the end; else the policy, its adapters off."""
    if cfg.method.reference is None:
        with base_weights(policy.module) if cfg.base.lora_rank else nullcontext():
            yield policy
        return
    options = LoadOptions(dtype=cfg.base.dtype, context=cfg.base.max_len, seed=cfg.run.seed)
    source = find_model(cfg.method.reference)
    model = load_language_model(source, form.tokenizer, options)
    if source not in PRESETS:  # which have no tokenizer of their own
        fix = "choose a reference that was trained with the policy's tokenizer, or leave --reference out"
        check_vocabulary(source, form.tokenizer, other="reference", fix=fix)
    yield cast(LanguageModel, s.wrap(model.freeze()))


def score(model: LanguageModel, asked: Questions, pad_id: int, budget: Budget, s: Strategy) -> list[float]:
    """This rank's answers: every world-th."""
    own = range(s.rank, len(asked.rows), s.world)
    console = Console("reference", max(1, len(own)), ("answers_left",), every=len(own) + 1, active=s.main)
    found: list[float] = []
    with console:
        for start in range(0, len(own), CHUNK):
            chosen = own[start : start + CHUNK]
            rows = [asked.rows[i] for i in chosen]
            batch = pad_rows([row.tokens for row in rows], [row.counts for row in rows], pad_id=pad_id)
            heads = torch.tensor([asked.heads[i] for i in chosen], device=s.device)
            batch = batch.to(s.device)
            logp = in_parts(batch, budget, lambda part: token_logps(model, part), s.passes)
            found += (logp * length_weights(batch.mask, heads, asked.tail)).sum(1).tolist()
            console.show(len(found), {"answers_left": len(own) - len(found)})
    return found


def token_logps(model: LanguageModel, part: TokenBatch) -> Tensor:
    logp: Tensor = model(part.tokens, part.mask).logp
    return logp


def fingerprint(model: LanguageModel, asked: Questions, s: Strategy) -> str:
    """Changes with any weight, the compute type, any token asked for, and how tokens are weighed.

    Sharded weights are made whole one by one, by all ranks together.
    """
    digest = hashlib.sha256(f"{model.dtype} {asked.tail!r}".encode())
    weights = {plain_name(name): x for name, x in model.module.named_parameters() if "lora_" not in name}
    for name in sorted(weights):
        x = s.full(weights[name].detach()).cpu().contiguous()
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
    for row, head in zip(asked.rows, asked.heads, strict=True):
        digest.update(array("q", (len(row.tokens), head, *row.tokens)).tobytes() + bytes(row.counts))
    return digest.hexdigest()


def plain_name(name: str) -> str:
    """The weight's name without PEFT's wrapping: a base model and its wrapped self are one reference."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def read(path: Path, key: str, count: int, say: setup.Say) -> list[float]:
    """The kept values, [] if there are none that fit."""
    if not path.is_file():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            known, values = (file.metadata() or {}).get("key"), file.get_tensor("logp").tolist()
    except (SafetensorError, OSError) as fault:
        say(f"note: {path} cannot be read and is computed again ({fault})")
        return []
    if known != key or len(values) != count:
        say(f"note: {path} belongs to other records, settings or another reference and is computed again")
        return []
    say(f"reference: log-probabilities of {count:,} answers from {path}")
    return list(values)


def write(path: Path, key: str, logps: Tensor) -> None:
    """Complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    save_file({"logp": logps}, aside, metadata={"key": key})
    os.replace(aside, path)
