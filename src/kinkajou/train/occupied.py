"""A run's folder before anything is loaded: taken by this process alone, able to take files, and free or to go on."""

import json
import os
import threading
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kinkajou import config
from kinkajou.checkpoint.lock import BEAT, NAME, RunLock
from kinkajou.checkpoint.place import Place
from kinkajou.checkpoint.room import probe
from kinkajou.checkpoint.shelf import Shelf
from kinkajou.config.recipes import jsonable
from kinkajou.errors import UserError
from kinkajou.train.identity import check_settings
from kinkajou.train.restart import written_by_last_try


@contextmanager
def occupied(stage: str, cfg: config.StageConfig) -> Iterator[bool]:
    """The run's folder is this process's inside.  False where the very run has been made and nothing is left to do."""
    folder = Path(cfg.run.output)
    if int(os.environ.get("RANK", "0")):  # the first process looks and locks for all
        yield True
        return
    if cfg.keep.resume and not Path(cfg.keep.resume).is_dir():
        raise UserError(f"there is no folder {cfg.keep.resume} to go on from", fix="--resume a run's folder")
    fresh = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        probe(folder)
        with RunLock(folder) as lock:
            if lock.stale:
                print(f"note: {lock.stale}")
            with beating(lock):
                yield not made_already(stage, cfg, folder)
    finally:
        undo(fresh)


@contextmanager
def beating(lock: RunLock) -> Iterator[None]:
    """Signs of life while the process lives, whatever it does: another machine may wait for nothing else."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            lock.beat()

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def undo(fresh: Sequence[Path]) -> None:
    """Folders made for a run that was refused before it wrote anything go again, innermost first."""
    for place in fresh:
        left = [path.name for path in place.iterdir()] if place.is_dir() else [""]
        if left == [NAME]:
            (place / NAME).unlink()
        elif left:
            return
        place.rmdir()


def made_already(stage: str, cfg: config.StageConfig, folder: Path) -> bool:
    """Whether the run in the folder has been made already; refuses to go on with another one's."""
    if cfg.run.overwrite or not (folder / "config.toml").is_file():
        return False
    then = settings_of(folder)
    if stage not in then:
        raise in_use(
            folder,
            f"{folder / 'config.toml'} is of the stage {', '.join(name for name in then if name != 'environment')}",
        )
    if "save_state" not in then[stage]:
        raise in_use(folder, f"{folder / 'config.toml'} is of a version that kept no state, so it cannot go on")
    now = {name: jsonable(x) for name, x in config.flat(cfg).items()}
    check_settings(then[stage], now, cfg.keep.allow_change, f"the run in {folder}")
    if cfg.keep.from_step is not None and not cfg.keep.resume:
        check_rewind(folder, cfg.keep.from_step)
        return False
    if not then[stage]["save_state"] and not written_by_last_try(folder):
        raise in_use(folder, "it was made with --save_state false, so it cannot go on")
    done = folder / "done.json"
    if not done.is_file() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return False
    try:
        chosen = folder / "checkpoints" / json.loads(done.read_text(encoding="utf-8"))["checkpoint"]
    except (ValueError, KeyError, TypeError):  # broken: the run goes on from its last checkpoint, and writes it again
        return False
    if not chosen.is_dir():  # lost since then: what is left goes on
        return False
    print(f"done already: {chosen}; --overwrite makes the run again")
    return True


def settings_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise in_use(folder, f"{path} is not valid TOML: {fault}") from None


def in_use(folder: Path, seen: str) -> UserError:
    return UserError(
        f"{folder} already holds a run",
        evidence=seen,
        fix="choose another --output, or pass --overwrite to delete that run",
    )


def check_rewind(folder: Path, step: int) -> None:
    """`--from_step` in the run's own folder forgets what came later: that must be asked for by name."""
    later = [place.name for place in Shelf(folder / "checkpoints").named() if place > Place(step)]
    if later:
        raise UserError(
            f"{folder} has checkpoints after step {step}",
            evidence=", ".join(later[:5]),
            fix=f"--resume {folder} --from_step {step} --output OTHER leaves them; --overwrite beside --from_step "
            "forgets them",
        )
