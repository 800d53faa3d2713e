"""A storage that is full, read-only or limited is noticed before anything is computed."""

import os
import resource
import shutil
from pathlib import Path

import pytest
from boxes import disk, in_child

from kinkajou.checkpoint.room import check_room, free_bytes, probe
from kinkajou.errors import UserError


def test_room(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert abs((free_bytes(tmp_path) or 0) - free) < 1 << 30  # others write too
    check_room(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(UserError) as told:
        check_room(tmp_path, 1 << 60)
    assert told.value.exit_code == 4
    assert told.value.evidence.startswith(f"it needs {1 << 60:,} bytes, ")
    assert str(tmp_path) in told.value.problem


def test_the_longest_file_that_is_allowed(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        check_room(tmp_path, 4 << 20, largest=1 << 20)
        with pytest.raises(UserError) as told:
            check_room(tmp_path, 4 << 20, largest=(1 << 20) + 1)
        assert told.value.exit_code == 4
        assert "1,048,577 bytes, the limit is 1,048,576" in told.value.evidence

    assert in_child(limited) == 0


def test_probe_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    probe(folder)
    assert list(folder.iterdir()) == []


def test_probe_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file could not be written") as told:
        probe(tmp_path / "file")
    assert told.value.exit_code == 4


def test_probe_of_a_folder_without_permission(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    tmp_path.chmod(0o755)

    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.chown(closed, 0, 0)
            os.setuid(65534)
        else:
            closed.chmod(0o555)
        with pytest.raises(UserError, match="could not be written") as told:
            probe(closed)
        assert told.value.exit_code == 4
        assert told.value.evidence.startswith("Permission denied")

    assert in_child(as_nobody) == 0


def test_a_file_limit_of_nothing(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        with pytest.raises(UserError) as told:
            probe(tmp_path)
        assert told.value.evidence.startswith("File too large")

    assert in_child(limited) == 0
    assert list(tmp_path.iterdir()) == []


def test_probe_of_a_read_only_disk(tmp_path: Path) -> None:
    with disk(tmp_path, "ro"), pytest.raises(UserError) as told:
        probe(tmp_path)
    assert told.value.exit_code == 4
    assert told.value.evidence.startswith("Read-only file system")
