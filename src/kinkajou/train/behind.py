"""One piece of work at a time in a thread beside the training; its fault comes out where the training asks."""

import threading
from collections.abc import Callable


class Behind:
    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.fault: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        assert not self.busy

        def run() -> None:
            try:
                work()
            except BaseException as fault:
                self.fault = fault

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raises the fault of the last work, once."""
        fault, self.fault = self.fault, None
        if fault:
            raise fault
