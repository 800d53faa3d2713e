"""The growing files of a run folder, one JSON line a row: written, measured, and cut back to where a checkpoint was."""

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS, TIMING, SAMPLES, FINDINGS = "metrics.jsonl", "timing.jsonl", "samples.jsonl", "findings.jsonl"
LOGS = (METRICS, TIMING, SAMPLES, FINDINGS)


class Logs:
    """A file that cannot be written costs one warning and its lines, never the run."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self._warned: set[str] = set()

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite, ensure_ascii=False) + "\n")
        except OSError as fault:
            if name not in self._warned:
                self._warned.add(name)
                print(f"warning: {self.folder / name} cannot be written, its lines are lost: {fault}", file=sys.stderr)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, all of them on the disk."""
        found: dict[str, int] = {}
        for name in LOGS if self.writes else ():
            path = self.folder / name
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                found[name] = path.stat().st_size
        return found

    def cut(self, sizes: Mapping[str, int], source: Path) -> list[str]:
        """Makes them what they were: those of the source up to these sizes; returns what is to be said of it."""
        said: list[str] = []
        for name in LOGS:
            path, wanted = self.folder / name, sizes.get(name, 0)
            if type(wanted) is not int or wanted < 0:
                raise ValueError(f"{name} had {wanted!r} bytes")
            if source != self.folder and (source / name).is_file():
                shutil.copyfile(source / name, path)
            if not path.is_file():
                said += [f"{path} is gone: its lines up to here are lost"] if wanted else []
                continue
            if path.stat().st_size < wanted:
                said.append(f"{path} is shorter than it was: some lines are lost")
            os.truncate(path, min(wanted, path.stat().st_size))
        return said

    def rows(self, name: str) -> list[dict[str, Any]]:
        """What can be read of a file."""
        path = self.folder / name
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if self.writes and path.is_file() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:  # a line that was cut short by something else than a run
                continue
        return rows
