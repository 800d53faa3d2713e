"""Corruptions by chance, of the kinds of benchmarks.corruption: all are found, and what is whole is used."""

import random
from pathlib import Path

import pytest
from benchmarks.corruption import KINDS
from boxes import FILES, put

from kinkajou.checkpoint.manifest import damages
from kinkajou.checkpoint.place import Place
from kinkajou.checkpoint.shelf import Shelf

PLACES = (Place(1), Place(2), Place(2, 1))
ROUNDS = 10


@pytest.mark.parametrize("kind", KINDS)
def test_all_are_found(kind: str, tmp_path: Path) -> None:
    dice = random.Random(f"seed/{kind}")
    for i in range(ROUNDS):
        shelf = Shelf(tmp_path / str(i) / "checkpoints")
        for place in PLACES:
            put(shelf, place, place.name.encode())
        broken = dice.randint(1, 3)
        for place in PLACES[-broken:]:
            assert damages(shelf.path(place)) == []
            what = KINDS[kind][1](shelf.path(place), dice)
            assert damages(shelf.path(place)), what
        newest, told = shelf.newest()
        assert newest == (PLACES[-broken - 1] if broken < 3 else None)
        assert len(told) == broken
        for place in PLACES[:-broken]:
            assert (shelf.path(place) / "config.json").read_bytes() == FILES["config.json"] + place.name.encode()
