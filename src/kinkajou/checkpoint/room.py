"""Whether a folder takes what is to be written, and what is said when it does not."""

import os
import resource
from pathlib import Path

from kinkajou.errors import UserError

STORAGE = 4
"""Exit code of a storage that does not take or give back what it should."""
FEWER = "keep fewer checkpoints (--keep_last), "


def free_bytes(folder: Path) -> int | None:
    """What this user may still write there; None where the file system does not say."""
    try:
        found = os.statvfs(existing(folder))
    except OSError:  # then the fault that is being told of matters more
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), Path("/"))


def storage_fault(what: str, path: Path, fault: Exception, *, kept: str = "checkpoints before this one") -> UserError:
    """`what` is a past participle: written, read, deleted; `kept` is what the fault left alone."""
    free = free_bytes(path)
    cause = getattr(fault, "strerror", None) or str(fault)
    room = "" if free is None else f"; {free:,} bytes free"
    return UserError(
        f"{path} could not be {what}",
        evidence=f"{cause}{room}",
        fix=f"make room or mend the permissions, or name another --output; {kept} are untouched",
        exit_code=STORAGE,
    )


def check_room(
    folder: Path, needed: int, *, largest: int = 0, what: str = "a checkpoint", instead: str = FEWER
) -> None:
    """UserError where `needed` bytes do not fit, or one file of `largest` bytes is not allowed."""
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise UserError(
            f"{what} does not fit into {folder}",
            evidence=f"it needs {needed:,} bytes, {free:,} are free",
            fix=f"make room, {instead}or name another --output",
            exit_code=STORAGE,
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and largest > limit:
        raise UserError(
            f"a file of {what} in {folder} would be longer than this process may write",
            evidence=f"it needs {largest:,} bytes, the limit is {limit:,} (ulimit -f)",
            fix="raise the limit",
            exit_code=STORAGE,
        )


def probe(folder: Path) -> None:
    """Makes the folder and writes a file into it; UserError where one of them fails."""
    path = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            path.unlink(missing_ok=True)
    except OSError as fault:
        raise storage_fault("written", folder, fault) from fault
