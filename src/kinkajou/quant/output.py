"""Where a model is written to: what may be replaced, and that it appears whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kinkajou.checkpoint.manifest import sync_folder
from kinkajou.checkpoint.room import storage_fault
from kinkajou.checkpoint.shelf import delete
from kinkajou.errors import UserError
from kinkajou.models.adapters import adapter_base

FOLDER, FILE = "a model's folder", "a .gguf file"


def check_output(output: Path, source: str, *, overwrite: bool, kind: str = FOLDER) -> None:
    """UserError where something is that must not be replaced; the source, and an adapter's base, must not."""
    if os.path.lexists(output) and not overwrite:
        raise UserError(f"{output} is there already", fix="name another --output, or --overwrite")
    target = output.resolve()
    for read in (source, adapter_base(source) or source):
        if Path(read).is_dir() and Path(read).resolve().is_relative_to(target):
            raise UserError("the output would replace the model that is read", evidence=f"{output}: {read}")
    if not os.path.lexists(output):
        return
    model = output.is_dir() and ((output / "config.json").is_file() or not any(output.iterdir()))
    fits = model if kind == FOLDER else output.is_file() and output.suffix == ".gguf"
    if not fits or output.is_symlink():
        raise UserError(f"{output} is there and is not {kind}, so it is not replaced", fix="name another --output")


@contextmanager
def whole(output: Path) -> Iterator[Path]:
    """A path beside `output` to write to; it gets the name when the block ends well, and is deleted otherwise."""
    output = output.absolute()
    aside, old = (output.with_name(f".{output.name}.{end}") for end in ("tmp", "old"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        delete(aside)
        yield aside
        for path in (aside, *aside.rglob("*")):
            sync(path)
        if os.path.lexists(output):
            delete(old)
            output.rename(old)
        aside.rename(output)
        sync_folder(output.parent)
        delete(old)
    except OSError as fault:
        raise storage_fault("written", output, fault) from fault
    finally:
        delete(aside)
        if os.path.lexists(old) and not os.path.lexists(output):
            old.rename(output)


def sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
    else:
        with path.open("rb") as file:
            os.fsync(file.fileno())
