"""Stage 1, supervised tuning, by the flags of the original system; see README.md."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

import coati_flags as coati

from kinkajou.config import DataConfig, OptimConfig, SFTConfig
from kinkajou.data.sources import read_chats
from kinkajou.train import start_sft

BECAME = {
    **coati.RUN_BECAME,
    "data": "--dataset",
    "max_rows": "--max_datasets_size",
    "bad_rows": "bad records are skipped and counted",
    "epochs": "--max_epochs",
    "batch_size": "--batch_size x --accumulation_steps x processes",
    "max_len": "--max_len",
}


def flags() -> coati.Flags:
    found = coati.training_flags("train_sft.py", "Supervised tuning.", save_path="output", lr=5e-6, log_interval=100)
    found.add_argument("--model", choices=coati.FAMILIES, help="family of --pretrain, checked; detected if omitted")
    found.add_argument("--dataset", help="json, jsonl, csv, parquet or a hub id")
    found.add_argument("--max_datasets_size", type=int, help="use the first N good records")
    found.add_argument("--max_epochs", type=int, default=3, help="passes over the data")
    found.add_argument("--batch_size", type=int, default=4, help="sequences at once in a process")
    found.add_argument(
        "--accumulation_steps", "--accimulation_steps", type=int, default=8, help="batches in one optimiser step"
    )
    found.add_argument("--max_len", type=int, default=512, help="longest sequence in tokens")
    return found


def settings(given: Namespace) -> SFTConfig:
    pretrain = coati.need_folder(given, "pretrain", "the folder or hub id of a language model")
    dataset = coati.need(given, "dataset", "a file of instructions and outputs, or a hub id")
    return SFTConfig(
        base=coati.base_config(given, pretrain, given.max_len),
        source=DataConfig(data=dataset, max_rows=given.max_datasets_size, bad_rows="skip_any"),
        optim=OptimConfig(lr=given.lr),
        parallel=coati.parallel_config(given),
        keep=coati.keep_config(given),
        run=coati.run_config(given),
        epochs=given.max_epochs,
        batch_size=given.batch_size * given.accumulation_steps * coati.world(),
    )


def fitted(cfg: SFTConfig) -> SFTConfig:
    first = min(cfg.batch_size, cfg.source.max_rows or cfg.batch_size)
    rows = len(read_chats(cfg.source.data, max_rows=first, bad_rows="skip_any").rows)
    return replace(cfg, batch_size=coati.smaller(cfg.batch_size, rows, "records"))


def main(arguments: Sequence[str] | None = None) -> int:
    return coati.train(flags(), BECAME, settings, start_sft, arguments, fitted)


if __name__ == "__main__":
    sys.exit(main())
