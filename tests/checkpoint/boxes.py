"""Checkpoints of a few bytes, and processes that die where a test says."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kinkajou import faults
from kinkajou.checkpoint.place import Place
from kinkajou.checkpoint.shelf import Shelf

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 50,
    "state/run.json": b'{"step": 1}',
    "ema/model": b"e",
}


def fill(folder: Path, mark: bytes = b"") -> None:
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content + mark)


def put(shelf: Shelf, place: Place, mark: bytes = b"") -> Path:
    fill(shelf.aside(place), mark)
    shelf.commit(place)
    return shelf.path(place)


def in_child(work: Callable[[], object], fault: str = "") -> int:
    """The exit status of a fork that did the work: minus the signal that ended it, or 0, or 1 after an exception."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            faults.arm(fault)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory at the folder.  Mounting is the kernel's to allow; limits on files are tested besides."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this machine lets nobody mount: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


KILLED = -signal.SIGKILL
