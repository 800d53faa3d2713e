"""One wrong input: a command line, files that it reads, and what is asked of the answer."""

import contextlib
import io
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, TypeVar

LIMIT_S = 2.0
HANGS_AFTER_S = 20.0
T = TypeVar("T")


class Draw(Protocol):
    """Hypothesis' `draw`: one value of a strategy."""

    def __call__(self, strategy: Any, /) -> Any: ...


@dataclass(frozen=True)
class Good:
    """What a command needs that is not wrong: a policy, a reward model, one file of each kind of records."""

    policy: str
    judge: str
    chats: str
    pairs: str
    judged: str
    prompts: str


@dataclass(frozen=True)
class Case:
    """`expected` "refused": exit code 2 and a sentence; "runs": exit code 0.  `names` must all be said; of a tuple
    among them, one."""

    kind: str
    arguments: Sequence[str]
    names: Sequence[str | tuple[str, ...]] = ()
    expected: Literal["refused", "runs"] = "refused"
    codes: tuple[int, ...] = (2,)
    leaves: bool = False
    """Whether a run folder may be left behind by a refusal."""


@dataclass(frozen=True)
class Answer:
    """What a command did with a case; `faults` is empty where all is as it must be."""

    case: Case
    code: int | None
    said: str
    seconds: float
    faults: tuple[str, ...] = field(default=())


class Hung(BaseException):
    """Raised by the alarm; no handler of ours or of a library catches it."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tried(case: Case, main: Callable[[list[str]], int], folder: Path) -> Answer:
    """Runs the command in `folder`, in this process."""
    said, told, code, broke = io.StringIO(), io.StringIO(), None, ""
    here = os.getcwd()
    os.chdir(folder)
    start = time.perf_counter()
    try:
        with at_most(HANGS_AFTER_S), contextlib.redirect_stderr(said), contextlib.redirect_stdout(told):
            code = main(list(case.arguments))
    except Hung:
        broke = f"still at work after {HANGS_AFTER_S:g} s"
    except SystemExit as exc:
        broke = f"left by SystemExit({exc.code})"
    except Exception as exc:  # a traceback is what is looked for here: it is counted as a wrong answer
        broke = f"traceback: {type(exc).__name__}: {str(exc)[:200]}"
    finally:
        os.chdir(here)
    seconds = time.perf_counter() - start
    text = said.getvalue()
    return Answer(case, code, text, seconds, tuple(judged(case, code, text, told.getvalue(), seconds, broke)))


def judged(case: Case, code: int | None, said: str, told: str, seconds: float, broke: str) -> Iterator[str]:
    if broke:
        yield broke
        return
    if "Traceback" in said + told:
        yield "a traceback was printed"
    if seconds > LIMIT_S:
        yield f"{seconds:.1f} s"
    if case.expected == "runs":
        if code:
            yield f"exit code {code}, and it is sound"
    elif code not in case.codes:
        yield f"exit code {code}"
    elif not said.splitlines()[-3:] or "error: " not in said:
        yield "no sentence"
    for name in case.names:
        several = name if isinstance(name, tuple) else (name,)
        if not any(word in said for word in several):
            yield f"not named: {' or '.join(several)}"
