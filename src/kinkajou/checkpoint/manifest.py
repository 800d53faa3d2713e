"""A checkpoint's manifest: every other file with its bytes and sha256.  Without one a checkpoint is not whole.

Only files that were found by walking the folder are opened, so no path of a manifest leads anywhere.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from kinkajou import faults
from kinkajou.checkpoint.room import storage_fault
from kinkajou.data.strict_json import JSONFault, parse

NAME, FORMAT = "manifest.json", 1
MAX_BYTES, MAX_FILES, MAX_DEPTH = 16 << 20, 50_000, 16
BLOCK = 1 << 20
Digests = Mapping[str, tuple[int, str]]
"""Bytes and sha256 by path; a path is relative to the checkpoint, with slashes."""


@dataclass
class Found:
    """What lies in a folder.  `faults` are sentences about what must not."""

    files: dict[str, int] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


def seal(folder: Path, known: Digests | None = None) -> None:
    """Writes the manifest over all files and brings everything to the disk.

    `known`: of files whose digest has been taken while they were written.
    """
    try:
        write_manifest(folder, known or {})
    except OSError as fault:
        raise storage_fault("written", folder, fault) from fault


def write_manifest(folder: Path, known: Digests) -> None:
    """`seal` with the faults of the storage as they come."""
    faults.reached("save.files")
    (folder / NAME).unlink(missing_ok=True)
    found = walk(folder)
    if found.faults:
        raise OSError(errno.EINVAL, found.faults[0])
    if len(found.files) > MAX_FILES:
        raise OSError(errno.EFBIG, f"{len(found.files):,} files; a checkpoint has at most {MAX_FILES:,}")
    files: dict[str, tuple[int, str]] = {}
    seen: dict[int, tuple[int, str]] = {}  # a file with two names (a critic on its policy's trunk) is read once
    for name, size in found.files.items():
        inode = (folder / name).stat().st_ino
        files[name] = seen[inode] = synced(folder / name, size, known.get(name, seen.get(inode)))
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.write(text_of(files))
        file.flush()
        faults.reached("save.manifest")
        os.fsync(file.fileno())
    for inner in sorted(found.folders, reverse=True):
        sync_folder(folder / inner)
    sync_folder(folder)
    faults.reached("save.synced")


def damages(folder: Path, *, content: bool = True) -> list[str]:
    """What is wrong with a checkpoint, a sentence each; nothing where it is whole.

    Without `content` names and lengths alone are compared, which takes no time.
    """
    try:
        listed, told = read_manifest(folder)
        if told:
            return told
        found = walk(folder, limit=len(listed) + 1)
        told = [*found.faults, *differing(listed, found)]
        if content:
            told += [f"{shown(name)} has another sha256" for name in listed if changed(folder, name, listed, found)]
    except OSError as fault:
        return [f"{fault.filename or folder} could not be read: {fault.strerror or fault}"]
    return told


def read_manifest(folder: Path) -> tuple[dict[str, tuple[int, str]], list[str]]:
    """The files that it lists, or what is wrong with it."""
    if folder.is_symlink():
        return {}, [f"{folder} is a symbolic link"]
    if not folder.is_dir():
        return {}, [f"{folder} is no folder"]
    path = folder / NAME
    if not os.path.lexists(path):
        return {}, [f"{NAME} is missing"]
    if not stat.S_ISREG(path.lstat().st_mode):
        return {}, [f"{NAME} is no plain file"]
    with opened(path) as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        return {}, [f"{NAME} is longer than {MAX_BYTES:,} bytes"]
    try:
        words = text.decode("utf-8")
        files = entries(parse(words))
    except UnicodeDecodeError:
        return {}, [f"{NAME} is not UTF-8"]
    except JSONFault as fault:
        return {}, [f"{NAME} cannot be read: {fault.problem}"]
    # Written by one function, so that any other text, were it of the same meaning, has been edited.
    return (files, []) if words == text_of(files) else ({}, [f"{NAME} has been changed since it was written"])


def entries(value: Any) -> dict[str, tuple[int, str]]:
    """JSONFault for what is not a manifest's value."""
    if not isinstance(value, dict) or set(value) != {"format", "files", "sha256"}:
        raise JSONFault("it is not the object of a manifest", 0)
    if value["format"] != FORMAT:
        raise JSONFault(f"its format is {value['format']!r:.20}, not {FORMAT}", 0)
    files = value["files"]
    if not isinstance(files, dict) or len(files) > MAX_FILES:
        raise JSONFault(f"its files are no object of at most {MAX_FILES:,}", 0)
    for name, entry in files.items():
        if not is_inside(name):
            raise JSONFault(f"{shown(name)} is no place in a checkpoint", 0)
        whole = isinstance(entry, dict) and set(entry) == {"bytes", "sha256"}
        if not whole or type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise JSONFault(f"the entry of {shown(name)} is not bytes and sha256", 0)
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    plain = "/".join(parts) == name and ".." not in parts and "." not in parts
    return plain and bool(parts) and not name.startswith("/") and name != NAME and "\0" not in name


