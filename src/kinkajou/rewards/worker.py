"""The process in which a user's reward function runs: `python -m kinkajou.rewards.worker MODULE:FUNCTION`.

One JSON line in, one out.  What the function prints goes to standard error.
"""

import contextlib
import importlib
import inspect
import json
import math
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import IO, Any, cast

from kinkajou.data.records import shown
from kinkajou.errors import UserError

Columns = dict[str, list[Any]]


class BadScore(Exception):
    """What the function returned for one sample is no number."""

    def __init__(self, sample: int, problem: str) -> None:
        self.sample, self.problem = sample, problem
        super().__init__(problem)


def main(name: str) -> None:
    requests, replies = take_pipes()
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(requests, lines), daemon=True).start()
    sys.path.insert(0, os.getcwd())
    try:
        function = find(name)
    except UserError as fault:
        say(replies, {"problem": fault.problem, "evidence": fault.evidence})
    else:
        say(replies, {})
        while True:
            say(replies, answer(function, json.loads(lines.get())))


def take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The parent's two pipes, moved to where a function that reads or prints cannot touch them."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, replies


def listen(requests: IO[bytes], lines: "queue.SimpleQueue[bytes]") -> None:
    """Hands requests on.  At their end the parent has gone, whatever the function is doing: so does this process."""
    for line in requests:
        lines.put(line)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def say(replies: IO[bytes], reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()


def find(name: str) -> Callable[..., Any]:
    module, _, word = name.partition(":")
    function = getattr(guarded(importlib.import_module, module, said="cannot be imported"), word, None)
    if not callable(function):
        raise UserError(f"does not exist: {module} has no function {word!r}")
    return cast(Callable[..., Any], function)


def guarded(function: Callable[..., Any], *args: Any, said: str, **options: Any) -> Any:
    """What a call returns; UserError for whatever a user's code lets through."""
    try:
        return function(*args, **options)
    except (Exception, SystemExit) as fault:
        where = [frame for frame in traceback.extract_tb(fault.__traceback__) if frame.filename != __file__]
        place = f" ({where[-1].filename}:{where[-1].lineno})" if where else ""
        raise UserError(said, evidence=f"{type(fault).__name__}: {shown(str(fault), 300)}{place}") from None


def answer(function: Callable[..., Any], columns: Columns) -> dict[str, Any]:
    """Scores, or what is wrong with them."""
    try:
        returned = guarded(function, said="raised an error", **wanted(function, columns))
        return {"scores": checked_scores(returned, len(columns["prompts"]))}
    except UserError as fault:
        return {"problem": fault.problem, "evidence": fault.evidence}
    except BadScore as fault:
        return {"problem": fault.problem, "evidence": "", "sample": fault.sample}


def wanted(function: Callable[..., Any], columns: Columns) -> Columns:
    """The columns that the function takes: all of them if it has **columns."""
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):  # some builtins have none
        return columns
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return columns
    return {name: column for name, column in columns.items() if name in parameters}


def checked_scores(returned: object, count: int) -> list[float]:
    if not isinstance(returned, list | tuple):
        raise UserError(f"returned {type(returned).__name__}, not a list of numbers")
    if len(returned) != count:
        raise UserError("returned the wrong number of scores", evidence=f"{len(returned)} for {count} samples")
    return [as_number(i, value) for i, value in enumerate(returned)]


def as_number(sample: int, value: Any) -> float:
    """A float; scalars of numpy and torch are taken for what they hold.  One that is not finite stays so."""
    plain = value
    if type(value).__module__.partition(".")[0] in ("numpy", "torch"):
        with contextlib.suppress(ValueError, RuntimeError):  # more than one element
            plain = value.item()
    if not isinstance(plain, int | float):
        raise BadScore(sample, f"returned {shown(repr(value))[1:-1]} instead of a number")
    return math.inf if isinstance(plain, int) and abs(plain) > 2**1000 else float(plain)


if __name__ == "__main__":
    main(sys.argv[1])
