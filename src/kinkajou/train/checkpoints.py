"""Checkpoints of a run: written behind the training's back, thinned out, and found again when the run goes on."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from kinkajou import faults
from kinkajou.checkpoint.manifest import damages
from kinkajou.checkpoint.place import Place
from kinkajou.checkpoint.room import check_room, storage_fault
from kinkajou.checkpoint.shelf import Shelf
from kinkajou.checkpoint.texts import write_text
from kinkajou.config import KeepConfig
from kinkajou.errors import UserError
from kinkajou.models.folder import SHARD_BYTES
from kinkajou.parallel.strategy import Strategy
from kinkajou.train.behind import Behind
from kinkajou.train.kept import Copied, Kept, read_state, write_state
from kinkajou.train.round import Round

RUN, CLOCK = "run.json", "clock.json"
LONGEST_S = 5.0
NEWEST = 2
"""Checkpoints that stay while the run goes on, whatever they are: should the last one be damaged, there is another."""


@dataclass(frozen=True)
class Best:
    step: int
    metric: str
    value: float


@dataclass(frozen=True)
class Moment:
    """Where a run stands."""

    place: Place
    best: Best | None = None
    round: Round[Any] | None = None
    logs: dict[str, int] = field(default_factory=dict)
    """Bytes of each log."""
    clock: dict[str, Any] = field(default_factory=dict)
    """What depends on time and machine."""


class Checkpoints:
    """All methods but `folder` are called by all ranks together."""

    def __init__(self, folder: Path, keep: KeepConfig, kept: Kept, s: Strategy, facts: Mapping[str, Any]) -> None:
        self.shelf, self.keep, self.kept, self.strategy, self.facts = Shelf(folder), keep, kept, s, facts
        self.bests: dict[Place, Best | None] = {}
        self.on_disk: set[Place] = set()
        self._behind = Behind()
        self._pending: Moment | None = None
        self._written = False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A run that ends by a fault still lets its thread write what it has begun."""
        self._behind.wait()

    def folder(self, place: Place) -> Path:
        return self.shelf.path(place)

    @property
    def flags(self) -> tuple[bool, bool]:
        """Whether this process still writes, and whether that has failed: for `go_on`, once all have heard."""
        return self._behind.busy, self._behind.failed

    def save(self, moment: Moment) -> None:
        """Copies all that is kept, and lets a thread write it; a save before this one is waited for."""
        self.settle()
        if moment.place in self.on_disk:
            return
        s, state = self.strategy, self.keep.save_state
        copied = self.kept.copied(s, state=state)
        if state and moment.round:
            copied.append(moment.round.copied(s))
        texts = self._texts(moment) if state and s.main else {}
        faults.reached("save.snapshot")
        aside = self._open(moment.place, [part.size for part in copied])
        self.bests[moment.place] = moment.best
        self._pending, self._written = moment, s.processes == 1
        self._behind.start(partial(self._write, moment, aside, copied, texts))
        if not self.keep.save_behind:
            self.settle()

    def settle(self) -> None:
        """Waits until nothing is being written."""
        while self._pending:
            self._behind.wait(LONGEST_S)  # the others wait in a collective, which has a bound of its own
            busy, failed = self.strategy.agree(self.flags)
            self.go_on(busy > 0, failed > 0)

    def go_on(self, busy: bool, failed: bool) -> None:
        """Takes the next step of a save in progress; raises where a process could not write."""
        if failed:
            self._pending = None
            self._behind.check()
            raise UserError("another process could not write its part of a checkpoint", exit_code=4)
        if self._pending is None or busy:
            return
        if self._written:
            self.on_disk.add(self._pending.place)
            self._pending = None
        else:
            self._written = True
            if self.strategy.main:
                self._behind.start(partial(self._commit, self._pending))

    def thin_out(self, upto: Place, *, over: bool) -> None:
        """Deletes what is not to stay of those up to here.

        What lies beyond is damaged.  It counts for nothing here, and is replaced once the run comes to it.
        """
        if self.strategy.main:
            places = [place for place in self.shelf.places() if place <= upto]
            bests = {place: self._best_of(place) for place in places}
            stay = staying(places, bests, self.keep, newest=1 if over else NEWEST)
            self.shelf.prune({*stay, *(place for place in self.shelf.places() if place > upto)})

    def best_from(self, source: Path, told: Mapping[str, Any] | None) -> tuple[Best | None, list[str]]:
        """The best so far of the run in that folder, which this one then has too; what to say where it is gone."""
        best = Best(**told) if told else None
        if best is None:
            return None, []
        place = Place(best.step)
        there, here = source / self.shelf.folder.name / place.name, self.folder(place)
        if not there.is_dir():
            return None, [f"the best checkpoint so far, {there}, is gone: the next evaluation begins anew"]
        if there != here and self.strategy.main:
            shutil.copytree(there, here, dirs_exist_ok=True)
        return best, []

    def forget_after(self, now: Place) -> None:
        """What was made after a step from which the run is made again."""
        if self.strategy.main:
            self.shelf.prune([place for place in self.shelf.places() if place <= now])

    def _open(self, place: Place, sizes: Sequence[int]) -> Path:
        aside, fault = self.shelf.being_written(place), None
        if self.strategy.main:
            try:
                check_room(self.shelf.folder, sum(sizes), largest=min(max(sizes, default=0), SHARD_BYTES))
                aside = self.shelf.aside(place)
            except UserError as found:  # told once every rank knows
                fault = found
        (failed,) = self.strategy.agree([fault is not None])
        if failed:
            raise fault or UserError("the main process could not write a checkpoint", exit_code=4)
        return aside

    def _write(self, moment: Moment, aside: Path, copied: Sequence[Copied], texts: Mapping[str, str]) -> None:
        try:
            for part in copied:
                part.write(aside)
            for name, text in texts.items():
                write_state(aside, name, text)
        except (OSError, SafetensorError) as fault:
            told = storage_fault("written", self.folder(moment.place), fault)
            self.shelf.discard(moment.place)
            raise told from fault
        if self.strategy.processes == 1:
            self._commit(moment)

    def _commit(self, moment: Moment) -> None:
        self.shelf.commit(moment.place)
        if moment.best:
            write_best(self.shelf.folder.parent, moment.best)
        self.thin_out(moment.place, over=False)

    def _texts(self, moment: Moment) -> dict[str, str]:
        run = {
            "place": moment.place.name,
            **self.facts,
            "made_from": self.kept.made_from,
            "best": moment.best and asdict(moment.best),
            "logs": {name: size for name, size in moment.logs.items() if name not in moment.clock},
            "numbers": self.kept.plain(),
            "round": moment.round and moment.round.plain(),
        }
        return {RUN: json.dumps(run, indent=1), CLOCK: json.dumps(moment.clock, indent=1)}

    def _best_of(self, place: Place) -> Best | None:
        if place not in self.bests:
            path = self.folder(place) / "state" / RUN
            try:
                held = json.loads(path.read_text(encoding="utf-8"))["best"] if path.is_file() else None
                self.bests[place] = held and Best(**held)
            except (OSError, ValueError, KeyError, TypeError):  # damaged; it was named when the run began
                self.bests[place] = None
        return self.bests[place]


