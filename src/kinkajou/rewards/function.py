"""A reward that is a Python function of the user, in a process of its own so that a hang can be ended."""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any, cast

from kinkajou.errors import UserError
from kinkajou.rewards import wire
from kinkajou.rewards.answer import Answer, sample_of

IMPORT_S = 60.0
"""The least time that importing the module may take, however short the timeout of a call."""


class Function:
    """`module:function`, called as TRL calls its reward functions (docs/rewards.md)."""

    def __init__(self, name: str, *, timeout_s: float) -> None:
        self.name, self.timeout_s = name, timeout_s
        self.start()

    def start(self) -> None:
        """The child imports the module; it ends with this object, and with this process however that ends."""
        # -P: a file beside the user's module must not stand in for one of the standard library before we are up.
        command = [sys.executable, "-P", "-m", "kinkajou.rewards.worker", self.name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=-1
        )
        self.stop = weakref.finalize(self, end, self.process)
        reply = self.exchange(None, max(IMPORT_S, self.timeout_s), "", "while its module was imported")
        if reply:  # a fault
            self.stop()
        self.check(reply, ())

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        if not self.stop.alive:
            self.start()
        reply = self.exchange(wire.encode(wire.columns(answers)), self.timeout_s, batch_of(answers), "")
        self.check(reply, answers)
        return cast(list[float], reply["scores"])

    def check(self, reply: dict[str, Any], answers: Sequence[Answer]) -> None:
        """UserError for the fault that the child names."""
        if "problem" not in reply:
            return
        at = reply.get("sample")
        about = batch_of(answers) if at is None else sample_of(answers[at])
        raise UserError(
            f"the reward function {self.name} {reply['problem']}",
            evidence="; ".join(filter(None, (reply["evidence"], about))),
            fix="mend the function: f(prompts, completions, **columns) -> one number for each (docs/rewards.md)",
        )

    def exchange(self, request: bytes | None, limit_s: float, about: str, when: str) -> dict[str, Any]:
        """The child's next line; a child that gives none in time, or none at all, is ended."""
        late = threading.Event()

        def too_late() -> None:
            late.set()
            kill(self.process)

        timer = threading.Timer(limit_s, too_late)
        timer.start()
        try:
            line = send_and_read(self.process, request)
        finally:
            timer.cancel()
        if late.is_set() or not line.endswith(b"\n"):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)  # so that its own exit code is seen
            self.stop()
            raise self.lost(late.is_set(), limit_s, about, when)
        return cast(dict[str, Any], json.loads(line))

    def lost(self, late: bool, limit_s: float, about: str, when: str) -> UserError:
        code = self.process.returncode
        if late:
            return UserError(
                f"the reward function {self.name} took longer than {limit_s:g} s {when}".rstrip(),
                evidence=about,
                fix="mend the function, or give it more time with --reward_timeout_s",
            )
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return UserError(
            f"the process of the reward function {self.name} ended {when}".rstrip(),
            evidence="; ".join(filter(None, (how, about))),
            fix="its own messages stand above; is there enough memory?",
        )


def batch_of(answers: Sequence[Answer]) -> str:
    """Where the fault may lie when it has no sample of its own."""
    if not answers:
        return ""
    return f"asked about {len(answers)} sample{'s' * (len(answers) > 1)}, the first: {sample_of(answers[0])}"


def send_and_read(process: "subprocess.Popen[bytes]", request: bytes | None) -> bytes:
    """One line to the child (none at its start) and one from it; empty when it has gone."""
    to, back = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
    with suppress(BrokenPipeError):
        if request is not None:
            to.write(request)
            to.flush()
        return back.readline()
    return b""


def kill(process: "subprocess.Popen[bytes]") -> None:
    """The child leads a group of its own: what it has started goes with it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def end(process: "subprocess.Popen[bytes]") -> None:
    kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # what a dead child has not read
            cast(IO[bytes], pipe).close()