def text_of(files: Digests) -> str:
    table = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    own = hashlib.sha256(json.dumps(table).encode()).hexdigest()
    return json.dumps({"format": FORMAT, "files": table, "sha256": own}, indent=1) + "\n"


def walk(folder: Path, *, limit: int = MAX_FILES) -> Found:
    """All plain files below a folder but its manifest, with their bytes.  No link is followed."""
    found = Found()
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        with os.scandir(folder / inner) as entries_here:
            for entry in entries_here:
                name = f"{inner}/{entry.name}" if inner else entry.name
                if entry.is_symlink():
                    found.faults.append(f"{shown(name)} is a symbolic link")
                elif entry.is_dir(follow_symlinks=False):
                    found.folders.add(name)
                    if name.count("/") < MAX_DEPTH:
                        waiting.append(name)
                    else:
                        found.faults.append(f"{shown(name)} lies deeper than {MAX_DEPTH} folders")
                elif not entry.is_file(follow_symlinks=False):
                    found.faults.append(f"{shown(name)} is no plain file")
                elif name != NAME:
                    found.files[name] = entry.stat(follow_symlinks=False).st_size
                if len(found.files) + len(found.folders) + len(found.faults) > 2 * limit + MAX_DEPTH:
                    return Found(found.files, found.folders, [*found.faults, "there are more files than were written"])
    found.faults.sort()
    return found


def differing(listed: Digests, found: Found) -> list[str]:
    """Missing, of another length, extra: in that order."""
    told = [f"{shown(name)} is missing" for name in listed if name not in found.files]
    told += [
        f"{shown(name)} has {found.files[name]:,} bytes instead of {size:,}"
        for name, (size, _) in listed.items()
        if name in found.files and found.files[name] != size
    ]
    told += [f"{shown(name)} is not in {NAME}" for name in sorted(found.files) if name not in listed]
    needed = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    told += [f"the folder {shown(name)} is not in {NAME}" for name in sorted(found.folders - needed)]
    return told


def changed(folder: Path, name: str, listed: Digests, found: Found) -> bool:
    """Whether a file of the right length has other content."""
    size, digest = listed[name]
    return found.files.get(name) == size and digest_of(folder / name) != digest


def digest_of(path: Path, *, sync: bool = False) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with opened(path) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def synced(path: Path, size: int, known: tuple[int, str] | None) -> tuple[int, str]:
    """Brings a file to the disk; its bytes and sha256."""
    if known is None:
        return size, digest_of(path, sync=True)
    if known[0] != size:
        raise OSError(errno.EIO, f"{path.name} has {size:,} bytes, {known[0]:,} were written")
    with opened(path) as file:
        os.fsync(file.fileno())
    return known


def opened(path: Path) -> Any:
    """For reading; a link in its last part is a fault."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # a file system without it has no need of it
            raise
    finally:
        os.close(handle)


def shown(name: str) -> str:
    """A file's name as it can be printed."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name)[:200]
