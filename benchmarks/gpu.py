"""One CUDA GPU: how close training and decoding come to its limits, and rollouts and iterations against peers.

    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --check                       # only: is what runs there right?
    python -m benchmarks.gpu --out FILE [--rows NAME ...]   # that first, then the rows, saved after each
    python -m benchmarks.gpu --from FILE --write            # renders docs/gpu.md from saved figures
    python -m benchmarks.gpu --device cpu --small           # tries everything out on a tiny model

Every row runs in a process of its own; one that fails is saved as "could not be run" and the next goes on.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_check, gpu_page, gpu_rows, gpu_trl
from benchmarks.gpu_models import Setting
from benchmarks.speed.line import versions
from benchmarks.speed.record import commit, machine, read_figures
from kinkajou.errors import UserError

Figures = dict[str, Any]
ROWS: dict[str, Callable[[Setting], Figures]] = {
    "sft-1b": partial(gpu_rows.sft, "1b"),
    "sft-7b": partial(gpu_rows.sft, "7b"),
    "rollouts-fixed": partial(gpu_rows.rollouts, "fixed"),
    "rollouts-varying": partial(gpu_rows.rollouts, "varying"),
    "decode-1b": partial(gpu_rows.decode, "1b"),
    "decode-7b": partial(gpu_rows.decode, "7b"),
    "trl-sft": gpu_trl.sft,
    "trl-grpo": partial(gpu_trl.iteration, "grpo"),
    "trl-ppo": partial(gpu_trl.iteration, "ppo"),
}


def run_check(here: Setting) -> Figures:
    """Every check's finding by name."""
    found: Figures = {}
    for name, check in gpu_check.checks(here).items():
        found[name] = gpu_rows.guarded(partial(checked, check))
    return found


def checked(check: Callable[[], gpu_check.Finding]) -> Figures:
    try:
        seen = check()
    except gpu_check.Absent as reason:
        return {"absent": str(reason)}
    return {"figure": seen.figure, "bound": seen.bound, "good": seen.good, "detail": seen.detail}


def run_row(name: str, here: Setting) -> Figures:
    """In the child."""
    return run_check(here) if name == "check" else gpu_rows.guarded(partial(ROWS[name], here))


def in_child(name: str, here: Setting) -> Figures:
    """A process of its own: its memory goes with it, and so does a device that an error has left unusable."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(run_row, name, here).result()
        except BrokenProcessPool:
            return {"failed": "the process ended without a word (killed, or out of the host's memory)"}


def setting(chosen: argparse.Namespace) -> Setting:
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA GPU here",
            evidence=f"torch {torch.__version__} sees none",
            fix="run it on a machine with one, or try it out: python -m benchmarks.gpu --device cpu --small",
        )
    return Setting(chosen.device, chosen.small, chosen.repetitions)


def header(here: Setting) -> Figures:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    device = {"name": here.name, "memory_gib": round(here.memory / 2**30, 1), "small": here.small}
    try:
        measured = commit()
    except (OSError, subprocess.CalledProcessError):
        measured = "unknown (no git repository here)"  # a copy of the working tree on a lent machine
    about = {"kind": "gpu", "when": now, "commit": measured, "machine": machine(), "versions": versions()}
    return about | {"device": device, "repetitions": here.repetitions}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    made.add_argument(
        "--rows", nargs="+", metavar="NAME", choices=list(ROWS), help="only these rows, without the check"
    )
    made.add_argument("--check", action="store_true", help="only the check; exit code 1 if something is wrong")
    made.add_argument("--out", type=Path, metavar="FILE", help="write figures here as JSON, after every row")
    made.add_argument("--from", dest="saved", type=Path, metavar="FILE", help="read figures instead of measuring")
    made.add_argument("--write", action="store_true", help="render docs/gpu.md")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--small", action="store_true", help="a tiny model, to try the program")
    made.add_argument("--repetitions", type=int, default=3)
    made.add_argument("--list", action="store_true", help="name the rows and stop")
    return made


def main(arguments: Sequence[str]) -> int:
    chosen = parser().parse_args(arguments)
    if chosen.list:
        print("\n".join(ROWS))
        return 0
    if chosen.saved:
        found = read_figures(chosen.saved)
    elif chosen.write and not torch.cuda.is_available():
        found = {"rows": {}}
    else:
        here = setting(chosen)
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # fewer gaps where memory is tight
        found = header(here) | {"rows": {}}
        for name in ["check"] if chosen.check else chosen.rows or ["check", *ROWS]:
            found["rows"][name] = in_child(name, here)
            print(gpu_page.told(name, found["rows"][name]), flush=True)
            if chosen.out:
                chosen.out.parent.mkdir(parents=True, exist_ok=True)
                chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if chosen.write:
        if found.get("device", {}).get("small"):
            raise UserError("these figures are of a trial on a tiny model", fix="measure without --small")
        gpu_page.write(found)
    return 1 if gpu_page.wrong(found["rows"].get("check", {})) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as fault:
        print(fault, file=sys.stderr)
        sys.exit(fault.exit_code)
