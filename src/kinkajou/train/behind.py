"""One piece of work at a time in a thread beside the training; its fault comes out where the training asks."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

NICE = 19


def step_back() -> None:
    """The training's threads come first: on a CPU hashing and writing take only what they leave."""
    if sys.platform == "linux":  # where priorities are those of threads
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Behind:
    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=step_back)
        self._work: Future[None] | None = None

    @property
    def busy(self) -> bool:
        return self._work is not None and not self._work.done()

    @property
    def failed(self) -> bool:
        return self._work is not None and self._work.done() and self._work.exception() is not None

    def start(self, work: Callable[[], None]) -> None:
        assert not self.busy
        self._work = self._thread.submit(work)

    def wait(self, longest_s: float | None = None) -> None:
        """For the end of the work, however it ends."""
        if self._work:
            wait([self._work], longest_s)

    def check(self) -> None:
        """Raises the fault of the last work, once."""
        work, self._work = self._work, None
        if work:
            work.result()
