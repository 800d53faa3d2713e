"""One run to a folder."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from boxes import in_child

from kinkajou.checkpoint import lock
from kinkajou.checkpoint.lock import RunLock
from kinkajou.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from kinkajou.checkpoint.lock import RunLock
held = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def refused(folder: Path) -> UserError:
    with pytest.raises(UserError) as told:
        RunLock(folder)
    assert told.value.exit_code == 2
    return told.value


def other_owner(folder: Path, *, silent: float, **changes: object) -> None:
    """A lock file as another machine would have left it that many seconds ago."""
    owner = {"pid": 77, "host": "elsewhere", "start": "2026-01-01 00:00:00", "silence": 120.0, **changes}
    (folder / ".lock").write_text(json.dumps(owner))
    os.utime(folder / ".lock", (time.time() - silent,) * 2)


def test_a_second_run_is_told_who_holds_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        start = time.monotonic()
        told = refused(run)
        assert time.monotonic() - start < 2
        assert f"process {holder.pid} on {socket.gethostname()}" in told.problem
        assert str(run) in told.problem
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with RunLock(run) as mine:
        assert f"process {holder.pid} on" in mine.stale
        assert "gone" in mine.stale


def test_it_comes_back_after_release(tmp_path: Path) -> None:
    with RunLock(tmp_path) as first:
        assert first.stale == ""
        told = refused(tmp_path)
        assert f"process {os.getpid()} on" in told.problem
    second = RunLock(tmp_path)
    assert second.stale == ""
    second.release()
    second.release()
    assert (tmp_path / ".lock").read_bytes() == b""


def test_the_file_names_its_owner(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        owner = json.loads((tmp_path / ".lock").read_text())
    assert set(owner) == {"pid", "host", "start", "silence"}
    assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())


def test_a_child_does_not_keep_the_lock_of_a_dead_run(tmp_path: Path) -> None:
    """A worker that was forked outlives its run for a moment; the next run need not wait for it."""
    (there, come), (known, told) = os.pipe(), os.pipe()

    def hold_and_leave_a_child() -> None:
        RunLock(tmp_path)
        if (child := os.fork()) == 0:
            os.write(come, b".")
            time.sleep(30)
            os._exit(0)
        os.read(there, 1)
        os.write(told, b"%d" % child)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(hold_and_leave_a_child) == -signal.SIGKILL
    orphan = int(os.read(known, 20))
    try:
        RunLock(tmp_path).release()
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_another_machine_that_has_just_been_heard(tmp_path: Path) -> None:
    other_owner(tmp_path, silent=30)
    told = refused(tmp_path)
    assert "process 77 on elsewhere" in told.problem
    assert "30 s ago" in told.evidence
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(("silent", "allowed", "taken"), [(121, 120, True), (121, 400, False), (401, 400, True)])
def test_another_machine_that_has_long_been_silent(tmp_path: Path, silent: float, allowed: float, taken: bool) -> None:
    other_owner(tmp_path, silent=silent, silence=allowed)
    if not taken:
        refused(tmp_path)
        return
    with RunLock(tmp_path) as mine:
        assert "process 77 on elsewhere" in mine.stale


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"pid": "x"}', b"9" * 5000, b"null"])
def test_what_names_no_owner(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    with RunLock(tmp_path) as mine:
        assert mine.stale == ""


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(lock.time, "monotonic", lambda: now)
    path = tmp_path / ".lock"
    with RunLock(tmp_path) as mine:
        for gap, beats in ((9.0, False), (1.5, True), (9.0, False), (1.0, True)):
            os.utime(path, (1, 1))
            now += gap
            mine.beat()
            assert (path.stat().st_mtime > 1) == beats
        assert json.loads(path.read_text())["silence"] == 120
        now += 100  # steps take long: then three of them are waited for
        mine.beat()
        assert json.loads(path.read_text())["silence"] == 300
    mine.beat()
    assert path.read_bytes() == b""


def test_storage_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunLock(tmp_path):
        assert "alive" in refused(tmp_path).evidence
    other_owner(tmp_path, silent=0, host=socket.gethostname(), pid=2**22 + 1)
    with RunLock(tmp_path) as mine:
        assert "gone" in mine.stale


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "file above"])
def test_a_lock_that_cannot_be_made(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    if kind == "file above":
        run.write_text("")
    else:
        run.mkdir()
        path = run / ".lock"
        make = {"link": lambda: path.symlink_to("/etc/passwd"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}
        make[kind]()
    with pytest.raises(UserError, match="could not be locked") as told:
        RunLock(run)
    assert told.value.exit_code == 4
