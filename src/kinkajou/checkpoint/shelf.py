"""The checkpoints of a run: written aside, renamed when whole, found by place, thinned out."""

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from kinkajou import faults
from kinkajou.checkpoint import manifest
from kinkajou.checkpoint.manifest import Digests, damages, sync_folder, write_manifest
from kinkajou.checkpoint.place import Place
from kinkajou.checkpoint.room import storage_fault
from kinkajou.errors import UserError

ASIDE, OLD, GONE = ".tmp", ".old", ".gone"
"""Ends of names that begin with a dot: being written; about to be replaced; about to be deleted."""


class Shelf:
    """Over the folder `checkpoints` of a run.  Whoever writes holds the run's lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, place: Place) -> Path:
        return self.folder / place.name

    def places(self) -> list[Place]:
        """Those with a manifest, oldest first."""
        return [place for place in self.named() if (self.path(place) / manifest.NAME).is_file()]

    def named(self) -> list[Place]:
        """All that have a checkpoint's name, oldest first."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as fault:
            raise storage_fault("read", self.folder, fault) from fault
        return sorted(place for name in names if (place := Place.of(name)))

    def newest(self, *, upto: Place | None = None, content: bool = True) -> tuple[Place | None, list[str]]:
        """The newest whole one, and a sentence for each damaged one that was skipped; `content` as in `damages`."""
        told: list[str] = []
        for place in reversed(self.named()):
            if upto is not None and place > upto:
                continue
            if not (found := damages(self.path(place), content=content)):
                return place, told
            more = f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""
            told.append(f"{self.path(place)} is damaged: {found[0]}{more}")
        return None, told

    def aside(self, place: Place) -> Path:
        """A fresh empty folder beside the checkpoint's, to be filled and then given to `commit`."""
        path = self.being_written(place)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            delete(path)
            path.mkdir()
            faults.reached("save.begin")
        except OSError as fault:
            raise self._given_up(place, fault) from fault
        return path

    def commit(self, place: Place, known: Digests | None = None) -> None:
        """Seals what lies aside and gives it the checkpoint's name.

        A checkpoint of the same place is first put beside, from where `clear_aside` takes it back should this
        process end between the two renames.
        """
        aside, path, old = self.being_written(place), self.path(place), self._beside(place, OLD)
        try:
            write_manifest(aside, known or {})
            if os.path.lexists(path):
                delete(old)
                path.rename(old)
            aside.rename(path)
            sync_folder(self.folder)
            faults.reached("save.renamed")
            delete(old)
        except OSError as fault:
            raise self._given_up(place, fault) from fault

    def discard(self, place: Place) -> None:
        """Deletes what lies aside of a checkpoint that could not be written, as far as the storage lets it."""
        shutil.rmtree(self.being_written(place), ignore_errors=True)
        with suppress(OSError):  # what was there has its name again; where not, `clear_aside` gives it back
            if not os.path.lexists(self.path(place)):
                self._beside(place, OLD).rename(self.path(place))

    def clear_aside(self) -> list[str]:
        """Deletes what an ended process has left unfinished; returns the names."""
        try:
            names = [path.name for path in self.folder.glob(".step-*") if unfinished(path.name)]
            for name in sorted(names):
                path = self.folder / name
                if path.suffix == OLD and not os.path.lexists(whole := self.folder / name[1 : -len(OLD)]):
                    path.rename(whole)
                else:
                    delete(path)
        except OSError as fault:
            raise storage_fault("cleared of unfinished checkpoints", self.folder, fault) from fault
        return sorted(names)

    def prune(self, keep: Collection[Place]) -> list[Place]:
        """Deletes all checkpoints but these; returns which."""
        going = [place for place in self.places() if place not in keep]
        for place in going:
            gone = self._beside(place, GONE)
            try:
                delete(gone)
                self.path(place).rename(gone)  # at once: a half deleted one must not keep the name
                delete(gone)
                faults.reached("save.pruned")
            except OSError as fault:
                raise storage_fault("deleted", self.path(place), fault) from fault
        return going

    def being_written(self, place: Place) -> Path:
        """Where it lies until it is whole."""
        return self._beside(place, ASIDE)

    def _beside(self, place: Place, end: str) -> Path:
        return self.folder / f".{place.name}{end}"

    def _given_up(self, place: Place, fault: OSError) -> UserError:
        told = storage_fault("written", self.path(place), fault)  # before room is made
        self.discard(place)
        return told


def unfinished(name: str) -> bool:
    stem, dot, end = name[1:].rpartition(".")
    return dot + end in (ASIDE, OLD, GONE) and Place.of(stem) is not None


def delete(path: Path) -> None:
    """A folder with all in it, a file, a link (never what it leads to), or nothing."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
