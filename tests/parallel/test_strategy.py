"""What is settled before a strategy takes the device."""

import ctypes
import os
import platform
import resource
import subprocess
import sys
from typing import Any

import pytest
import torch

from kinkajou.parallel import allocator
from kinkajou.parallel.make import make_strategy

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def test_segments_of_gpu_memory_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    make_strategy("naive")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", NAMES)
def test_a_user_who_set_the_allocator_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(name, "max_split_size_mb:64")
    make_strategy("naive")
    assert [os.environ.get(x) for x in NAMES] == [("max_split_size_mb:64" if x == name else None) for x in NAMES]


def test_without_a_gpu_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(allocator, "keep_freed", lambda: None)
    make_strategy("naive")
    assert not any(name in os.environ for name in NAMES)


@pytest.mark.parametrize("name", ["", *sorted(allocator.OF_HOST)])
def test_memory_of_a_cpu_is_kept_unless_a_user_has_set_its_allocator(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in allocator.OF_HOST:
        monkeypatch.setenv(other, "")
        monkeypatch.delenv(other)
    if name:
        monkeypatch.setenv(name, "1")
    asked: list[None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(allocator, "keep_freed", lambda: asked.append(None))
    make_strategy("naive")
    assert len(asked) == (not name)


def test_another_c_library_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: Any) -> Any:
        raise AssertionError(name)

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", none)
    allocator.keep_freed()


TOUCHED = """
import resource, torch
from kinkajou.parallel import allocator
allocator.keep_freed()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's; other C libraries are left as they are"
)
def test_freed_memory_is_used_again_without_page_faults() -> None:
    """In a process of its own, which the settings stay with.  The first few times, glibc's small remainders differ."""
    done = subprocess.run([sys.executable, "-c", TOUCHED], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**26 // resource.getpagesize()
