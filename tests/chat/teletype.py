"""A program at a terminal: what is typed, and what the terminal then shows."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from kinkajou.cli import main

PATIENCE = 60.0


class Teletype:
    """The other end of a pseudo-terminal on which a child process runs."""

    def __init__(self, process: int, file: int) -> None:
        self.process, self.file = process, file
        self.seen, self.at = b"", 0

    def expect(self, pattern: str) -> str:
        """Waits for it among what has come since the last time; returns that up to its end."""
        wanted = re.compile(pattern.encode(), re.DOTALL)
        end = time.monotonic() + PATIENCE
        while not (found := wanted.search(self.seen, self.at)):
            if time.monotonic() > end or not self.read():
                raise AssertionError(f"no {pattern!r} in {self.seen[self.at :].decode(errors='replace')!r}")
        said = self.seen[self.at : found.end()].decode(errors="replace")
        self.at = found.end()
        return said

    def read(self) -> bool:
        """False at the end."""
        if not select.select([self.file], [], [], PATIENCE)[0]:
            return False
        try:
            came = os.read(self.file, 65536)
        except OSError:  # so a terminal ends when its last process has left
            return False
        self.seen += came
        return bool(came)

    def type(self, keys: str) -> None:
        os.write(self.file, keys.encode())

    def interrupt(self) -> None:
        """Ctrl-C until it is heard.

        CPython's readline misses a signal that comes between its look for one and its wait for a key.
        """
        end, before = time.monotonic() + PATIENCE, len(self.seen)
        while len(self.seen) - before <= len("^C"):  # its echo is no answer
            if time.monotonic() > end:
                raise AssertionError("ctrl-C is not heard")
            self.type("\x03")
            while select.select([self.file], [], [], 1.0)[0] and self.read():
                pass

    def code(self) -> int:
        """Waits for the child's end."""
        while self.read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def shown(self) -> str:
        return screen(self.seen.decode())


@contextmanager
def teletype(
    arguments: Sequence[str], *, columns: int = 100, lines: int = 24, before: Callable[[], None] = lambda: None
) -> Iterator[Teletype]:
    """`kinkajou ARGUMENTS` in a fork of this process, after `before()`."""
    process, file = pty.fork()
    if process == 0:
        child(arguments, before, struct.pack("HHHH", lines, columns, 0, 0))
    terminal = Teletype(process, file)
    try:
        yield terminal
    finally:
        with suppress(ChildProcessError, ProcessLookupError):  # it has ended by itself
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        os.close(file)


def child(arguments: Sequence[str], before: Callable[[], None], size: bytes) -> None:
    code = 1
    try:
        # The size is set before anything is drawn, and unheard: readline would draw its prompt a second time.
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSWINSZ, size)
        os.environ["TERM"] = "xterm-256color"
        os.environ.pop("NO_COLOR", None)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        before()
        code = main(arguments)
        sys.stdout.flush()
    finally:
        os._exit(code)


def screen(text: str) -> str:
    """What is left on an endless screen; knows the few sequences that are sent on purpose."""
    rows = [""]
    y = x = 0
    for found in re.finditer(r"\x1b\[([?\d;]*)([A-Za-z])|.", text, re.DOTALL):
        code, letter = found[2], found[0]
        if code == "F":
            y, x = y - int(found[1]), 0
        elif code in ("J", "K"):
            rows[y] = rows[y][:x]
            del rows[y + 1 if code == "J" else len(rows) :]
        elif code is not None:
            assert code in "mhl", f"unknown sequence {found[0]!r}"
        elif letter == "\r":
            x = 0
        elif letter == "\n":
            y += 1
            rows += [""] * (y + 1 - len(rows))
        elif letter == "\b":
            x -= 1
        else:
            assert letter != "\x1b", "an escape of nobody's"
            rows[y] = rows[y].ljust(x)[:x] + letter + rows[y][x + 1 :]
            x += 1
    return "\n".join(row.rstrip() for row in rows)
