"""Where a process is in its run, for the words about a rank that is lost: read from its stack, so it costs nothing."""

import faulthandler
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

HOUSE = Path(__file__).resolve().parents[1]
LONGEST = 300
"""Characters of an answer from another process."""


@dataclass
class Now:
    step: int = 0
    phase: str = ""
    folder: Path | None = None
    """Where stacks are written; standard error if omitted."""

    def __str__(self) -> str:
        if not self.step:
            return "before the first step"
        return f"step {self.step}" + (f", {self.phase}" if self.phase else "")


NOW = Now()
"""What the run tells of this process."""


@dataclass(frozen=True)
class Where:
    step: str
    call: str
    """The innermost call of ours: `all_sum, asked for in train/update.py:71`."""
    waits: bool
    """Whether that is something which all ranks do together."""

    def words(self) -> str:
        return f"{self.step}, in {self.call}"


def here() -> Where:
    """Of the main thread, asked by any thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return place_of(frames_up(frame))


def frames_up(frame: FrameType | None) -> list[tuple[str, str, int]]:
    """File, function and line, the innermost first."""
    found = []
    while frame:
        found.append((frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno))
        frame = frame.f_back
    return found


def place_of(frames: list[tuple[str, str, int]]) -> Where:
    ours = [(Path(file).relative_to(HOUSE), name, line) for file, name, line in frames if file.startswith(f"{HOUSE}/")]
    waits = any("/torch/distributed/" in file for file, _, _ in frames)
    if not ours:
        return Where(str(NOW), "what is not ours", waits)
    file, name, line = ours[0]
    if file.parts[0] != "parallel":
        return Where(str(NOW), f"{name} ({file}:{line})", waits)
    asking = next((f"{file}:{line}" for file, _, line in ours if file.parts[0] != "parallel"), "a library")
    return Where(str(NOW), f"{name}, asked for in {asking}", True)


def dump(rank: int) -> None:
    """The stacks of all threads, beside the run's files."""
    if NOW.folder and NOW.folder.is_dir():
        with (NOW.folder / f"stacks-rank-{rank}.txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
    else:
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
