"""Reads one `.pt` or `.bin` file of the old system into safetensors: a process of its own, sealed off, tensors only.

`python -I coati_pickle.py FILE FOLDER` writes `FOLDER/part-00000.safetensors` and so on; exit code 2 and a sentence
on stderr where the file is refused.  Nothing but torch's own reader of tensors ever looks at the pickle.
"""

import ctypes
import pickle  # for the name of the exception alone
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

FLOOR = (2, 10)
"""Below it `weights_only` could be got round (CVE-2025-32434, CVE-2026-24747)."""
PART, ENTRIES, PICKLE = 2 << 30, 100_000, 256 << 20
"""Most bytes of tensors written at once, entries of the archive, bytes of the pickle in it."""
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
FORBIDDEN = ("socket.", "subprocess.", "os.", "pty.", "ctypes.", "shutil.", "webbrowser.", "http.", "urllib.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")


def refuse(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def leave_network() -> None:
    """Into a network of its own with nothing in it, where the kernel lets a user do so; `seal_off` comes on top."""
    ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)


def seal_off() -> None:
    """No socket, process or written file from Python, whatever the kernel allowed."""

    def guard(event: str, given: tuple[object, ...]) -> None:
        written = event == "open" and isinstance(given[1], str) and not set(given[1]).isdisjoint("wax+")
        if written or (event.startswith(FORBIDDEN) and event not in HARMLESS):
            refuse(f"the file made its reader try {event}: refused")

    sys.addaudithook(guard)


def check_archive(file: Path) -> None:
    """What torch.save writes since 1.6: a zip of stored entries, the pickle small, the tensors beside it."""
    if not zipfile.is_zipfile(file):
        refuse("it is no archive of torch.save (a zip): cut short, or written before torch 1.6")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if len(entries) > ENTRIES:
        refuse(f"it has {len(entries)} entries, more than {ENTRIES}")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            refuse(f"its entry {entry.filename!r} is compressed, which torch.save never does")
        if entry.filename.endswith("data.pkl") and entry.file_size > PICKLE:
            refuse(f"its pickle has {entry.file_size} bytes, more than {PICKLE}")


def read(file: Path) -> object:
    import torch

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < FLOOR:
        refuse(
            f"torch {torch.__version__} cannot read such files safely: {'.'.join(map(str, FLOOR))} or newer is needed"
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, LookupError, ValueError, EOFError, TypeError) as fault:
        # Whatever the reader does not like ends here: there is no second, laxer try.
        named = re.search(r"GLOBAL [\w.]+", str(fault))
        refuse(f"it is not made of tensors alone ({named[0] if named else str(fault).strip().splitlines()[0][:200]})")


def checked(found: object, limit: int) -> dict[str, object]:
    """The tensors by name; anything else is refused."""
    import torch

    if not isinstance(found, Mapping) or not found:
        refuse(f"it holds {type(found).__name__}, not weights by name")
    if {"param_groups", "state"} <= set(found):
        refuse("it holds an optimiser's state, not weights")
    total = 0
    for name, x in found.items():
        if not isinstance(name, str) or len(name) > 500:
            refuse("a weight's name is no short text")
        if type(x) is not torch.Tensor or x.layout is not torch.strided or x.is_complex() or x.is_quantized:
            refuse(f"{name!r} is {type(x).__name__}, not a plain tensor")
        total += x.numel() * x.element_size()
        if x.numel() * x.element_size() > x.untyped_storage().nbytes() or total > limit:
            refuse(f"{name!r} claims more bytes than the file has")
    return dict(found)


def tensors_of(file: Path) -> dict[str, object]:
    check_archive(file)
    return checked(read(file), limit=4 * file.stat().st_size)


def parts(tensors: Mapping[str, object]) -> Iterator[dict[str, object]]:
    part: dict[str, object] = {}
    size = 0
    for name, x in tensors.items():
        part[name] = x.clone().contiguous()  # tied weights share memory, which safetensors does not write
        size += x.numel() * x.element_size()
        if size >= PART:
            yield part
            part, size = {}, 0
    if part:
        yield part


def main() -> None:
    leave_network()  # while there is one thread: the kernel asks for that
    from safetensors.torch import save_file

    file, folder = Path(sys.argv[1]), Path(sys.argv[2])
    seal_off()
    for number, part in enumerate(parts(tensors_of(file))):
        save_file(part, folder / f"part-{number:05d}.safetensors")


if __name__ == "__main__":
    main()
