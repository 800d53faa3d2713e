"""The decode attention of a CPU, in C (attention.c): built once by the system's compiler, in half a second.

torch has no kernel for one query against rows of different lengths: its products read every row to the longest
one's end, in float32.  Where no compiler is found those products are used, which say the same, more slowly.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("attention.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
SWITCH = "KINKAJOU_NATIVE"
"""Environment variable: `off` never builds nor loads anything."""
NAMES = {torch.float32: "attend_float32", torch.bfloat16: "attend_bfloat16"}
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64


def missing() -> str | None:
    """Why there is no kernel, None if there is one."""
    return library()[1]


@cache
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """The loaded library, or None and why: built at the first call of an installation, checked at each."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0"):
        return None, f"{SWITCH} is off"
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None, "no C compiler was found"
    try:
        found = ctypes.CDLL(str(built(compiler)))
    except (OSError, subprocess.SubprocessError) as fault:  # then torch's products are used
        return None, f"the C compiler {compiler} could not build it: {str(fault).splitlines()[0][:200]}"
    for name in NAMES.values():
        getattr(found, name).argtypes = [POINTER] * 8 + [INTEGER] * 6 + [ctypes.c_float] + [INTEGER] * 6
    return (found, None) if is_right(found) else (None, f"{compiler} built it wrong: its results differ from torch's")


def built(compiler: str) -> Path:
    """The library's file, made aside and renamed, named by all that it depends on."""
    parts = (SOURCE.read_bytes(), " ".join(FLAGS).encode(), compiler.encode(), processor().encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    target = cache_folder() / f"attention-{digest}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            made = Path(aside) / target.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            made.replace(target)
    return target


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kinkajou"


def processor() -> str:
    """What `-march=native` looks at: another machine of a shared home needs a library of its own."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        kept = ("model name", "flags", "Features", "CPU part")
        return "\n".join(sorted({line for line in info.read_text().splitlines() if line.startswith(kept)}))
    return f"{platform.machine()} {platform.processor()}"


@dataclass(frozen=True)
class Kernel:
    """The library's function for one type."""

    function: Callable[..., int]

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        *,
        scale: float,
        window: int | None,
        slopes: Tensor | None,
    ) -> Tensor:
        """Writes (n, g, 1, d) key and value into the first n of (rows, g, capacity, d), attends.  -> (n, h, 1, d)."""
        n, heads, _, d = query.shape
        _, g, capacity, _ = keys.shape
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        slopes = None if slopes is None else slopes.float().contiguous()
        out = query.new_empty(n, heads, 1, d)
        failed = self.function(
            *(query.data_ptr(), key.data_ptr(), value.data_ptr(), keys.data_ptr(), values.data_ptr()),
            positions.data_ptr(),
            None if slopes is None else slopes.data_ptr(),
            out.data_ptr(),
            *(n, g, heads // g, d, capacity, window or 0, scale),
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
        )
        if failed:
            raise MemoryError("decode attention found no memory for its scores")
        return out


def kernel(dtype: torch.dtype) -> Kernel | None:
    """The kernel of that type, None where there is none."""
    found, _ = library()
    return Kernel(getattr(found, NAMES[dtype])) if found is not None and dtype in NAMES else None


def is_right(found: ctypes.CDLL) -> bool:
    """A small step against torch, in both types: grouped heads, a window, alibi."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, g, 1, 20, generator=generator) for g in (4, 2, 2))
    keys, values = (torch.randn(3, 2, 9, 20, generator=generator) for _ in range(2))
    positions, slopes = torch.tensor([0, 4, 8]), torch.rand(4, generator=generator)
    at = torch.arange(9)
    distance = (at - positions[:, None])[:, None, None]
    hidden = (distance > 0) | (distance <= -3)
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        q, k, v, kept_k, kept_v = (x.to(dtype).clone() for x in (query, key, value, keys, values))
        attend = Kernel(getattr(found, NAMES[dtype]))
        got = attend(q, k, v, kept_k, kept_v, positions, scale=0.3, window=3, slopes=slopes)
        scores = q.float() @ kept_k.float().repeat_interleave(2, 1).transpose(2, 3) * 0.3
        scores = (scores + slopes[None, :, None, None] * distance).masked_fill(hidden, -torch.inf)
        want = scores.softmax(-1) @ kept_v.float().repeat_interleave(2, 1)
        if not torch.allclose(got.float(), want, atol=close, rtol=0):
            return False
    return True
