"""A sealed folder is whole; whatever is done to it afterwards is named."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from boxes import FILES, fill

from kinkajou.checkpoint import manifest
from kinkajou.checkpoint.manifest import damages, seal
from kinkajou.errors import UserError


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "box"
    folder.mkdir()
    fill(folder)
    seal(folder)
    return folder


def test_what_a_manifest_says(sealed: Path) -> None:
    written = json.loads((sealed / "manifest.json").read_text())
    assert written["format"] == 1
    assert written["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }
    assert damages(sealed) == []


def edit(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "manifest.json"
    written = json.loads(path.read_text())
    change(written)
    path.write_text(json.dumps(written, indent=1) + "\n")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


def linked(path: Path, folder: Path) -> None:
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def listed_elsewhere(written: dict[str, object], name: str) -> None:
    files = written["files"]
    assert isinstance(files, dict)
    files[name] = files.pop("config.json")


MODEL, RUN, LIST = "model.safetensors", "state/run.json", "manifest.json"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte short": (lambda f: (f / MODEL).write_bytes(FILES[MODEL][:-1]), f"{MODEL} has 349 bytes instead of 350"),
    "a byte more": (lambda f: (f / MODEL).write_bytes(FILES[MODEL] + b"x"), f"{MODEL} has 351 bytes instead of 350"),
    "empty": (lambda f: (f / MODEL).write_bytes(b""), f"{MODEL} has 0 bytes instead of 350"),
    "a bit": (lambda f: flip(f / MODEL), f"{MODEL} has another sha256"),
    "a bit below": (lambda f: flip(f / RUN), f"{RUN} has another sha256"),
    "deleted": (lambda f: (f / RUN).unlink(), f"{RUN} is missing"),
    "swapped": (lambda f: swap(f / "config.json", f / "ema/model"), "config.json has 1 bytes instead of 2"),
    "added": (lambda f: (f / "state/more.bin").write_bytes(b""), f"state/more.bin is not in {LIST}"),
    "added folder": (lambda f: (f / "more").mkdir(), f"the folder more is not in {LIST}"),
    "link": (lambda f: linked(f / MODEL, f), f"{MODEL} is a symbolic link"),
    "linked folder": (lambda f: linked(f / "state", f), "state is a symbolic link"),
    "added link": (lambda f: (f / "more").symlink_to("/etc"), "more is a symbolic link"),
    "pipe": (lambda f: os.mkfifo(f / "more"), "more is no plain file"),
    "a folder for a file": (lambda f: ((f / MODEL).unlink(), (f / MODEL).mkdir()), f"{MODEL} is missing"),
    "no manifest": (lambda f: (f / LIST).unlink(), f"{LIST} is missing"),
    "empty manifest": (lambda f: (f / LIST).write_bytes(b""), f"{LIST} cannot be read: "),
    "linked manifest": (lambda f: linked(f / LIST, f), f"{LIST} is no plain file"),
    "binary manifest": (lambda f: (f / LIST).write_bytes(b"\xff\xfe"), f"{LIST} is not UTF-8"),
    "manifest of a list": (lambda f: (f / LIST).write_text("[]"), f"{LIST} cannot be read: it is not the object"),
    "deep manifest": (lambda f: (f / LIST).write_text("[" * 100_000), f"{LIST} cannot be read: nested deeper"),
    "long manifest": (
        lambda f: os.truncate(f / LIST, manifest.MAX_BYTES + 1),
        f"{LIST} is longer than 16,777,216 bytes",
    ),
    "a space more": (
        lambda f: (f / LIST).write_text((f / LIST).read_text() + " "),
        f"{LIST} has been changed since it was written",
    ),
    "another format": (
        lambda f: edit(f, lambda m: m.update(format=2)),
        f"{LIST} cannot be read: its format is 2, not 1",
    ),
    "a file struck out": (
        lambda f: ((f / RUN).unlink(), edit(f, lambda m: m["files"].pop(RUN))),  # type: ignore[attr-defined]
        f"{LIST} has been changed since it was written",
    ),
    "a path above": (
        lambda f: edit(f, lambda m: listed_elsewhere(m, "../config.json")),
        f"{LIST} cannot be read: ../config.json is no place in a checkpoint",
    ),
    "an absolute path": (
        lambda f: edit(f, lambda m: listed_elsewhere(m, "/etc/passwd")),
        f"{LIST} cannot be read: /etc/passwd is no place in a checkpoint",
    ),
    "negative bytes": (
        lambda f: edit(f, lambda m: m["files"][RUN].update(bytes="1")),  # type: ignore[index]
        f"{LIST} cannot be read: the entry of {RUN} is not bytes and sha256",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_named(name: str, sealed: Path) -> None:
    damage, sentence = DAMAGES[name]
    damage(sealed)
    found = damages(sealed)
    assert found
    assert found[0].startswith(sentence)


def test_each_damage_has_a_sentence(sealed: Path) -> None:
    flip(sealed / MODEL)
    (sealed / RUN).unlink()
    (sealed / "more").write_bytes(b"")
    assert damages(sealed) == [f"{RUN} is missing", f"more is not in {LIST}", f"{MODEL} has another sha256"]


def test_a_linked_checkpoint_and_none(sealed: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sealed)
    assert damages(tmp_path / "link") == [f"{tmp_path / 'link'} is a symbolic link"]
    assert damages(tmp_path / "none") == [f"{tmp_path / 'none'} is no folder"]


def test_names_are_printable(sealed: Path) -> None:
    (sealed / os.fsdecode(b"a\x1b[31m\xffb")).write_bytes(b"")
    assert damages(sealed) == [rf"a\x1b[31m\udcffb is not in {LIST}"]


def test_more_files_than_can_be_listed_are_not_walked(sealed: Path) -> None:
    for i in range(200):
        (sealed / f"more-{i}").write_bytes(b"")
    assert "there are more files than were written" in damages(sealed)


def test_known_digests_are_taken_as_they_are(tmp_path: Path) -> None:
    fill(tmp_path)
    size = len(FILES[MODEL])
    seal(tmp_path, {MODEL: (size, "0" * 64)})
    assert damages(tmp_path) == [f"{MODEL} has another sha256"]


def test_a_file_that_was_not_written_to_its_end(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(UserError, match="could not be written") as told:
        seal(tmp_path, {MODEL: (351, "0" * 64)})
    assert told.value.exit_code == 4
    assert "350 bytes, 351 were written" in told.value.evidence


def test_a_link_is_not_sealed(tmp_path: Path) -> None:
    (tmp_path / "more").symlink_to("/etc/passwd")
    with pytest.raises(UserError) as told:
        seal(tmp_path)
    assert "more is a symbolic link" in told.value.evidence


def test_a_second_seal_takes_the_new_files(sealed: Path) -> None:
    (sealed / "more").write_bytes(b"1")
    seal(sealed)
    assert damages(sealed) == []
