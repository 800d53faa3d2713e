"""`python -m benchmarks.quantise --train | --figures`: a trained model of 20 M parameters, and what quantising costs.

The model is a llama trained from scratch by `kinkajou sft` on 4 MB of TinyStories: the first sentence of a story is
the prompt, the rest the answer.  One story in forty is held out and is what the gate reads.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import unittest.mock
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from kinkajou.config import QuantizeConfig
from kinkajou.data.tokenizer import train_tokenizer
from kinkajou.errors import UserError
from kinkajou.models import quantised, quantised_files
from kinkajou.models.load import find_model
from kinkajou.quant import command

MODELS = Path(__file__).parent / ".models"
CORPUS = Path(__file__).parents[2] / "shared/data/corpus/tinystories_4mb.txt"
SHAPE = {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 8, "num_attention_heads": 8}
SMALL = CORPUS.parents[1] / "models/stories260k"
RESULT = Path(__file__).parent / "results" / "quantise.json"
FIT = ("--calibrate", "CALIBRATION")
WAYS = {
    "int8": ("--bits", "8"),
    "int8, embeddings": ("--bits", "8", "--embeddings"),
    "nf4": ("--bits", "4"),
    "nf4, fitted": ("--bits", "4", *FIT),
    "nf4, fitted, embeddings": ("--bits", "4", "--embeddings", *FIT),
}
VOCABULARY, CONTEXT, HELD_OUT = 2048, 1024, 40


def stories() -> list[tuple[str, str]]:
    """First sentence and rest of each story."""
    texts = re.split(r"(?<!\n)\n(?!\n)", CORPUS.read_text())
    cut = [re.match(r"(.+?[.!?]\"?)(\s.{100,3000})", text, re.DOTALL) for text in texts]
    return [(found[1], found[2].rstrip()) for found in cut if found]


def write_material(folder: Path) -> None:
    """Records, and a model with random weights and a tokenizer of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = stories()
    parts = {"train": [s for i, s in enumerate(kept) if i % HELD_OUT], "held_out": kept[::HELD_OUT]}
    for name, part in parts.items():
        lines = [json.dumps({"prompt": first, "response": rest}) + "\n" for first, rest in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    tokenizer = train_tokenizer((first + rest for first, rest in parts["train"]), VOCABULARY)
    config = LlamaConfig(
        **SHAPE,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(parts['train'])} stories")
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")


def train(epochs: float, threads: int) -> None:
    folder = MODELS / "stories20m"
    write_material(folder)
    command = [sys.executable, "-m", "kinkajou", "sft"]
    for name, value in {
        "model": folder / "start",
        "template": "plain",
        "data": folder / "train.jsonl",
        "eval-data": folder / "held_out.jsonl",
        "dtype": "bf16",
        "lr": 1e-3,
        "warmup": 0.05,
        "weight-decay": 0.1,
        "batch-size": 16,
        "epochs": epochs,
        "max-len": CONTEXT,
        "tokens-per-microbatch": 4096,
        "save-every": 50,
        "keep-last": 2,
        "eval-every": 100,
        "output": folder / "run",
        "export": folder / "model",
    }.items():
        command += [f"--{name}", str(value)]
    subprocess.run([*command, "--overwrite"], check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def quantize(model: str, held_out: str, output: Path, *flags: str) -> dict[str, Any]:
    """The figures of the gate, which is opened wide here so that it tells them of bad models too."""
    command = [sys.executable, "-m", "kinkajou", "quantize", model, "--data", held_out, "--output", str(output)]
    subprocess.run([*command, "--overwrite", "--max-kl", "1000", *flags], check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / "gate.json").read_text())


def figures(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    stories = MODELS / "stories20m"
    held, other = stories / "small_held_out.txt", stories / "small_calibration.txt"
    text = CORPUS.read_text()
    held.write_text(text[-200_000:])
    other.write_text(text[:400_000])
    big = str(stories / "model") if (stories / "model").is_dir() else find_model(str(stories / "run"))
    models = {
        "stories20m": (big, str(stories / "held_out.jsonl"), str(stories / "train.jsonl")),
        "stories260k": (str(SMALL), str(held), str(other)),
    }
    found: dict[str, Any] = {}
    for name, (model, held_out, calibration) in models.items():
        for title, flags in WAYS.items():
            given = [calibration if flag == "CALIBRATION" else flag for flag in flags]
            found[f"{name} {title}"] = told = quantize(model, held_out, MODELS / "quantised", *given)
            print(name, title, line(told), flush=True)
    found["damaged"] = {what: refused(str(SMALL), str(held), what) for what in ("scales", "disk")}
    print(json.dumps(found["damaged"], indent=2))
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


def line(told: dict[str, Any]) -> str:
    ours, rate = told["kinkajou"], told["tokens_per_s"]
    return (
        f"{told['size_ratio']:.3f} of fp32 ({told['tensor_bytes'] / told['fp32_bytes']:.3f} without headers)  "
        f"KL {ours['kl']:.5f} (transformers {told['transformers']['kl']:.5f})  top-1 {ours['agreement']:.4f}  "
        f"perplexity {ours['perplexity']:.4f} -> {ours['perplexity_after']:.4f}  "
        f"{rate['before']:,.0f} -> {rate['after']:,.0f} tokens/s"
    )


def refused(model: str, held_out: str, what: str) -> dict[str, Any]:
    """What the command says of a model whose scales are wrong before it is written, or on the disk afterwards."""
    output, name = MODELS / "damaged", "model.layers.0.mlp.down_proj"
    made, write = quantised.quantise, quantised_files.write_quantised

    def wrong(module: Any, *rest: Any, **more: Any) -> list[str]:
        kept = made(module, *rest, **more)
        if what == "scales":
            module.get_submodule(name).scb.mul_(1.5)
        return kept

    def damage(module: Any, folder: Path, *rest: Any) -> None:
        write(module, folder, *rest)
        if what == "disk":
            path = folder / "model.safetensors"
            weights = load_file(path)
            weights[f"{name}.SCB"][0] *= 1.001
            save_file(weights, path, {"format": "pt"})

    with (
        unittest.mock.patch.object(quantised, "quantise", wrong),
        unittest.mock.patch.object(quantised_files, "write_quantised", damage),
    ):
        code, said = attempt(model, held_out, output)
    return {"exit_code": code, "said": said, "left": output.exists() or (MODELS / ".damaged.tmp").exists()}


def attempt(model: str, held_out: str, output: Path) -> tuple[int, str]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            command.quantize(model, QuantizeConfig(output=str(output), data=held_out, bits=8, overwrite=True))
    except UserError as fault:
        return fault.exit_code, str(fault).replace(str(MODELS), "")
    return 0, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--figures", action="store_true")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if asked.train:
        train(asked.epochs, asked.threads)
    if asked.figures:
        figures(asked.threads)


if __name__ == "__main__":
    main()
