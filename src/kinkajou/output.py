"""Standard output whose reader may leave (`kinkajou sft ... | head`): the work goes on, and says so once."""

import os
import sys
from typing import Any, TextIO


class Enduring:
    """A text stream that forgets what nobody reads any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            return self._left(len(text))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._left(0)

    def _left(self, length: int) -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        print("note: nobody reads the output any more; the work goes on", file=sys.stderr)
        return length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def bare(stream: TextIO) -> TextIO:
    """The stream itself, for a conversation, which ends where its reader leaves."""
    return stream._stream if isinstance(stream, Enduring) else stream


def endure() -> None:
    if not isinstance(sys.stdout, Enduring):
        sys.stdout = Enduring(sys.stdout)