def staying(
    places: Sequence[Place], bests: Mapping[Place, Best | None], keep: KeepConfig, *, newest: int
) -> set[Place]:
    """Which checkpoints stay: those of `save_every` (the last N of them and each K-th step), the newest, and the
    best so far of each that stays."""
    due = [place for place in places if is_due(place, keep.save_every)]
    stay = {*(due[-keep.keep_last :] if keep.keep_last else due), *places[-newest:]}
    stay |= {place for place in due if is_due(place, keep.keep_every)}
    return stay | {Place(best.step) for place in stay if (best := bests.get(place))}


def is_due(place: Place, every: int) -> bool:
    return every > 0 and place.step > 0 and place.updates == 0 and place.step % every == 0


def write_best(folder: Path, best: Best | None) -> None:
    path = folder / "best.json"
    if best is None:
        path.unlink(missing_ok=True)
    else:
        write_text(path, json.dumps(asdict(best)))


def way_back(folder: Path, keep: KeepConfig, *, anew: bool, again: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run in this folder goes on from, and what is to be said of damaged ones.

    With `anew` (`--overwrite`) what the folder holds counts only where `--from_step` names a step of it; `again` is a
    further try of what has been begun here.
    """
    if not anew and Shelf(folder / "checkpoints").named():  # also of a run that has begun from another's
        if again or keep.resume or keep.from_step is None:
            return newest_of(folder)
        return at_step(folder, keep.from_step), []
    if keep.resume is None:
        return (None if keep.from_step is None else at_step(folder, keep.from_step)), []
    source = Path(keep.resume)
    if Place.of(source.name):
        if found := damages(source):
            raise damaged(f"{source} is damaged: {found[0]}", source)
        return source, []
    if keep.from_step is not None:
        return at_step(source, keep.from_step), []
    if not Shelf(source / "checkpoints").named():
        raise UserError(f"{source} has no checkpoint to go on from", fix="name a run folder or one of its checkpoints")
    return newest_of(source)


def newest_of(source: Path) -> tuple[Path, list[str]]:
    shelf = Shelf(source / "checkpoints")
    newest, said = shelf.newest()
    if newest is None:
        raise UserError(
            f"no checkpoint of {source} is whole",
            evidence="; ".join(said[:3]),
            fix="--overwrite starts from the beginning, another --output leaves them where they are",
            exit_code=4,
        )
    return shelf.path(newest), said


def at_step(source: Path, step: int) -> Path:
    shelf = Shelf(source / "checkpoints")
    if Place(step) not in shelf.places():
        known = ", ".join(str(place.step) for place in shelf.places() if not place.updates)
        raise UserError(f"there is no checkpoint of step {step} in {source}", evidence=f"it has: {known or 'none'}")
    found, said = shelf.newest(upto=Place(step))
    if found != Place(step):
        raise damaged(said[0], shelf.path(Place(step)))
    return shelf.path(found)


def damaged(said: str, checkpoint: Path) -> UserError:
    return UserError(said, fix=f"kinkajou verify {checkpoint}, or name another one", exit_code=4)


def facts_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint says of its run, and of the clock and machine."""
    return read_state(folder, RUN), read_state(folder, CLOCK)
