"""Stage 2, the reward model, by the flags of the original system; see README.md."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import coati_flags as coati

from kinkajou.config import DataConfig, OptimConfig, RewardConfig
from kinkajou.errors import UserError
from kinkajou.train import start_reward

BECAME = {
    **coati.RUN_BECAME,
    "model": "--pretrain, or --model_path to go on from a reward model",
    "data": "--dataset",
    "subset": "--subset",
    "max_rows": "--test: 100 pairs to train on, 10 to evaluate",
    "eval_share": "held out: a tenth, or the 10 pairs of --test",
    "bad_rows": "bad records are skipped and counted",
    "warmup": "fixed then, as was the cosine",
    "epochs": "--max_epochs",
    "batch_size": "--batch_size x processes",
    "max_len": "--max_len",
    "loss": "--loss_fn",
}


def flags() -> coati.Flags:
    found = coati.training_flags(
        "train_reward_model.py", "Reward model from ranked pairs.", save_path="rm_ckpt", lr=5e-6, log_interval=10
    )
    found.add_argument(
        "--model",
        choices=(*coati.FAMILIES, "deberta", "roberta"),
        help="family of --pretrain, checked; detected if omitted",
    )
    found.add_argument("--model_path", help="folder of a reward model to continue from, or an old .pt file")
    found.add_argument("--dataset", default="Dahoas/rm-static", help="file of pairs, or a hub id")
    found.add_argument("--subset", help="subset of the data set, such as harmless-base")
    found.add_argument("--max_epochs", type=int, default=1, help="passes over the pairs")
    found.add_argument("--batch_size", type=int, default=1, help="pairs at once in a process")
    found.add_argument("--max_len", type=int, default=512, help="longest sequence in tokens")
    found.add_argument(
        "--loss_fn",
        "--loss_func",
        choices=("log_sig", "log_exp"),
        default="log_sig",
        help="InstructGPT's or Anthropic's; they are one function",
    )
    found.add_switch("--test", "try it out: 100 pairs to train on, 10 to evaluate")
    return found


def settings(given: Namespace) -> RewardConfig:
    if given.model in ("deberta", "roberta"):
        raise UserError(
            f"--model {given.model}: reward models here have the trunk of a language model",
            fix=f"use one of: {', '.join(coati.FAMILIES)}",
        )
    return RewardConfig(
        base=coati.base_config(given, starting_point(given), given.max_len),
        source=DataConfig(
            data=coati.need(given, "dataset", "a file of chosen and rejected answers, or a hub id"),
            subset=given.subset,
            max_rows=110 if given.test else None,
            eval_share=10 / 110 if given.test else 0.1,
            bad_rows="skip_any",
        ),
        optim=OptimConfig(lr=given.lr, warmup=0.0),
        parallel=coati.parallel_config(given),
        keep=coati.keep_config(given),
        run=coati.run_config(given),
        epochs=given.max_epochs,
        batch_size=given.batch_size * coati.world(),
        loss=given.loss_fn,
    )


def starting_point(given: Namespace) -> str:
    """The reward model to continue from, if there is one, else the language model."""
    if not given.model_path:
        return coati.need_folder(given, "pretrain", "the folder or hub id of a language model")
    old = Path(given.model_path).is_file()
    folder = coati.need_folder(
        given, "model_path", "the folder of a reward model, or an old .pt file", base=given.pretrain
    )
    kinds = coati.hub_config(folder).get("architectures") or ()
    if kinds and not any(kind.endswith("SequenceClassification") for kind in kinds):
        raise UserError(
            f"--model_path {folder} holds a language model, not a reward model",
            evidence=f"config.json says {', '.join(kinds)}",
            fix="give it as --pretrain to start a reward model from it",
        )
    if given.pretrain and not old:
        family = coati.hub_config(given.pretrain).get("model_type")
        since = f"--pretrain {given.pretrain} is a {family} model"
        coati.check_family("--model_path", folder, family, since=since, fix="leave --pretrain out: it is not needed")
        coati.say("note: --model_path has all weights, so --pretrain is not read")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    return coati.train(flags(), BECAME, settings, start_reward, arguments)


if __name__ == "__main__":
    sys.exit(main())
