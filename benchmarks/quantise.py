"""`python -m benchmarks.quantise --train | --figures`: a trained model of 20 M parameters, and what quantising costs it.

The model is a llama trained from scratch by `kinkajou sft` on 4 MB of TinyStories: the first sentence of a story is
the prompt, the rest the answer.  One story in forty is held out and is what the gate reads.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from kinkajou.data.tokenizer import train_tokenizer

MODELS = Path(__file__).parent / ".models"
CORPUS = Path(__file__).parents[2] / "shared/data/corpus/tinystories_4mb.txt"
SHAPE = {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 8, "num_attention_heads": 8}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if asked.train:
        train(asked.epochs, asked.threads)


if __name__ == "__main__":
    main()
