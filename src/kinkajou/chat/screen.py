"""What goes to the terminal: answers on standard output, all else on standard error, nothing a model says raw."""

import io
import os
import sys
import time
from bisect import bisect_right
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len

from kinkajou.errors import UserError
from kinkajou.output import bare

FRAME = 0.05
"""Seconds between two drawings of the columns."""
WIDE = 80
"""Columns of a terminal on which two answers stand side by side."""
GAP = " │ "
JOINER = "\N{ZERO WIDTH JOINER}"
UNSEEN = (
    *(0xAD, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFEFF, 0xFFA0),
    *(*range(0x2060, 0x2070), *range(0xFFF0, 0xFFFC), *range(0x1BCA0, 0x1BCA4), *range(0x1D173, 0x1D17B)),
    *range(0xE0000, 0xE1000),
)
"""Drawn as nothing (Default_Ignorable_Code_Point, Unicode 16), so that text could hide in them.

Not those that a language or an emoji is written with today: zero-width space (Khmer, Thai), joiner and non-joiner,
grapheme joiner, variation selectors 1 to 16, Mongolian's own.
"""


def stand_ins() -> dict[int, str]:
    """Characters that would move the cursor, colour, ring, copy, reorder or hide text, as something to be seen."""
    shown = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    shown[0x7F] = "\N{SYMBOL FOR DELETE}"
    moving = (*range(0x80, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0xD800, 0xE000))
    for code in (*moving, *UNSEEN):
        shown[code] = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return shown


STAND_INS = stand_ins()


def safe(text: str) -> str:
    """Text that a terminal shows and never obeys; only line ends and tabs stay as they are."""
    return text.translate(STAND_INS)


