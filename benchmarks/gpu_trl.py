"""Training steps and whole GRPO and PPO iterations, ours and TRL's, each in a process of its own on the same models."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from benchmarks import peers
from benchmarks.gpu_limits import Plan, Shape, plan
from benchmarks.gpu_models import Setting, config_of, fresh, random_model, random_rows
from benchmarks.gpu_rows import guarded, shape_of, training_rows
from benchmarks.gpu_rows import sft as our_sft
from benchmarks.speed.material import text, tokenizer

Figures = dict[str, Any]
VERSIONS = {"sft": "trl-1.16", "grpo": "trl-1.16", "ppo": "trl-1.12"}
PACKED, PADDED = "TRL, packed", "TRL, padded, sorted by length"


class Missing(Exception):
    """A peer is not installed."""


def side(kind: str, peer: str | None, job: Mapping[str, Any], folder: Path, here: Setting) -> Figures:
    """Runs a side's script; the last line that it prints is its figures."""
    if peer and not peers.installed(peer):
        raise Missing(f"{peer} is not installed: python -m benchmarks.peers install")
    told = dict(job) | {"device": here.device, "steps": here.repetitions}
    environment = peers.environment(peer) if peer else dict(os.environ)
    if here.device == "cuda":  # what the peers' environment hides, the side may use
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        if seen := os.environ.get("CUDA_VISIBLE_DEVICES"):
            environment["CUDA_VISIBLE_DEVICES"] = seen
    command = [sys.executable, "-m", "benchmarks.gpu_sides", kind, str(folder), json.dumps(told)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=peers.ROOT, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it ended without a word"]
        raise RuntimeError(next((line for line in reversed(lines) if "Error" in line), lines[-1]))
    found: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"memory_share": found["peak_gib"] * 2**30 / here.memory}


def write_models(folder: Path, shape: Shape, here: Setting, *, scalar: bool) -> None:
    """`policy`, and `reward` where it is asked for, with a tokenizer of one word a token."""
    words = tokenizer(shape.vocabulary)
    random_model(shape, here, "fp32").module.save_pretrained(folder / "policy")
    words.save_pretrained(folder / "policy")
    if scalar:
        config = config_of(shape)
        config.num_labels = 1
        with torch.device(here.device):
            AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
        words.save_pretrained(folder / "reward")
    fresh(here)


def compared(sides: Mapping[str, Figures], measure: str, *, higher: bool) -> dict[str, float]:
    """Ours over each peer's, above 1 where ours is better."""
    known = {name: x[measure] for name, x in sides.items() if measure in x}
    if "ours" not in known:
        return {}
    shares = {name: known["ours"] / x for name, x in known.items() if name != "ours"}
    return {name: x if higher else 1 / x for name, x in shares.items()}


def sft(here: Setting) -> Figures:
    """The 1B shape's steps of `sft-1b`, ours against TRL's packed and padded batches, no gradient checkpointing."""
    shape = shape_of("1b", here)
    fits = Plan(shape, 256) if here.small else plan(shape, here.memory)
    most = 256 if here.small else 2048
    rows = training_rows(fits, mean=64 if here.small else 512, most=most)
    found = {"ours": guarded(lambda: our_sft("1b", here))}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_models(folder, fits.shape, here, scalar=False)
        job = {"rows": sorted(rows, key=len, reverse=True), "most": most, "batch": max(1, fits.tokens // most)}
        for name, packed in ((PACKED, True), (PADDED, False)):
            asked = job | {"packed": packed}
            found[name] = guarded(lambda asked=asked: side("trl-sft", VERSIONS["sft"], asked, folder, here))  # type: ignore[misc]
    return {"sides": found, "ratios": compared(found, "tokens_per_s", higher=True)}


def iteration(kind: str, here: Setting) -> Figures:
    """64 answers of 256 tokens to prompts of 64, scored by a reward model; GRPO in groups of 8, PPO with 4 epochs.

    A random model says its end token once in a vocabulary, so nearly every answer has its full length on both sides.
    """
    shape = shape_of("1b", here)
    samples, group, prompt, new = (8, 4, 6, 8) if here.small else (64, 8, 64, 256)
    asked = samples // group if kind == "grpo" else samples
    job = {"samples": samples, "group": group, "new": new, "most": prompt + new + 16, "batch": min(8, samples)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_models(folder, shape, here, scalar=True)
        prompts = [text(row) for row in random_rows(asked * (here.repetitions + 2), prompt, shape.vocabulary)]
        lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        found = {
            "ours": guarded(lambda: side(f"ours-{kind}", None, job, folder, here)),
            "TRL": guarded(lambda: side(f"trl-{kind}", VERSIONS[kind], job, folder, here)),
        }
    for figures in found.values():
        if "seconds" in figures:
            figures["seconds_per_iteration"] = median(figures["seconds"])
    return {"samples": samples, "sides": found, "ratios": compared(found, "seconds_per_iteration", higher=False)}
