"""What a run shows while it goes: a bar with speed, time left and the numbers that matter; plain lines elsewhere."""

import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kinkajou.train.restart import launcher


class Console:
    def __init__(self, stage: str, total: int, shown: Sequence[str], *, every: int, active: bool) -> None:
        self.stage, self.total, self.shown, self.every, self.active = stage, total, shown, every, active
        self.out = RichConsole(highlight=False, soft_wrap=True)
        self.started = time.monotonic()
        self.first = 0
        """Steps that were made before this process."""
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.out,
            transient=True,
            disable=not (active and self.out.is_terminal),
        )
        self.task = self.bar.add_task(stage, total=total, numbers="")

    def __enter__(self) -> "Console":
        self.started = time.monotonic()
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def show(self, step: int, row: Mapping[str, Any]) -> None:
        """Moves the bar; every N steps, and at the last, leaves a line."""
        speed = (step - self.first) / max(time.monotonic() - self.started, 1e-9)
        numbers = "  ".join(f"{name} {readable(row[name])}" for name in self.shown if name in row)
        self.bar.update(self.task, completed=step, numbers=f"{speed:.2g} steps/s  {numbers}")
        if self.active and (step % self.every == 0 or step == self.total):
            left = (self.total - step) / speed if speed else 0
            self.out.print(
                f"{self.stage} {step}/{self.total}  {numbers}  [dim]{speed:.2g} steps/s, {clock(left)} left[/dim]"
            )

    def say(self, text: str) -> None:
        if self.active:
            self.out.print(text, markup=False)


def readable(x: Any) -> str:
    if x is None:
        return "-"
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def environment(world: int) -> dict[str, Any]:
    """What besides the settings a run depends on."""
    started_by = launcher()
    return {
        "kinkajou": version("kinkajou"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "git_commit": git_commit(),
        "world": world,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "command": " ".join(sys.argv),
        **({"launcher": started_by} if started_by else {}),
    }


def git_commit() -> str | None:
    """The commit of the source this package runs from; None outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine: the run does not need it
        return None
    return found.stdout.strip() or None
