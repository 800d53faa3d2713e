"""`kinkajou eval reward`: held-out pairs through a reward model, and the page of its health."""

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinkajou import config
from kinkajou.data.loader import hold_out
from kinkajou.data.records import Pair
from kinkajou.data.sources import Rows, read_pairs
from kinkajou.errors import UserError, did_you_mean
from kinkajou.train.inputs import told

if TYPE_CHECKING:
    from kinkajou.data.chat import ChatFormat
    from kinkajou.evals.reward_health import Health, ScoredPair
    from kinkajou.evals.reward_scores import Stability

SUBSET_FIELDS = ("subset", "source", "category")
"""Fields that name a subset when `--subset_field` does not say."""
NO_SUBSET = "(none)"
ANSWERS_TRIED = 32
"""Answers that are scored in four ways, of all lengths."""


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    pair: Pair
    chosen: list[int]
    rejected: list[int]
    num_chosen: int  # tokens of the answer alone, as far as they are left
    num_rejected: int


def eval_reward(cfg: config.EvalRewardConfig) -> "Health":
    """Prints the page, writes `output`; reads and checks the pairs before torch is imported."""
    check_output(cfg)
    rows, pairs = held_out_pairs(cfg)
    field = subset_field([pair.meta for pair in pairs], cfg.subset_field)
    from rich.console import Console

    from kinkajou.evals.reward_findings import findings
    from kinkajou.evals.reward_health import health
    from kinkajou.evals.reward_page import page

    console = Console(highlight=False)
    scored, stable, cut = score_pairs(cfg, pairs, field, console)
    numbers = health(scored)
    found = findings(numbers, stable, cut=cut, trained_on=trained_on(cfg))
    for block in page(numbers, stable, found):
        console.print(block)
    if cfg.output:
        result = {
            "model": cfg.base.model,
            "data": cfg.source.eval_data or cfg.source.data,
            "sha256": rows.sha256,
            "subset_field": field,
            "cut": cut,
            **dataclasses.asdict(numbers),
            "stability": dataclasses.asdict(stable),
            "findings": [dataclasses.asdict(item) for item in found],
        }
        write_json(Path(cfg.output), result)
        console.print(f"written: {cfg.output}", markup=False)
    return numbers


# --- before the model -------------------------------------------------------------------------------------


def check_output(cfg: config.EvalRewardConfig) -> None:
    if cfg.output is None:
        return
    path = Path(cfg.output)
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"lies in {path.parent}, which does not exist"
        raise UserError(f"--output {path} {what}", fix="name a file in a folder that is there")
    if path.exists() and not cfg.overwrite:
        raise UserError(f"{path} is already there", fix="choose another --output, or pass --overwrite to replace it")


def held_out_pairs(cfg: config.EvalRewardConfig) -> tuple[Rows[Pair], Sequence[Pair]]:
    """`eval_data` if it is given, else the share of `data` that a run with the same settings held out, else all."""
    source = cfg.source
    file = source.eval_data or source.data
    max_rows = None if source.eval_data else source.max_rows  # as in training
    rows = read_pairs(file, subset=source.subset, max_rows=max_rows, bad_rows=source.bad_rows)
    pairs = told(rows)
    if source.eval_data or not source.eval_share:
        return rows, pairs
    _, held = hold_out(len(pairs), source.eval_share, cfg.seed)
    return rows, [pairs[i] for i in held]


def subset_field(metas: Sequence[Any], wanted: str | None) -> str | None:
    """The field whose values name subsets; None if the records have none."""
    present = Counter(name for meta in metas for name in meta)
    if wanted is None:
        return next((name for name in SUBSET_FIELDS if name in present), None)
    if wanted not in present:
        known = [name for name, _ in present.most_common(12)]
        fix = did_you_mean(wanted, known) if known else "leave --subset_field out: the pairs have no other fields"
        raise UserError(f"no pair has the field {wanted!r} of --subset_field", fix=fix)
    return wanted


def trained_on(cfg: config.EvalRewardConfig) -> str:
    """Evidence that a run was trained on these pairs, "" if there is none in its folder."""
    folder = Path(cfg.base.model)
    recipes = [place / "config.toml" for place in (folder, folder.parent.parent)]
    recipe = next((path for path in recipes if path.is_file()), None)
    run = config.read_recipe(recipe).get("reward") if recipe else None
    source = cfg.source
    if not run or os.path.realpath(str(run.get("data"))) != os.path.realpath(source.eval_data or source.data):
        return ""
    mine = {"eval_data": source.eval_data, "eval_share": source.eval_share, "seed": cfg.seed}
    mine |= {name: getattr(source, name) for name in ("subset", "max_rows", "bad_rows")}
    if source.eval_share and all(run.get(name) == value for name, value in mine.items()):
        return ""
    asked = ", ".join(f"{name} {run[name]}" for name in ("eval_share", "seed") if name in run)
    return f"{recipe} names the same file as its training data ({asked})"


