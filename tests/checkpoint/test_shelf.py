"""Whole or absent: whatever ends the process, and whatever the storage says."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from boxes import FILES, KILLED, disk, fill, in_child, put

from kinkajou import faults
from kinkajou.checkpoint.manifest import damages
from kinkajou.checkpoint.place import Place
from kinkajou.checkpoint.shelf import Shelf
from kinkajou.errors import UserError

WRITING = ("save.begin", "save.files", "save.manifest", "save.synced", "save.renamed")
A, B, C = Place(1), Place(1, 2), Place(2)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "run" / "checkpoints")


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.arm("")


def names(shelf: Shelf) -> list[str]:
    return sorted(os.listdir(shelf.folder))


def test_there_is_none_before_the_first(shelf: Shelf) -> None:
    assert shelf.places() == []
    assert shelf.newest() == (None, [])
    assert shelf.clear_aside() == []
    assert shelf.prune([]) == []


def test_order_is_by_place_not_by_time(shelf: Shelf) -> None:
    for place in (C, A, B):
        os.utime(put(shelf, place), (10**9 - place.step, 10**9 - place.step))
    assert shelf.places() == [A, B, C]
    assert shelf.newest() == (C, [])
    assert shelf.newest(upto=B) == (B, [])
    assert shelf.newest(upto=Place(1, 1)) == (A, [])
    assert shelf.newest(upto=Place(0)) == (None, [])


def test_damaged_ones_are_named_and_skipped(shelf: Shelf) -> None:
    for place in (A, B, C):
        put(shelf, place)
    (shelf.path(C) / "manifest.json").unlink()
    (shelf.path(B) / "model.safetensors").write_bytes(b"x")
    (shelf.path(B) / "config.json").unlink()
    assert shelf.places() == [A, B]
    assert shelf.newest() == (
        A,
        [
            f"{shelf.path(C)} is damaged: manifest.json is missing",
            f"{shelf.path(B)} is damaged: config.json is missing (and 1 more)",
        ],
    )


def test_what_is_no_checkpoint_is_left_alone(shelf: Shelf) -> None:
    put(shelf, A)
    (shelf.folder / "notes").mkdir()
    (shelf.folder / ".step-mine.tmp").write_text("")
    (shelf.folder / "step-000009").write_text("a file")
    shelf.clear_aside()
    shelf.prune([])
    assert names(shelf) == [".step-mine.tmp", "notes", "step-000009"]


@pytest.mark.parametrize("point", WRITING)
@pytest.mark.parametrize("before", ["none", "whole", "damaged"])
def test_a_kill_while_one_is_written(shelf: Shelf, point: str, before: str) -> None:
    """`before`: what stood under the same name.  An older checkpoint always stays."""
    put(shelf, A)
    if before != "none":
        put(shelf, C, b"before")
    if before == "damaged":
        (shelf.path(C) / "ema" / "model").unlink()
    assert in_child(lambda: put(shelf, C, b"after"), f"{point}:1:kill") == KILLED
    shelf.clear_aside()
    new, told = shelf.newest()
    assert not [name for name in names(shelf) if name.startswith(".")]
    assert damages(shelf.path(A)) == []
    if point == "save.renamed":
        assert (new, told) == (C, [])
        assert (shelf.path(C) / "config.json").read_bytes() == b"{}after"
    elif before == "whole":
        assert (new, told) == (C, [])
        assert (shelf.path(C) / "config.json").read_bytes() == b"{}before"
    else:
        assert new == A
        assert len(told) == (before == "damaged")
    put(shelf, C, b"again")
    assert shelf.newest() == (C, [])


def test_a_kill_between_the_two_renames(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    put(shelf, C, b"before")

    def die_at_the_second(self: Path, target: Path) -> None:
        if target.name == C.name:
            os.kill(os.getpid(), 9)
        os.rename(self, target)

    monkeypatch.setattr(Path, "rename", die_at_the_second)
    assert in_child(lambda: put(shelf, C, b"after")) == KILLED
    monkeypatch.undo()
    assert names(shelf) == [f".{C.name}.old", f".{C.name}.tmp"]
    assert shelf.clear_aside() == [f".{C.name}.old", f".{C.name}.tmp"]
    assert shelf.newest() == (C, [])
    assert (shelf.path(C) / "config.json").read_bytes() == b"{}before"


def test_prune(shelf: Shelf) -> None:
    for place in (A, B, C):
        put(shelf, place)
    assert shelf.prune({C, A}) == [B]
    assert names(shelf) == [A.name, C.name]


def test_a_kill_while_one_is_deleted(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (A, C):
        put(shelf, place)

    def die(path: Path) -> None:
        (path / "config.json").unlink()
        os.kill(os.getpid(), 9)

    monkeypatch.setattr(shutil, "rmtree", die)
    assert in_child(lambda: shelf.prune({C})) == KILLED
    monkeypatch.undo()
    assert names(shelf) == [f".{A.name}.gone", C.name]
    shelf.clear_aside()
    assert names(shelf) == [C.name]
    put(shelf, A)
    assert in_child(lambda: shelf.prune({C}), "save.pruned:1:kill") == KILLED
    assert names(shelf) == [C.name]


@pytest.mark.parametrize("point", WRITING)
def test_a_full_disk_leaves_what_was_there(shelf: Shelf, point: str) -> None:
    put(shelf, A)
    put(shelf, C, b"before")
    faults.arm(f"{point}:1:enospc")
    with pytest.raises(UserError, match=rf"{C.name} could not be written") as told:
        put(shelf, C, b"after")
    assert told.value.exit_code == 4
    assert told.value.evidence.startswith("No space left on device; ")
    assert "bytes free" in told.value.evidence
    assert not os.path.lexists(shelf.folder / f".{C.name}.tmp")
    assert shelf.newest() == (C, [])
    assert damages(shelf.path(A)) == []


def test_a_longer_file_than_is_allowed(shelf: Shelf) -> None:
    put(shelf, A)

    def seal_a_long_manifest() -> None:
        folder = shelf.aside(C)
        for i in range(100):
            (folder / f"file-{i}").write_bytes(b"")
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        with pytest.raises(UserError) as told:
            shelf.commit(C)
        assert told.value.exit_code == 4
        assert told.value.evidence.startswith(os.strerror(errno.EFBIG))

    assert in_child(seal_a_long_manifest) == 0
    assert names(shelf) == [A.name]


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    small = tmp_path / "disk"
    with disk(small, "size=64k"):
        shelf = Shelf(small / "checkpoints")
        put(shelf, A)
        folder = shelf.aside(C)
        fill(folder)
        with (small / "rest").open("wb") as file, pytest.raises(OSError, match="No space"):
            file.write(bytes(1 << 20))
        with pytest.raises(UserError) as told:
            shelf.commit(C)
        assert told.value.exit_code == 4
        assert told.value.evidence == "No space left on device; 0 bytes free"
        assert names(shelf) == [A.name]
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        for refused in (lambda: shelf.aside(C), lambda: shelf.prune([])):
            with pytest.raises(UserError, match="could not be") as told:
                refused()
            assert told.value.exit_code == 4
            assert told.value.evidence.startswith("Read-only file system")
        assert shelf.newest() == (A, [])


def test_files_have_the_modes_of_their_user(shelf: Shelf) -> None:
    before = os.umask(0o077)
    try:
        path = put(shelf, A)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o700
    assert (path / "manifest.json").stat().st_mode & 0o777 == 0o600


def test_a_link_in_the_way_is_replaced_and_not_followed(shelf: Shelf, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    fill(other)
    shelf.folder.mkdir(parents=True)
    for name in (A.name, f".{A.name}.tmp", f".{A.name}.old"):
        (shelf.folder / name).symlink_to(other)
    put(shelf, A)
    assert names(shelf) == [A.name]
    assert shelf.newest() == (A, [])
    assert (other / "config.json").read_bytes() == FILES["config.json"]
