"""Settings of memory allocators that must stand before the first tensors.  A user's own settings are left alone."""

import ctypes
import os
import platform

import torch

OF_GPU = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
"""Where a user may have set torch's GPU allocator; its name changed in torch 2.9."""
OF_HOST = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"}
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""glibc's numbers of its settings (malloc.h)."""
LARGEST = 2**31 - 1


def settle() -> None:
    """GPU: segments that can grow.  CPU: memory that a step frees is kept for the next."""
    if torch.cuda.is_available():
        if not OF_GPU & os.environ.keys():
            # Packs differ in size from step to step, which splits fixed segments.  Read when CUDA starts.
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    elif not OF_HOST & os.environ.keys():
        keep_freed()


def keep_freed() -> None:
    """By default glibc gives large buffers back to the kernel, which clears every page again when it is touched.

    That is 3 to 5 % of a training step on a CPU (docs/log.md).  Other C libraries have no such settings.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, LARGEST)
        libc.mallopt(TRIM_THRESHOLD, LARGEST)
        libc.mallopt(TOP_PAD, 2**26)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses now, of the GPU or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
