"""The records that each stage trains on, read and checked before anything heavy is imported."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from kinkajou import config
from kinkajou.data.loader import hold_out
from kinkajou.data.sources import (
    Chat,
    Prompt,
    Rows,
    describe_skipped,
    read_chats,
    read_judged,
    read_pairs,
    read_prompts,
)
from kinkajou.errors import UserError
from kinkajou.rewards.specs import check_specs

R = TypeVar("R")


@dataclass(frozen=True)
class Inputs(Generic[R]):
    train: tuple[R, ...]
    held_out: tuple[R, ...]


@dataclass(frozen=True)
class RLInputs:
    prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    ptx: tuple[Chat, ...]


def records(cfg: config.StageConfig) -> Inputs[Any] | RLInputs:
    """What any stage trains on."""
    match cfg:
        case config.SFTConfig():
            return split(cfg.source, cfg.run.seed, read_chats)
        case config.RewardConfig():
            return split(cfg.source, cfg.run.seed, read_pairs)
        case config.PreferConfig():
            return split(cfg.source, cfg.run.seed, read_judged if cfg.method.reads == "judged" else read_pairs)
        case _:
            return rl_records(cfg)


def rl_records(cfg: config.RLConfig) -> RLInputs:
    check_specs((*cfg.judge.reward, *filter(None, [cfg.judge.gold])))
    rows = cfg.rollout
    prompts = told(read_prompts(rows.prompts, max_rows=rows.max_prompts, bad_rows=rows.bad_rows))
    held_out: tuple[Prompt, ...] = ()
    if cfg.judge.eval_prompts:
        held_out = told(read_prompts(cfg.judge.eval_prompts, bad_rows=rows.bad_rows))
    ptx: tuple[Chat, ...] = ()
    if isinstance(cfg, config.PPOConfig) and cfg.ptx.ptx_data and cfg.ptx.ptx_coef > 0:
        ptx = told(read_chats(cfg.ptx.ptx_data, bad_rows=rows.bad_rows))
    return RLInputs(prompts, held_out, ptx)


def split(source: config.DataConfig, seed: int, read: Callable[..., Rows[Any]]) -> Inputs[Any]:
    rows = told(read(source.data, subset=source.subset, max_rows=source.max_rows, bad_rows=source.bad_rows))
    if source.eval_data:
        return Inputs(rows, told(read(source.eval_data, subset=source.subset, bad_rows=source.bad_rows)))
    train, held = hold_out(len(rows), source.eval_share, seed)
    return Inputs(tuple(rows[i] for i in train), tuple(rows[i] for i in held))


def told(rows: Rows[R]) -> tuple[R, ...]:
    """The good rows; the skipped ones are named on stderr, once per job."""
    if rows.skipped and os.environ.get("RANK", "0") == "0":
        print(describe_skipped(rows.skipped), file=sys.stderr)
    return rows.rows


def trace_file(name: str) -> Path | None:
    """Where a profile's trace goes, None for nowhere.  Refused before anything runs: a place that takes no file, and
    a file there that is no trace."""
    if name == "none":
        return None
    path = Path(name).resolve()
    if not path.parent.is_dir():
        raise UserError("the trace cannot be written", evidence=f"{path.parent} is no folder", fix="another --trace")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError("the trace cannot be written", evidence=f"{name} is not writable", fix="another --trace")
    if path.is_file():
        start = path.read_bytes()[:200]
        if start and not (start.startswith(b"\x1f\x8b") or b"schemaVersion" in start):
            raise UserError(f"{name} is there and is no trace", fix="another --trace, or delete the file")
    return path
