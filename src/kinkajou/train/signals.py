"""SIGTERM and SIGINT while training: the first asks for a checkpoint and an end, the second leaves at once."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from kinkajou.errors import UserError

TOGETHER_S = 0.5
"""Signals that come within this time are one."""
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class Stopped(UserError):
    """A run that was asked to stop and has saved what it had."""

    def __init__(self, number: int, place: str) -> None:
        name = signal.Signals(number).name
        self.told = f"stopped by {name}; {place}; the same command goes on from there"
        super().__init__(f"{name}: {place}", exit_code=EXIT_CODES[signal.Signals(number)])

    def __str__(self) -> str:
        return self.told


class Signals:
    """While open, holds the first signal that came; handlers that were there before come back."""

    def __init__(self) -> None:
        self.asked, self._at = 0, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(fault, RuntimeError) and signal.SIGTERM in self._before and "TORCHELASTIC_RUN_ID" in os.environ:
            # When a rank is lost torchrun ends the others, and this one has yet to say which.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._before = {}

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked == number and time.monotonic() - self._at < TOGETHER_S:
            return  # a group's signal that a launcher has passed on too
        if self.asked:
            os._exit(128 + number)  # checkpoints are whole or absent, so there is nothing to tidy up
        self.asked, self._at = number, time.monotonic()
        os.write(2, b"\nstopping: this optimiser step is finished and saved; once more to leave at once\n")
