"""Tokens a second and peak memory of a model over a few instructions, by the flags of 2023; see README.md."""

import resource
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from flags import bits_of, coati, model_flags, model_of

from kinkajou.config import ChatConfig
from kinkajou.errors import UserError

INSTRUCTIONS = (
    "Name three fruits and say which of them you would take on a journey.",
    "Explain to a child why the sky is blue.",
    "Write a short poem about a kinkajou that cannot sleep.",
    "Give five tips for keeping a kitchen tidy.",
    "What is the difference between a lake and a pond?",
    "Rewrite in the past tense: She walks home and sings.",
    "How do I calculate the area of a circle?",
    "List the steps for changing a bicycle tyre.",
)


def flags() -> coati.Flags:
    found = model_flags("benchmark.py", "Tokens a second and peak memory over a few instructions.")
    found.add_argument("--instructions", help="file with one instruction a line, instead of the eight built in (new)")
    found.add_argument("--max_new_tokens", type=int, default=512, help="longest answer in tokens")
    found.add_argument("--show", action="store_true", help="print the answers too (new)")
    return found


def instructions_of(given: Namespace) -> list[str]:
    if not given.instructions:
        return list(INSTRUCTIONS)
    try:
        lines = Path(given.instructions).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"--instructions {given.instructions} cannot be read", evidence=str(fault)) from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise UserError(f"--instructions {given.instructions} has no lines")
    return found


def measure(given: Namespace) -> None:
    asked = instructions_of(given)
    cfg = ChatConfig(bits=bits_of(given), max_new_tokens=given.max_new_tokens, temperature=1.0, top_k=50, top_p=0.95)
    source = model_of(given)
    import torch

    from kinkajou.chat.talker import Talker
    from kinkajou.data.records import Message

    talker = Talker(source, cfg)
    loaded = peak_memory()
    total, took_s = 0, 0.0
    for number, instruction in enumerate(asked, 1):
        began = time.perf_counter()
        answer = talker.answer([Message("user", instruction)])
        text = "".join(answer)
        seconds = time.perf_counter() - began
        total, took_s = total + answer.num_tokens, took_s + seconds
        coati.say(
            f"{number}: {answer.num_tokens} tokens in {seconds:.2f} s, {answer.num_tokens / seconds:.1f} tokens/s"
        )
        if given.show:
            coati.say(f"{instruction}\n{text}\n")
    where = "GPU" if torch.cuda.is_available() else "process"
    coati.say(f"all: {total} tokens in {took_s:.2f} s, {total / took_s:.1f} tokens/s")
    coati.say(
        f"peak memory of the {where}: {peak_memory() / 2**20:.0f} MiB, {loaded / 2**20:.0f} MiB of it when loaded"
    )


def peak_memory() -> int:
    """Bytes."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: Sequence[str] | None = None) -> int:
    return coati.guarded(flags(), {}, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
