"""`kinkajou verify`: whether checkpoints are what was written, file by file."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from kinkajou.checkpoint.manifest import NAME, damages, shown, walk
from kinkajou.checkpoint.place import Place
from kinkajou.checkpoint.shelf import Shelf, unfinished
from kinkajou.errors import UserError


@dataclass(frozen=True)
class Verdict:
    name: str
    path: str
    bytes: int
    state: bool
    """Whether a run can go on from it, or it is a model alone."""
    damages: list[str]

    @property
    def whole(self) -> bool:
        return not self.damages


def verify(folder: Path, *, as_json: bool = False) -> None:
    """Prints what it finds; UserError with exit code 4 where a checkpoint is damaged."""
    found, pending = checkpoints_of(folder)
    verdicts = [judged(path) for path in found]
    if as_json:
        print(json.dumps([{**asdict(verdict), "whole": verdict.whole} for verdict in verdicts], indent=1))
    else:
        show(verdicts, pending)
    broken = [verdict for verdict in verdicts if not verdict.whole]
    if broken:
        whole = [verdict for verdict in verdicts if verdict.whole]
        raise UserError(
            f"{len(broken)} of {counted(len(verdicts))} {'is' if len(broken) == 1 else 'are'} damaged",
            evidence=f"{broken[-1].name}: {broken[-1].damages[0]}",
            fix=f"{whole[-1].path} is the newest whole one" if whole else "none is whole: train again",
            exit_code=4,
        )


def checkpoints_of(folder: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints that a folder is or holds, oldest first; and names of those that were never finished."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}", fix="name a checkpoint, or the folder of a run")
    if Place.of(folder.name) or os.path.lexists(folder / NAME):
        return [folder], []
    shelf = Shelf(folder if folder.name == "checkpoints" else folder / "checkpoints")
    found = [shelf.path(place) for place in shelf.named()]
    if not found:
        raise UserError(
            f"no checkpoint in {folder}",
            evidence=", ".join(shown(name) for name in sorted(os.listdir(folder))[:8]) or "an empty folder",
            fix="name a checkpoint (step-000120), or the folder of a run",
        )
    return found, sorted(name for name in os.listdir(shelf.folder) if name.startswith(".") and unfinished(name))


def judged(path: Path) -> Verdict:
    told = damages(path)
    try:
        files = walk(path).files
    except OSError:  # then `damages` has said so
        files = {}
    state = any(name.startswith("state/") for name in files)
    return Verdict(path.name, str(path), sum(files.values()), state, told)


def show(verdicts: list[Verdict], pending: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("checkpoint", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("first damage", overflow="fold")
    for verdict in verdicts:
        more = f" (and {len(verdict.damages) - 1:,} more)" if len(verdict.damages) > 1 else ""
        table.add_row(
            Text(shown(verdict.name)),
            f"{verdict.bytes:,}",
            "yes" if verdict.state else "no",
            "[green]whole[/green]" if verdict.whole else "[red]damaged[/red]",
            Text(f"{verdict.damages[0]}{more}") if verdict.damages else "",
        )
    console = Console(highlight=False)
    console.print(table)
    if pending:
        console.print(
            f"{counted(len(pending))} not finished: the run deletes what it left when it goes on", markup=False
        )


def counted(number: int) -> str:
    return f"{number:,} checkpoint" + ("" if number == 1 else "s")
