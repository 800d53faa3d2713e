"""A run goes on past damaged checkpoints, and keeps what it writes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kinkajou import faults
from kinkajou.checkpoint.manifest import damages
from kinkajou.checkpoint.place import Place
from kinkajou.checkpoint.shelf import Shelf
from small import Small


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.arm("")


@pytest.mark.parametrize("file", ["model.safetensors", "state/run.json"])
def test_damaged_ones_do_not_push_out_the_new(
    small: Small, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = {"save_every": 1, "keep_last": 2, "keep_every": 2, "save_behind": False}
    run, shelf = tmp_path / "run", Shelf(tmp_path / "run" / "checkpoints")
    whole = small.run("sft", run, **keep)
    assert shelf.places() == [Place(2), Place(4), Place(5)]
    for step in (4, 5):
        os.truncate(shelf.path(Place(step)) / file, 10)
    (run / "done.json").unlink()
    faults.arm("step.start:2:raise")
    with pytest.raises(RuntimeError):
        small.run("sft", run, **keep)
    said = capsys.readouterr().out
    for step in (4, 5):
        assert f"{Place(step).name} is damaged: {file} has 10 bytes" in " ".join(said.split())
    assert shelf.newest()[0] == Place(3)
    faults.arm("")
    assert small.run("sft", run, **keep) == whole
    assert shelf.places() == [Place(2), Place(4), Place(5)]
    assert not any(damages(shelf.path(place)) for place in shelf.places())
