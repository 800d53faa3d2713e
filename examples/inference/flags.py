"""What the scripts of this folder share: the flags of 2023 that choose a model and how its weights are held."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import coati_flags as coati

from kinkajou.errors import UserError

BITS: dict[str | None, Literal[16, 8, 4]] = {None: 16, "8bit": 8, "4bit": 4}


def model_flags(script: str, purpose: str) -> coati.Flags:
    flags = coati.Flags(script, purpose)
    flags.add_argument("folder", nargs="?", metavar="pretrained", help="folder, run or hub id of a model")
    flags.add_argument("--pretrained", help="the same")
    flags.add_argument("--quant", choices=["8bit", "4bit"], help="quantise the weights while loading: int8 or nf4")
    flags.add_argument("--gptq_checkpoint", help="accepted; 4-bit weights are made of the model itself")
    flags.add_argument("--gptq_group_size", type=int, default=128, help="accepted; nf4's blocks have 64 weights")
    return flags


def model_of(given: Namespace) -> str:
    """The model's folder or name; says what becomes of the flags of GPTQ."""
    if given.folder and given.pretrained and given.folder != given.pretrained:
        raise UserError("two models are named", evidence=f"{given.folder} and --pretrained {given.pretrained}")
    given.pretrained = given.pretrained or given.folder
    coati.need(given, "pretrained", "the folder of a model, a run, or a hub id")
    if given.gptq_checkpoint:
        if given.quant != "4bit":
            raise UserError("--gptq_checkpoint is for --quant 4bit", fix="add --quant 4bit, or leave it out")
        coati.say(
            f"note: --gptq_checkpoint {given.gptq_checkpoint} is not read, nor is --gptq_group_size: the 4-bit weights "
            f"are nf4 in blocks of 64, made of {given.pretrained} while it loads"
        )
    return coati.need_folder(given, "pretrained", "the folder of a model, a run, or a hub id")


def bits_of(given: Namespace) -> Literal[16, 8, 4]:
    return BITS[given.quant]