class Unheard(Exception):
    """What is said arrives nowhere: the reader has left, or the disk is full; the cause says which."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        super().__init__()

    def leave(self) -> None:
        """Without a word to nobody; UserError where somebody still wants what cannot be written."""
        nowhere = os.open(os.devnull, os.O_WRONLY)  # what the stream still holds goes there at the end
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        if not isinstance(self.__cause__, BrokenPipeError):
            which = "error" if self.stream is sys.stderr else "output"
            raise UserError(f"standard {which} cannot be written", evidence=str(self.__cause__), exit_code=4)


class Screen:
    """Standard output and error as they are when the conversation begins."""

    def __init__(self) -> None:
        self.out, self.err = bare(sys.stdout), sys.stderr
        for stream in (self.out, self.err):
            if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode shows \u2028 and goes on
                stream.reconfigure(errors="backslashreplace")
        self._open = False
        """Whether the last line of an answer has not ended yet."""
        self._passing = False
        """Whether the line on standard error will be written over."""

    def piece(self, text: str) -> None:
        """The next part of an answer."""
        if text:
            write(self.out, safe(text))
            self._open = not text.endswith("\n")

    def end_line(self) -> None:
        if self._open:
            write(self.out, "\n")
        self._open = False

    def line(self, text: str) -> None:
        """A line of standard output."""
        self.end_line()
        write(self.out, safe(text) + "\n")

    def heading(self, text: str) -> None:
        self.end_line()
        write(self.out, styled(self.out, "1", f"── {safe(text)} ──") + "\n")

    def note(self, text: str) -> None:
        """What is said about answers and settings: dim, on standard error."""
        self.end_line()
        self.passing("")
        write(self.err, "".join(styled(self.err, "2", line) + "\n" for line in safe(text).split("\n")))

    def passing(self, text: str) -> None:
        """A line on a terminal that the next one replaces; "" takes it away."""
        if self.err.isatty() and os.environ.get("TERM") != "dumb" and (text or self._passing):
            width = os.get_terminal_size(self.err.fileno()).columns - 1
            write(self.err, "\r\x1b[K" + styled(self.err, "2", safe(text)[:width]))
            self._passing = bool(text)

    def fault(self, text: object) -> None:
        self.end_line()
        write(self.err, styled(self.err, "31", safe(str(text))) + "\n")

    @property
    def size(self) -> os.terminal_size | None:
        """Columns and lines of a terminal that can be drawn on."""
        if not self.out.isatty() or os.environ.get("TERM") == "dumb":
            return None
        return os.get_terminal_size(self.out.fileno())


def write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except OSError as fault:
        raise Unheard(stream) from fault


def styled(stream: TextIO, code: str, text: str) -> str:
    """In a style of ANSI where the stream is a terminal that has styles (no-color.org)."""
    plain = not text or not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


class Column:
    """Text that comes in pieces, broken into rows of `width` cells."""

    def __init__(self, width: int) -> None:
        self.width, self.rows, self.tail, self.finished = width, list[str](), "", False

    def add(self, text: str) -> None:
        self.tail += safe(text).replace("\t", " " * 4)
        while True:
            line, end, rest = self.tail.partition("\n")
            # Marks that take no cells may come without end.
            if cell_len(line[: 8 * self.width]) > self.width or len(line) > 8 * self.width:
                at = self._cut(line)
                self.rows.append(line[:at].rstrip(" "))
                self.tail = line[at:].lstrip(" ") + end + rest
            elif end:
                self.rows.append(line)
                self.tail = rest
            else:
                return

    def finish(self) -> None:
        self.rows += [self.tail] if self.tail else []
        self.tail, self.finished = "", True

    def _cut(self, line: str) -> int:
        """Where a row that is too long ends: at its last blank, else where the cells do."""
        # Beginnings are measured, not letters: a mark may make the letter before it wider.
        full = range(1, 8 * self.width + 1)
        most = bisect_right(full, self.width, key=lambda length: cell_len(line[:length]))
        if most == len(full):
            return most
        blank = line.rfind(" ", 1, most + 1)
        if blank > 0:
            return blank
        at = most
        while at > 0 and (line[at - 1] == JOINER or cell_len(line[at]) == 0):  # marks stay with their letter
            at -= 1
        return at or max(1, most)

    def row(self, number: int) -> str:
        """A row filled up to the width."""
        text = self.rows[number] if number < len(self.rows) else self.tail if number == len(self.rows) else ""
        return text + " " * (self.width - cell_len(text))


class Columns:
    """Answers side by side while they come.

    Rows that no column can change any more are printed for good; those below are drawn again, as many as the
    terminal has lines for.
    """

    def __init__(self, screen: Screen, size: os.terminal_size, headings: Sequence[str]) -> None:
        width = (size.columns - 1 - len(GAP) * (len(headings) - 1)) // len(headings)
        self.columns = [Column(width) for _ in headings]
        self.out, self.most = screen.out, max(1, size.lines - 2)
        self.printed = self.drawn = 0
        self.due = 0.0
        top = [Column(width) for _ in headings]
        for column, heading in zip(top, headings, strict=True):
            column.add(heading)
            column.finish()
        for number in range(max(len(column.rows) for column in top)):
            write(self.out, GAP.join(styled(self.out, "1", column.row(number)) for column in top) + "\n")

    def add(self, index: int, text: str) -> None:
        self.columns[index].add(text)
        if text and time.monotonic() >= self.due:
            self.draw()

    def finish(self, index: int) -> None:
        self.columns[index].finish()
        self.draw()

    def draw(self) -> None:
        self.due = time.monotonic() + FRAME
        length = max(len(column.rows) + bool(column.tail) for column in self.columns)
        settled = min((len(column.rows) for column in self.columns if not column.finished), default=length)
        shown = min(length, max(settled, self.printed) + self.most)
        text = f"\x1b[{self.drawn}F\x1b[J" if self.drawn else ""
        for number in range(self.printed, shown):
            text += GAP.join(column.row(number) for column in self.columns).rstrip() + "\n"
        write(self.out, text)
        self.printed = max(settled, self.printed)
        self.drawn = shown - self.printed
