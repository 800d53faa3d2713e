"""Messages from a terminal or a pipe: lines that go on, blocks of several lines, editing where there is a terminal."""

import glob
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from kinkajou.errors import UserError

FENCE = '"""'


class Reader:
    """Reads messages from standard input; on a terminal with history and editing, by readline.

    The history is of this session alone: nothing that was typed is written anywhere.
    """

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.interactive = sys.stdin.isatty()
        self.words = sorted(words)
        self.breaks_line = False
        """Whether the end of input has already begun a new line on the terminal."""
        self._draft = ""
        self._readline: Any = None
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")
        if self.interactive:
            self._edit()

    def _edit(self) -> None:
        try:
            readline: Any = importlib.import_module("readline")
        except ImportError:  # a Python without it: the terminal's own line editing remains
            return
        self._readline = readline
        readline.set_completer(self._complete)
        readline.set_completer_delims(" \t\n")
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted text is one message
            self.breaks_line = sys.stdout.isatty()
        readline.set_startup_hook(self._fill)

    def _fill(self) -> None:
        if self._draft:
            self._readline.insert_text(self._draft)
            self._draft = ""

    def _complete(self, start: str, state: int) -> str | None:
        """The state-th word that may follow: a command at the line's beginning, else a path."""
        line = self._readline.get_line_buffer()
        if not line.startswith("/"):
            return None
        if self._readline.get_begidx() == 0:
            found = [word for word in self.words if word.startswith(start)]
        else:
            paths = sorted(glob.glob(glob.escape(os.path.expanduser(start)) + "*"))
            found = [path + "/" * os.path.isdir(path) for path in paths]
        return found[state] if state < len(found) else None

    def message(self, draft: str = "") -> str:
        """The next message; EOFError when there are no more.

        `draft` stands on the line to be changed.  UserError for bytes that are no text.
        """
        self._draft = draft
        line = self._line("you: ")
        parts = [line]
        if line.lstrip().startswith(FENCE):
            parts = self._fenced(line.lstrip().removeprefix(FENCE))
        else:
            while parts[-1].endswith("\\"):
                parts[-1] = parts[-1][:-1]
                try:
                    parts.append(self._line("...  "))
                except EOFError:  # the end of a file ends the message too
                    break
        text = "\n".join(parts).strip()
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the message holds bytes that are no UTF-8", fix="nothing was sent; say it again") from None
        return text

    def _fenced(self, line: str) -> list[str]:
        """Lines up to the one that ends in the fence; a file's end closes it too."""
        parts: list[str] = []
        while not line.rstrip().endswith(FENCE):
            parts.append(line)
            try:
                line = self._line("...  ")
            except EOFError:
                return parts
        return [*parts, line.rstrip().removesuffix(FENCE)]

    def _line(self, prompt: str) -> str:
        if not self.interactive:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\n")
        if sys.stdout.isatty():
            return input(prompt)
        sys.stderr.write(prompt)
        sys.stderr.flush()
        return input()
