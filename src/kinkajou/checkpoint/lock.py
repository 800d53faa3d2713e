"""One run to a folder: a lock with the name of its owner, and what is left of owners that are gone."""

import errno
import fcntl
import json
import os
import socket
import stat
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kinkajou.checkpoint.manifest import shown
from kinkajou.checkpoint.room import storage_fault
from kinkajou.data.strict_json import JSONFault, parse
from kinkajou.errors import UserError

NAME = ".lock"
BEAT, SILENCE = 10.0, 120.0
"""Seconds between signs of life, and those after which the owner on another machine counts as dead."""
PATIENCE = 0.3
"""Seconds in which a lock that is held may come free: its process is going, or somebody only looks who holds it."""
MAX_SILENCE = 86_400.0
NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
MAX_BYTES = 4096


@dataclass(frozen=True)
class Owner:
    pid: int
    host: str
    start: str
    silence: float = SILENCE
    """Seconds without a sign of life that this owner may take: steps can be longer than two minutes."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.start}"


class RunLock:
    """Held from the moment it is made; UserError where another run holds it.

    On one machine the kernel's lock decides, which goes with its process.  That lock need not reach other machines
    that share the folder: there the owner's signs of life decide.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.stale = ""
        """A sentence about an owner that went without releasing; empty where there was none."""
        self._silence, self._beaten = SILENCE, time.monotonic()
        self._handle: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle, locked = taken(self.path)
            self._take(locked)
        except OSError as fault:
            self._close()
            raise storage_fault("locked", self.path, fault) from fault
        except UserError:
            self._close()
            raise
        HELD.add(self)

    def beat(self) -> None:
        """A sign of life; called as often as one likes."""
        now = time.monotonic()
        if self._handle is None or (gap := now - self._beaten) < BEAT:
            return
        self._beaten = now
        with suppress(OSError):  # training goes on: a storage that is gone shows at the next checkpoint
            if 3 * gap > self._silence:
                self._silence = 3 * gap
                write(self._handle, owner_now(self._silence))
            os.utime(self._handle)

    def release(self) -> None:
        """Twice is once."""
        if self._handle is not None:
            with suppress(OSError):  # then the next run finds the name of an owner that is gone, and says so
                os.ftruncate(self._handle, 0)
            self._close()
        HELD.discard(self)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _take(self, locked: bool | None) -> None:
        assert self._handle is not None
        owner = read(self._handle)
        if locked is False:
            raise held(self.path, owner, "its lock is held")
        here = owner and owner.host == socket.gethostname()
        if owner and here and locked is None and alive(owner.pid):
            raise held(self.path, owner, "its process is alive")
        if owner and not here and (silent := silence(self.path, self._handle)) < owner.silence:
            waited = f"its last sign of life was {silent:.0f} s ago; after {owner.silence:.0f} s it counts as gone"
            raise held(self.path, owner, waited)
        if owner:
            self.stale = f"{self.path} was left by a run that is gone ({owner}); this run has taken it over"
        write(self._handle, owner_now(SILENCE))

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(OSError):  # where the lock was never to be had
                fcntl.flock(handle, fcntl.LOCK_UN)  # forked children may still have the file open
            os.close(handle)

    def _forget(self) -> None:
        """In a forked child: the lock is the parent's."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


HELD: set[RunLock] = set()


def forget_all() -> None:
    for lock in HELD:
        lock._forget()
    HELD.clear()


os.register_at_fork(after_in_child=forget_all)


def holder(folder: Path) -> tuple[Owner | None, bool]:
    """Who holds the lock, or held it last and went without releasing; and whether that run is there now."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # never locked, or not for this user to see
        return None, False
    try:
        owner, free = read(handle), try_lock(handle, fcntl.LOCK_SH)
        if free:
            fcntl.flock(handle, fcntl.LOCK_UN)
        away = owner is not None and owner.host != socket.gethostname()
        silent = time.time() - os.fstat(handle).st_mtime
        here = owner is not None and (silent < owner.silence if away else free is None and alive(owner.pid))
        return owner, free is False or here
    except OSError:  # it is no file
        return None, False
    finally:
        os.close(handle)


def try_lock(handle: int, how: int = fcntl.LOCK_EX) -> bool | None:
    """Whether it is ours now; None where this storage has no such locks."""
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as fault:
        if fault.errno not in NO_FLOCK:
            raise
        return None
    return True


def taken(path: Path) -> tuple[int, bool | None]:
    """The open file, and whether the kernel's lock on it is ours; None where this storage has no such locks."""
    patience = time.monotonic() + PATIENCE
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        kept = False
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "it is no plain file")
            locked = try_lock(handle)
            with suppress(FileNotFoundError):  # another process has deleted the file between the two calls
                final = locked is not False or time.monotonic() > patience
                kept = final and os.path.samestat(os.fstat(handle), os.stat(path))
            if kept:
                return handle, locked
        finally:
            if not kept:
                os.close(handle)
        time.sleep(PATIENCE / 10)


def silence(path: Path, handle: int) -> float:
    """Seconds since the last sign of life, by the storage's clock: those of machines differ."""
    probe = path.with_name(f"{path.name}-{os.getpid()}")
    made = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        return max(0.0, os.fstat(made).st_mtime - os.fstat(handle).st_mtime)
    finally:
        os.close(made)
        probe.unlink(missing_ok=True)


def owner_now(silence: float) -> Owner:
    return Owner(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"), silence)


def write(handle: int, owner: Owner) -> None:
    text = json.dumps(asdict(owner)).encode()
    os.ftruncate(handle, 0)
    os.pwrite(handle, text, 0)


def read(handle: int) -> Owner | None:
    """None for an empty file, and for what is no owner: it cannot be told from a write that was cut off."""
    try:
        value: Any = parse(os.pread(handle, MAX_BYTES, 0).decode("utf-8"))
        silence = min(float(value["silence"]), MAX_SILENCE)
        owner = Owner(int(value["pid"]), shown(str(value["host"])), shown(str(value["start"])), silence)
    except (UnicodeDecodeError, JSONFault, TypeError, KeyError, ValueError):
        return None
    return owner


def alive(pid: int) -> bool:
    return pid > 0 and Path(f"/proc/{pid}").exists()


def held(path: Path, owner: Owner | None, evidence: str) -> UserError:
    who = str(owner) if owner else "its owner is being written"
    return UserError(
        f"another run is in {path.parent}: {who}",
        evidence=evidence,
        fix="wait for it, end it, or name another --output",
    )
