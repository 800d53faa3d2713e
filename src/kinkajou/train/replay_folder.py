"""The step that stopped a run, on the disk: model, batch and what was wrong, for `kinkajou replay`."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kinkajou.batch import (
    GRPOBatch,
    JudgedBatch,
    PairBatch,
    PPOBatch,
    PreferenceBatch,
    TokenBatch,
    ValueBatch,
)
from kinkajou.checkpoint.texts import write_text
from kinkajou.data.strict_json import JSONFault, parse
from kinkajou.errors import UserError
from kinkajou.parallel.strategy import Strategy
from kinkajou.train.nonfinite import NotFinite

KINDS: dict[str, type[TokenBatch]] = {
    kind.__name__: kind
    for kind in (TokenBatch, PairBatch, PreferenceBatch, JudgedBatch, GRPOBatch, ValueBatch, PPOBatch)
}
ABOUT, BATCH, WEIGHTS = "replay.json", "batch.safetensors", "weights.safetensors"


def keep_replay(
    folder: Path,
    fault: NotFinite,
    s: Strategy,
    write: Callable[[Path | None], None],
    *,
    settings: Path,
    more: Mapping[str, Any],
) -> str:
    """Fills the folder, by all ranks together; a sentence on where it is.

    `write` is the run's own for a checkpoint: it gives architecture and tokenizer.  The weights of the model that
    failed come beside it to the bit, adapters and heads included.  The rank whose micro-batches were wrong writes them.
    """
    scene = fault.scene
    if scene is None:
        return ""
    aside, told = folder.with_name(f".{folder.name}.tmp"), ""
    try:
        if s.main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        write(aside if s.main else None)
        weights = {name: x.cpu().contiguous() for name, x in s.full_params(scene.model, frozen=True)}
        if s.main:
            save_file(weights, aside / WEIGHTS)
            shutil.copyfile(settings, aside / "config.toml")
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        s.barrier()
        if s.rank == fault.rank:
            write_batch(folder, fault, more)
        s.barrier()
    except OSError as full:  # the run ends with its own fault, which says more
        told = f"the step could not be written for a replay: {full}"
    return told or f"kinkajou replay {folder} looks at it again"


def write_batch(folder: Path, fault: NotFinite, more: Mapping[str, Any]) -> None:
    assert fault.scene
    objectives = list({id(objective): objective for objective, _, _ in fault.scene.parts}.values())
    counts = {id(objective): count for objective, count, _ in fault.scene.parts}
    columns = {f"{i}.{name}": x.cpu().clone() for i, o in enumerate(objectives) for name, x in vars(o.batch).items()}
    about = {
        **more,
        "rank": fault.rank,
        "place": fault.place,
        "evidence": fault.evidence,
        "objectives": [
            {"name": o.name, "weight": o.weight, "batch": type(o.batch).__name__, "count": counts[id(o)].tolist()}
            for o in objectives
        ],
        "parts": [[objectives.index(o), rows.tolist()] for o, _, rows in fault.scene.parts],
    }
    save_file(columns, folder / BATCH)
    write_text(folder / ABOUT, json.dumps(about, indent=1))


def read_replay(folder: Path) -> tuple[dict[str, Any], list[TokenBatch], list[Tensor]]:
    """What is said of the step, the batches of its objectives, and their counts."""
    if not (folder / ABOUT).is_file():
        raise UserError(
            f"{folder} holds no step to replay", evidence=f"there is no {ABOUT}", fix="name RUN/replay/step-000012"
        )
    try:
        about = parse((folder / ABOUT).read_text(encoding="utf-8"))
        columns = load_file(folder / BATCH)
        batches = [
            KINDS[one["batch"]](
                **{name.partition(".")[2]: x for name, x in columns.items() if name.startswith(f"{i}.")}
            )
            for i, one in enumerate(about["objectives"])
        ]
        counts = [torch.tensor(one["count"]) for one in about["objectives"]]
    except (
        OSError,
        JSONFault,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        RuntimeError,
        ValueError,
        SafetensorError,
    ) as fault:
        raise UserError(f"{folder} is damaged", evidence=" ".join(str(fault).split())[:200]) from None
    return about, batches, counts
