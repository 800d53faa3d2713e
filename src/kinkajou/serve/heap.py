"""The C library's heap of a process that serves for months."""

import ctypes
import os
import platform

TRIM_THRESHOLD = -1
"""glibc's number of the setting (malloc.h)."""
SPARE_BYTES = 65_536
OF_USER = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"}


def give_back() -> None:
    """Free memory at the heap's end goes back to the system; what a user has set of this himself stays.

    By default glibc raises that threshold whenever a large buffer is freed, and the process then grows by 0.3 MB every
    1,000 streams for hours, though nothing is held (docs/log.md).
    """
    if platform.libc_ver()[0] == "glibc" and not OF_USER & os.environ.keys():
        ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, SPARE_BYTES)
