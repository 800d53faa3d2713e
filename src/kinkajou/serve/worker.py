"""`python -m kinkajou.serve.worker`: a process that owns a model and answers in lines of JSON, for `serve/local.py`.

The one argument is a JSON object: what to load.  Standard input brings asks and drops, its end ends the process;
standard output belongs to the answers alone.
"""

import fcntl
import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from typing import Any, TextIO

from kinkajou.errors import UserError
from kinkajou.serve.backend import Job, Turn
from kinkajou.serve.worker_engine import FAILED, log

PIPE = 1 << 20
"""Bytes that may lie in the pipe before a step waits for the reader."""
LOST = 70
"""Exit code after a step that failed."""
Write = Callable[[dict[str, Any]], None]


def lines_out() -> Write:
    """What writes a line to the standard output of before; what libraries print goes to standard error from now on."""
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):  # where the system grants no larger one the pipe stays as it is
            fcntl.fcntl(out.fileno(), fcntl.F_SETPIPE_SZ, PIPE)
    return lambda line: write(out, line)


def write(out: TextIO, line: dict[str, Any]) -> None:
    try:
        out.write(json.dumps(line, separators=(",", ":")) + "\n")
        out.flush()
    except BrokenPipeError:  # nobody is left to answer
        os._exit(0)


def job_of(given: dict[str, Any]) -> Job:
    turns = tuple(Turn(**turn) for turn in given.pop("turns"))
    return Job(turns=turns, stops=tuple(given.pop("stops")), **given)


def read_asks(loaded: "Future[Any]") -> None:
    """Hands on what comes in until the other side has gone; a load or a step that goes on then is of no use."""
    for line in sys.stdin.buffer:
        given, engine = json.loads(line), loaded.result()
        if "ask" in given:
            engine.ask(given["ask"], job_of(given["job"]))
        elif "drop" in given:
            engine.drop(given["drop"])
        elif "score" in given:
            engine.ask(given["score"], [[Turn(**turn) for turn in chat] for chat in given["chats"]])
    os._exit(0)


def main() -> None:
    write = lines_out()
    settings = json.loads(sys.argv[1])
    loaded: Future[Any] = Future()
    threading.Thread(target=read_asks, args=(loaded,), daemon=True).start()
    try:
        if settings.pop("kind") == "reward":
            from kinkajou.serve.worker_reward import load_scorer as load
        else:
            from kinkajou.serve.worker_model import load_engine as load  # type: ignore[assignment]
        engine, facts = load(settings, write)
    except UserError as fault:
        write({"fault": [fault.problem, fault.evidence, fault.fix, fault.exit_code]})
        return
    loaded.set_result(engine)
    write({"ready": facts})
    with ExitStack() as stack:
        stack.push(lambda _, fault, __: ended(fault, engine, write))
        engine.run()


def ended(fault: BaseException | None, engine: Any, write: Write) -> bool:
    """A step that failed is told to all who wait; what they are told holds nothing of the fault."""
    if fault is not None:
        log(fault)
        write({"broken": [[number, FAILED] for number in list(engine.open)]})
        os._exit(LOST)
    return False


if __name__ == "__main__":
    main()
