"""Where a model is written to: what may be replaced, and that it appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from kinkajou.checkpoint.lock import try_lock
from kinkajou.checkpoint.manifest import sync_folder
from kinkajou.checkpoint.room import check_room, storage_fault
from kinkajou.checkpoint.shelf import delete
from kinkajou.errors import UserError
from kinkajou.models.adapters import adapter_base

FOLDER, FILE = "a model's folder", "a .gguf file"
TEMPLATES = "additional_chat_templates"
PARTS = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "gate.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)
"""Files of a model: what lies beside them is somebody's own."""
LOCK = "lock"


def check_output(
    output: Path, source: str, *, overwrite: bool, kind: str = FOLDER, read: Sequence[str | Path] = ()
) -> None:
    """UserError where something is that must not be replaced: no model of theirs, or one of what is `read`."""
    if os.path.lexists(output) and not overwrite:
        raise there(output)
    target = output.resolve()
    for place in (source, *read):
        if any(covers(target, Path(x)) for x in (place, adapter_base(str(place))) if x):
            what = "the model that is read" if place is source else "what is read"
            raise UserError(f"the output would replace {what}", evidence=f"{output}: {place}")
    if not os.path.lexists(output):
        return
    model = output.is_dir() and ((output / "config.json").is_file() or not any(output.iterdir()))
    fits = model if kind == FOLDER else output.is_file() and output.suffix == ".gguf"
    if not fits or output.is_symlink():
        raise UserError(f"{output} is there and is not {kind}, so it is not replaced", fix="name another --output")
    if kind == FOLDER and (own := strange(output)):
        more = f" and {len(own) - 3:,} more" if len(own) > 3 else ""
        raise UserError(
            f"{output} holds what is not a model's, so it is not replaced",
            evidence=", ".join(own[:3]) + more,
            fix="move that elsewhere, or name another --output",
        )


def there(output: Path) -> UserError:
    return UserError(f"{output} is there already", fix="name another --output, or --overwrite")


def covers(target: Path, path: Path) -> bool:
    """Whether the file, or the link that leads to it, is the target or in it."""
    places = path.resolve(), path.parent.resolve() / path.name
    return os.path.lexists(path) and any(place.is_relative_to(target) for place in places)


def strange(folder: Path) -> list[str]:
    """Names in a model's folder that no model has."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name == TEMPLATES and path.is_dir() and not path.is_symlink():
            found += [f"{TEMPLATES}/{inner.name}" for inner in path.iterdir() if inner.suffix != ".jinja"]
        elif path.is_dir() or not any(fnmatch(path.name, part) for part in PARTS):
            found.append(path.name)
    return found


def check_fits(output: Path, needed: int, *, largest: int = 0) -> None:
    """UserError where a model of that many bytes, one file of it of `largest`, cannot be written."""
    check_room(output.absolute().parent, needed, largest=largest, what="the model", instead="")


@contextmanager
def whole(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A path beside `output` to write to; it gets the name when the block ends well, and is deleted otherwise."""
    output = output.absolute()
    old = output.with_name(f".{output.name}.old")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with alone(output.with_name(f".{output.name}.tmp")) as folder:
            try:
                yield folder / "new"
                for path in (folder / "new", *(folder / "new").rglob("*")):
                    sync(path)
                put(folder / "new", output, old, overwrite=overwrite)
            finally:
                if os.path.lexists(old) and not os.path.lexists(output):
                    old.rename(output)
    except (OSError, SafetensorError) as fault:
        raise storage_fault("written", output, fault, kept="other files") from fault


def put(new: Path, output: Path, old: Path, *, overwrite: bool) -> None:
    if os.path.lexists(output):
        if not overwrite:  # it came while this was written
            raise there(output)
        delete(old)
        output.rename(old)
    new.rename(output)
    sync_folder(output.parent)
    try:
        delete(old)
    except OSError as fault:  # what was asked for is done
        print(f"note: {old}, which {output} replaces, could not be deleted: {fault.strerror or fault}")


@contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """The folder, this process's own and empty of what a killed one left; it is deleted at the end."""
    handle = taken(folder)
    try:
        for path in folder.iterdir():
            if path.name != LOCK:
                delete(path)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # whoever writes to this place next deletes the rest
        os.close(handle)


def taken(folder: Path) -> int:
    """The folder's lock, open and ours as long as it is."""
    while True:
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        folder.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # its last owner has just deleted it
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            kept = False
            try:
                if try_lock(handle) is False:
                    raise UserError(
                        "another process writes to this --output", evidence=str(folder), fix="name another --output"
                    )
                kept = os.path.samestat(os.fstat(handle), os.stat(folder / LOCK))
                if kept:
                    return handle
            finally:
                if not kept:
                    os.close(handle)


def sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
    else:
        with path.open("rb") as file:
            os.fsync(file.fileno())