# --- through the model ------------------------------------------------------------------------------------


def score_pairs(
    cfg: config.EvalRewardConfig, pairs: Sequence[Pair], field: str | None, console: Any
) -> "tuple[list[ScoredPair], Stability, float]":
    """Every pair with its scores; how stable they are; the share of pairs that were cut."""
    import torch
    from rich.progress import Progress

    from kinkajou.batch import TokenBatch
    from kinkajou.evals.reward_scores import score_rows, spread_rows, stability
    from kinkajou.models.load import find_model, load_scalar_model
    from kinkajou.models.presets import PRESETS
    from kinkajou.train import setup

    if cfg.base.model in PRESETS:
        raise UserError(f"--model {cfg.base.model} is untrained", fix="give a trained one: kinkajou reward")
    say = partial(console.print, markup=False)
    form = setup.load_format(cfg.base, (), say)
    encoded, cut = encode(pairs, form, cfg.base.max_len, say)
    options = setup.load_options(cfg.base, 0)
    model = load_scalar_model(find_model(cfg.base.model), form.tokenizer, options, fresh=False)
    setup.check_context(model, max(len(side) for row in encoded for side in (row.chosen, row.rejected)))
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def scorer(batch: TokenBatch) -> torch.Tensor:
        batch = batch.to(model.device)
        return model(batch.tokens, batch.mask, at="end")  # type: ignore[no-any-return]

    rows = [side for row in encoded for side in (row.chosen, row.rejected)]
    scores: list[float] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("scores", total=len(rows))
        for part in score_rows(scorer, rows, pad_id=form.pad_id, budget=cfg.tokens_per_microbatch):
            scores += part
            progress.update(task, completed=len(scores))
    refuse_nan(encoded, scores)
    stable = stability(scorer, spread_rows(rows, ANSWERS_TRIED), pad_id=form.pad_id)
    return scored_pairs(encoded, scores, field), stable, cut


def encode(pairs: Sequence[Pair], form: "ChatFormat", max_len: int, say: Any) -> tuple[list[EncodedPair], float]:
    """Pairs as tokens, cut at the beginning as in training, and the share that was cut.

    Pairs whose sides are then the same are left out and counted.
    """
    rows: list[EncodedPair] = []
    num_cut = 0
    for pair in pairs:
        chosen, rejected = form.pair(pair)
        before = len(form.prompt(pair.prompt))
        num_cut += max(len(chosen), len(rejected)) > max_len
        said = [min(len(side) - before, max_len) for side in (chosen, rejected)]
        if chosen[-max_len:] != rejected[-max_len:]:
            rows.append(EncodedPair(pair, chosen[-max_len:], rejected[-max_len:], *said))
    if num_cut:
        say(f"note: {num_cut} of {len(pairs)} pairs are longer than {max_len} tokens and lost their beginning")
    if len(rows) < len(pairs):
        say(f"note: {len(pairs) - len(rows)} of {len(pairs)} pairs have the same tokens on both sides: left out")
    if not rows:
        raise UserError("no pair has two different answers in tokens", fix="raise --max_len, or look at the data")
    return rows, num_cut / len(pairs)


def refuse_nan(rows: Sequence[EncodedPair], scores: Sequence[float]) -> None:
    for i, score in enumerate(scores):
        if not math.isfinite(score):
            side = "rejected" if i % 2 else "chosen"
            raise UserError(
                "the reward model gives a score that is no number",
                evidence=f"{rows[i // 2].pair.place}, {side}: {score}",
                fix="look at its weights for NaN; with --dtype bf16 try fp32",
                exit_code=3,
            )


def scored_pairs(rows: Sequence[EncodedPair], scores: Sequence[float], field: str | None) -> "list[ScoredPair]":
    from kinkajou.evals.reward_health import ScoredAnswer, ScoredPair

    def answer(messages: Any, tokens: int, score: float) -> ScoredAnswer:
        return ScoredAnswer("\n\n".join(m.content for m in messages if m.role == "assistant"), tokens, score)

    return [
        ScoredPair(
            answer(row.pair.chosen, row.num_chosen, good),
            answer(row.pair.rejected, row.num_rejected, bad),
            str(row.pair.meta.get(field, NO_SUBSET)) if field else "",
        )
        for row, good, bad in zip(rows, scores[::2], scores[1::2], strict=True)
    ]


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as fault:
        raise UserError(f"{path} cannot be written", evidence=fault.strerror or "", exit_code=4) from None
