"""Tensors in safetensors files, whole or as the parts that processes hold, in the layout of PyTorch's distributed
checkpoints (HuggingFaceStorageReader): where a part begins stands in its file's metadata.

Parts are read here and not by PyTorch: its reader takes a whole folder for one state, does not notice a part that is
missing, and says what is wrong without the name of the file.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from kinkajou.errors import UserError

PLACES, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Where PyTorch looks for the offsets of parts."""
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Offsets = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that lies in a file."""

    file: Any
    path: Path
    offsets: Offsets
    shape: tuple[int, ...]
    dtype: str

    def read(self, where: tuple[slice, ...], name: str) -> Tensor:
        if not self.shape:
            whole: Tensor = self.file.get_tensor(name)
            return whole
        part: Tensor = self.file.get_slice(name)[where]
        return part


def held(x: Tensor) -> tuple[Tensor, Offsets]:
    """What this process holds of a tensor, and where that begins in the whole."""
    if not isinstance(x, DTensor):
        return x, (0,) * x.dim()
    with torch.no_grad():
        local = x.to_local()
    [chunk] = x.__create_chunk_list__()  # type: ignore[no-untyped-call]
    assert chunk.sizes == local.shape
    return local, tuple(chunk.offsets)


def copied(x: Tensor) -> Tensor:
    """On the host, in memory of its own."""
    return x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def writer(parts: Mapping[str, tuple[Tensor, Offsets]], suffix: str) -> Callable[[Path], None]:
    """Copies parts now; what is returned writes them later to `PATH` + suffix."""
    tensors = {name: copied(x) for name, (x, _) in parts.items()}
    places = {name: {OFFSETS: list(offsets)} for name, (_, offsets) in parts.items()}

    def write(path: Path) -> None:
        # One key: safetensors writes several in an order of chance, and equal states must be equal files.
        save_file(tensors, path.with_name(path.name + suffix), {PLACES: json.dumps(places)})

    return write


def fill(tensors: Mapping[str, Tensor], paths: Sequence[Path]) -> None:
    """Fills tensors in place with what files hold of them; each process reads its own part, one tensor at a time."""
    with ExitStack() as stack:
        found = pieces(stack, paths)
        for name, x in tensors.items():
            check(name, x, found.get(name, []), paths)
            fill_one(name, x, found[name])


def pieces(stack: ExitStack, paths: Sequence[Path]) -> dict[str, list[Piece]]:
    """What lies in the files by name, while the stack is open."""
    found: dict[str, list[Piece]] = {}
    for path in paths:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            places = json.loads((file.metadata() or {}).get(PLACES, "{}"))
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                shape = tuple(part.get_shape())
                offsets = tuple(places[name][OFFSETS]) if name in places else (0,) * len(shape)
                found.setdefault(name, []).append(Piece(file, path, offsets, shape, part.get_dtype()))
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as fault:
            raise damaged(f"{path} cannot be read", str(fault)) from None
    return found


def check(name: str, x: Tensor, there: Sequence[Piece], paths: Sequence[Path]) -> None:
    files = ", ".join(sorted({str(piece.path) for piece in there} or map(str, paths))) or "no file"
    if not there:
        raise damaged(f"the checkpoint has no tensor {name!r}", f"looked in {files}")
    shape = tuple(x.shape)
    if any(len(piece.offsets) != len(shape) or len(piece.shape) != len(shape) for piece in there):
        raise damaged(f"{name!r} has another shape in the checkpoint", f"{list(shape)} is wanted; {files}")
    ends = [[a + b for a, b in zip(piece.offsets, piece.shape, strict=True)] for piece in there]
    size = tuple(map(max, zip(*ends, strict=True)))
    if size != shape:
        raise damaged(
            f"{name!r} has another shape in the checkpoint", f"{list(size)}, and {list(shape)} is wanted; {files}"
        )
    if other := [piece.dtype for piece in there if TYPES.get(piece.dtype) != x.dtype]:
        raise damaged(f"{name!r} has another type in the checkpoint", f"{other[0]}, and {x.dtype} is wanted; {files}")


@torch.no_grad()
def fill_one(name: str, x: Tensor, there: Sequence[Piece]) -> None:
    local, offsets = held(x.detach())
    missing = local.numel()
    for piece in there:
        box = common(offsets, tuple(local.shape), piece)
        if box is None:
            continue
        inner, outer = box
        part = piece.read(outer, name)
        local[inner].copy_(part)
        missing -= part.numel()
    if missing:
        files = ", ".join(sorted({str(piece.path) for piece in there}))
        raise damaged(
            f"parts of {name!r} are {'missing' if missing > 0 else 'there twice'}", f"{abs(missing)} numbers; {files}"
        )


def common(
    offsets: Offsets, shape: tuple[int, ...], piece: Piece
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What a box of the whole and a piece have in common, as slices of the one and of the other."""
    inner, outer = [], []
    for mine, size, its, length in zip(offsets, shape, piece.offsets, piece.shape, strict=True):
        begin, end = max(mine, its), min(mine + size, its + length)
        if begin >= end:
            return None
        inner.append(slice(begin - mine, end - mine))
        outer.append(slice(begin - its, end - its))
    return tuple(inner), tuple(outer)


def damaged(problem: str, evidence: str) -> UserError:
    return UserError(
        problem,
        evidence=evidence,
        fix="kinkajou verify FOLDER says which checkpoints are whole; --from_step takes an earlier one",
        exit_code=4,
    )
