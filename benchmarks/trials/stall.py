"""Time that checkpoints cost: of a run that makes them behind its back, and of the safe write beside a plain one."""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from kinkajou.checkpoint.place import Place
from kinkajou.checkpoint.shelf import Shelf

BLOCK, EVERY = 3, 10
"""Steps of a block, every second of which begins with a save; and the steps between saves that are asked about."""
WORDS, LENGTH, ROWS, BATCH = 22_000, 128, 64, 32
"""The usual batch, of short chats."""
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
SIZES_MB = (1, 16, 64, 600)
ROUNDS = 9


def write_model(folder: Path) -> int:
    """Llama of 50 million weights, random, with one token a word; returns how many they are."""
    vocabulary = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, WORDS)}}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", unk_token="w2")
    config = LlamaConfig(
        **SHAPE,
        vocab_size=WORDS,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config)
    module.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return sum(param.numel() for param in module.parameters())


def write_records(path: Path) -> None:
    """Rows of one length, so that no step is longer than another."""

    def words(first: int) -> str:
        return " ".join(f"w{2 + (first + k * 104_729) % (WORDS - 2)}" for k in range(LENGTH // 2 - 4))

    rows = [{"instruction": words(7919 * i), "output": words(6007 * i + 1)} for i in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def blocks(run: Path, skip: int) -> dict[str, list[float]]:
    """Seconds of each block of steps, those that follow a save and those that do not, from the run's own clock.

    A block after a save holds its copying and all that the write behind it takes from the training.
    """
    times = {row["step"]: row["time_s"] for row in map(json.loads, (run / "timing.jsonl").read_text().splitlines())}
    found: dict[str, list[float]] = {"saving": [], "quiet": []}
    for start in range(skip, max(times) - BLOCK + 1, BLOCK):
        kind = "saving" if start % (2 * BLOCK) == 0 else "quiet"
        found[kind].append(round(times[start + BLOCK] - times[start], 4))
    return found


def recipe(world: Path, output: Path, *, steps: int, behind: bool) -> str:
    table = {
        "model": str(world / "model"),
        "data": str(world / "long.jsonl"),
        "output": str(output),
        "template": "plain",
        "max_len": LENGTH,
        "batch_size": BATCH,
        "epochs": steps * BATCH / ROWS,
        "save_every": 2 * BLOCK,
        "save_behind": behind,
        "keep_last": 1,
        "preflight": "off",
    }
    words = {True: "true", False: "false"}
    lines = [f"{k} = {words[v] if isinstance(v, bool) else json.dumps(v)}" for k, v in table.items()]
    path = output.with_suffix(".toml")
    path.write_text("[sft]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def stall_summary(found: dict[str, list[float]]) -> dict[str, Any]:
    saving, quiet = (statistics.median(found[kind]) for kind in ("saving", "quiet"))
    step = quiet / BLOCK
    return {
        "blocks": sum(map(len, found.values())),
        "step_s": round(step, 3),
        "saving_block_s": round(saving, 3),
        "quiet_block_s": round(quiet, 3),
        "lost_s": round(saving - quiet, 3),
        "lost_share": round((saving - quiet) / (EVERY * step), 4),
    }


def write_cost(folder: Path, size: int) -> dict[str, Any]:
    """A safe checkpoint of so many megabytes beside a plain save of the same tensors, in turns; medians."""
    tensors = {f"w{i}": torch.rand(size * 2**20 // 32) for i in range(8)}
    shelf, place, target = Shelf(folder / f"shelf-{size}"), Place(1), folder / f"plain-{size}"
    target.mkdir()

    def plain() -> None:
        save_file(tensors, target / "model.safetensors")

    def safe() -> None:
        save_file(tensors, shelf.aside(place) / "model.safetensors")
        shelf.commit(place)

    taken = [(seconds(plain), seconds(safe)) for _ in range(ROUNDS if size < 500 else 5)][1:]
    medians = [round(1e3 * statistics.median(column), 1) for column in zip(*taken, strict=True)]
    return {"kind": "write", "megabytes": size, "plain_ms": medians[0], "safe_ms": medians[1]}


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def jobs(folder: Path, rounds: int) -> list[Callable[[], dict[str, Any]]]:
    """So many short runs, then the costs of single writes."""
    model = folder / "model"
    weights: list[int] = []

    def run(number: int) -> dict[str, Any]:
        if not weights:
            weights.append(write_model(model))
            write_records(folder / "long.jsonl")
        output = folder / f"stall-{number}"
        arguments = ["sft", recipe(folder, output, steps=5 * BLOCK, behind=True)]
        done = subprocess.run([sys.executable, "-m", "kinkajou", *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout[-1500:] + done.stderr[-1500:])
        found = blocks(output, skip=BLOCK)
        shutil.rmtree(output)
        return {"kind": "run", "weights": weights[0], "threads": torch.get_num_threads(), **found}

    wanted: list[Callable[[], dict[str, Any]]] = [partial(run, number) for number in range(rounds)]
    return [*wanted, *(partial(write_cost, folder, size) for size in SIZES_MB)]


def right(row: dict[str, Any]) -> bool:
    return row["kind"] == "run" or row["safe_ms"] <= 2 * row["plain_ms"] + 15


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    runs = [row for row in rows if row["kind"] == "run"]
    joined = {kind: [x for row in runs for x in row[kind]] for kind in ("saving", "quiet")}
    writes = [row for row in rows if row["kind"] == "write"]
    return {**(stall_summary(joined) if runs else {}), "writes": len(writes), "writes_right": sum(map(right, writes))}
