"""Runs of the command line in children of one warm process: torch and kinkajou are imported once, not once a trial.

The parent never computes: a child of a process that has started OpenMP's threads would wait for them for ever.
"""

import importlib
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

WARM = (
    *("numpy", "torch", "torch.optim", "transformers", "peft", "cyclopts", "rich.live", "safetensors.torch"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "kinkajou.cli"),
    *(f"kinkajou.train.{stage}" for stage in ("sft", "reward", "preference", "ppo", "grpo")),
)


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that ended it."""

    code: int
    seconds: float
    said: str


def warm() -> None:
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name in WARM:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def command(
    home: Path,
    *arguments: str,
    fault: str = "",
    before: Callable[[], None] | None = None,
    seen: Path | None = None,
    begun: Path | None = None,
) -> Callable[[], int]:
    """`kinkajou ARGUMENTS` in a folder, with a fault armed; `before` may change the process first.

    Into `seen` goes how often each point was reached, a line for each; `begun` is made once training begins.
    """

    def work() -> int:
        from kinkajou import faults
        from kinkajou.cli import main

        os.chdir(home)
        faults.arm(fault)
        if before:
            before()
        times: Counter[str] = Counter()
        if seen:
            faults._reach = lambda point: times.update([point]) or ""
        if begun:
            faults._reach = lambda point: begun.touch() or ""
        code = main(list(arguments))
        if seen:
            seen.write_text("".join(f"{name} {number}\n" for name, number in times.items()))
        return code

    return work


def start(work: Callable[[], int], log: Path) -> int:
    """Begins the work in a child whose generators are as chance has them, as in any new process; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        unseed()
        code = work()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def unseed() -> None:
    import numpy
    import torch

    random.seed()
    numpy.random.seed()
    torch.manual_seed(int.from_bytes(os.urandom(7), "little"))


def wait(pid: int, log: Path, *, timeout_s: float = 60.0, began: float | None = None) -> Ended:
    """The child's end; one that has none in time is killed and raises."""
    began = time.monotonic() if began is None else began
    while True:
        gone, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.monotonic() - began
        if gone:
            return Ended(os.waitstatus_to_exitcode(status), seconds, log.read_text(errors="replace"))
        if seconds > timeout_s:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"no end after {timeout_s:.0f} s:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.002)


def until(there: Callable[[], bool], pid: int, log: Path, *, timeout_s: float = 30.0) -> None:
    """Waits for something that a child does."""
    end = time.monotonic() + timeout_s
    while not there():
        if time.monotonic() > end or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise RuntimeError(f"a run ended too early, or did not come to its first step:\n{log.read_text()[-3000:]}")
        time.sleep(0.001)


def run(work: Callable[[], int], log: Path, *, timeout_s: float = 60.0) -> Ended:
    """The work in a child, to its end."""
    log.unlink(missing_ok=True)
    return wait(start(work, log), log, timeout_s=timeout_s)


def counts(path: Path) -> Mapping[str, int]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name: int(number) for name, number in map(str.split, lines)}
