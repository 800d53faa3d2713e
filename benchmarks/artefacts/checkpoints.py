"""Hostile checkpoints: of those that follow, the attacker has renewed the manifest, which proves no origin."""

import json
import os
from collections.abc import Callable
from typing import Any

from benchmarks.artefacts.making import (
    Make,
    Target,
    both,
    edit,
    edit_by,
    header_length,
    linked,
    pickled,
    write,
)
from kinkajou.checkpoint.manifest import seal

RUN, RANDOM, OPTIMIZER = "state/run.json", "state/random.json", "state/optimizer.safetensors"


def resealed(*makes: Make) -> Make:
    def make(target: Target) -> None:
        both(*makes)(target)
        seal(target.folder)

    return make


def listed(name: str) -> Make:
    """A manifest with a name that leads elsewhere."""

    def change(value: Any, target: Target) -> None:
        value["files"][name.format(outside=target.good / "config.json")] = value["files"].pop("config.json")

    return edit_by("manifest.json", change)


def random_state(change: Callable[[Any], Any]) -> Make:
    def make(target: Target) -> None:
        path = target.folder / RANDOM
        value = json.loads(path.read_text())
        change(value[0])
        path.write_text(json.dumps(value))

    return make


CHECKPOINTS: dict[str, Make] = {
    "manifest to a file above": listed("../config.json"),
    "manifest to an absolute path": listed("{outside}"),
    "manifest of 17 MB": lambda target: os.truncate(target.folder / "manifest.json", 17 << 20),
    "manifest of 100,000 levels": write("manifest.json", lambda target: b"[" * 100_000),
    "checkpoint with a link": linked("model.safetensors"),
    "checkpoint with a pickle more": write("state/optimizer.pt", pickled),
    "pickle as the optimiser's state": resealed(write(OPTIMIZER, pickled)),
    "state with a header of 2^64-1": resealed(header_length(2**64 - 1, name=OPTIMIZER)),
    "run.json of 100,000 levels": resealed(write(RUN, lambda target: b"[" * 100_000)),
    "run.json of nothing": resealed(write(RUN, lambda target: b"{}")),
    "run.json of other types": resealed(edit(RUN, logs=[1], numbers="x", best=3, settings=None, made_from=7)),
    "run.json with logs elsewhere": resealed(edit(RUN, logs={"../../../../etc/x": 0, "metrics.jsonl": -5})),
    "random.json of other types": resealed(random_state(lambda state: state.update(python=["x", [1], None]))),
    "random.json of other lengths": resealed(random_state(lambda state: state.update(torch="00"))),
    "model as a pickle": resealed(write("model.safetensors", pickled)),
}
