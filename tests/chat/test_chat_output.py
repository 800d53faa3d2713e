"""What becomes of answers: a reader that leaves, an encoding that lacks letters, a full disk, exit codes."""

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from chatting import Talk

from kinkajou.chat.screen import Screen
from kinkajou.cli import main
from kinkajou.output import Enduring

FLAGS = ("--max-new-tokens", "6")
HOT = ("--temperature", "9")


def started(folder: str, *flags: str, **options: Any) -> subprocess.Popen[bytes]:
    """`python -m kinkajou chat`, which wraps standard output before it knows which command it is."""
    command = [sys.executable, "-m", "kinkajou", "chat", folder, *FLAGS, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdin=subprocess.PIPE, **options)


def talked(job: subprocess.Popen[bytes], lines: Sequence[str] = ()) -> tuple[str, str]:
    out, err = job.communicate("".join(f"{line}\n" for line in lines).encode(), timeout=100)
    return (out or b"").decode(), err.decode()


def test_letters_that_the_output_lacks_and_nobody_who_reads(folder: str) -> None:
    """One process for each, at the same time."""
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "wb") as full:
        poor = started(folder, "--versus", folder, "--message", "w5 w8", stdout=subprocess.PIPE)
        left = started(folder, *HOT, stdout=write)
        lost = started(folder, stdout=full)
    os.close(write)
    out, err = talked(poor)
    assert r"\u2500\u2500 1: " in out
    assert "Traceback" not in err
    assert poor.returncode == 0
    _, err = talked(left, ["w5 w8"] * 6)
    assert "the work goes on" not in err
    assert " tokens · ".encode("ascii", "backslashreplace").decode() not in err  # not one was answered to its end
    assert left.returncode == 0
    _, err = talked(lost, ["w5 w8"] * 6)
    assert err.splitlines()[-2:] == [
        "error: standard output cannot be written",
        "  seen: [Errno 28] No space left on device",
    ]
    assert err.count("standard output") == 1
    assert lost.returncode == 4


def test_the_screen_writes_to_the_stream_itself(monkeypatch: Any) -> None:
    plain = sys.stdout
    monkeypatch.setattr("sys.stdout", Enduring(plain))
    assert Screen().out is plain


def test_a_script_can_tell_that_a_line_came_to_a_fault(talk: Talk, folder: str, capsys: Any, monkeypatch: Any) -> None:
    """Once all is read; what can be answered is."""
    seen = talk("/nonsense", "w5 w8", "/undo", "/undo")
    assert seen.out == "w6 w7\n"
    assert seen.code == 2
    assert seen.err.count("there is no command /nonsense") == 1
    assert talk("/nonsense", "/quit", "w5").code == 2
    assert talk("w5 w8", "/quit").code == 0
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["chat", folder]) == 0
    seen = talk("/nonsense", "/more")
    assert seen.last == "error: 2 lines of the input came to a fault, which is said above"
