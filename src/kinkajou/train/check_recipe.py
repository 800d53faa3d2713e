"""`kinkajou check`: everything preflight knows about a recipe, without a run."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kinkajou import config
from kinkajou.data import preflight as checks
from kinkajou.data.chat import ChatFormat, Encoded
from kinkajou.data.preflight import Record, share
from kinkajou.data.sources import Judged, Pair
from kinkajou.errors import UserError
from kinkajou.findings import Finding
from kinkajou.models.adapters import adapter_base
from kinkajou.models.load import find_model, read_config
from kinkajou.rewards.load import load_reward_model
from kinkajou.rewards.specs import parse_specs
from kinkajou.train import check_page, preflight, setup
from kinkajou.train.inputs import Inputs, RLInputs
from kinkajou.train.preference_rows import cut_to_fit

CHATS_LOOKED_AT = 500
MOST_CHARACTERS = 4_000_000
"""Tokenised in three to four seconds by one core."""


@dataclass(frozen=True)
class Sequences:
    """What the training records become."""

    rows: list[Encoded]  # as they are trained on, those of one record after one another
    lengths: list[int]  # of all sequences, before anything is cut
    per_record: int
    scale: float = 1.0  # training records for each one that was tokenised

    @property
    def lost(self) -> int:
        return len(self.lengths) - len(self.rows)


def check(cfg: config.StageConfig, show: config.CheckConfig, inputs: Inputs[Any] | RLInputs) -> None:
    """Prints the page; a `UserError` at its end if a check failed."""
    console = check_page.console_of(show.colour)
    records = preflight.train_records(inputs)
    say: Callable[[str], None] = lambda text: console.print(text, markup=False)  # noqa: E731
    form = setup.load_format(cfg.base, setup.texts_of(messages_of(record) for record in records), say)
    found = [*of_output(cfg), *checks.template(records, form, most=CHATS_LOOKED_AT)]
    sequences = None
    if all(item.level != "error" for item in found if item.name == "turns"):
        picked = records if show.whole else within_budget(records)
        sequences = dataclasses.replace(encode(cfg, picked, form), scale=len(records) / len(picked))
        found += of_sequences(cfg, sequences, form)
    found += preflight.of_records(inputs, form)
    if sequences:
        for block in check_page.tokens_shown(records, sequences.rows, form, console, num_shown=show.num_shown):
            console.print(block)
        for block in check_page.lengths_shown(sequences.lengths):
            console.print(block)
    for block in check_page.findings_shown(found):
        console.print(block)
    failed = [item for item in found if item.level == "error"]
    if failed:
        preflight.refuse(failed, hint="then check again")


def within_budget(records: Sequence[Record]) -> Sequence[Record]:
    """Few enough records, evenly picked, to tokenise in seconds."""
    total = sum(len(message.content) for record in records for message in messages_of(record))
    return checks.spread(records, max(1, len(records) * MOST_CHARACTERS // max(total, MOST_CHARACTERS)))


def messages_of(record: Record) -> Sequence[Any]:
    return [*checks.prompt_of(record), *(m for answer in checks.answers_of(record) for m in answer)]


def of_output(cfg: config.StageConfig) -> list[Finding]:
    folder = Path(cfg.run.output)
    if cfg.run.output == config.NO_OUTPUT or not (folder / "config.toml").is_file() or cfg.run.overwrite:
        return []
    action = "choose another --output, or pass --overwrite to delete that run"
    return [Finding("output", "the output folder already holds a run", f"{folder}", action)]


def of_sequences(cfg: config.StageConfig, sequences: Sequences, form: ChatFormat) -> Iterator[Finding]:
    rows, lengths, model = sequences.rows, sequences.lengths, read_settings(cfg, form)
    if sequences.scale != 1:
        looked = len(lengths) // sequences.per_record
        evidence = f"{share(looked, round(looked * sequences.scale))} records are tokenised, evenly picked"
        cause = "large data is looked at in part, and the counts below are of that"
        yield Finding("records", cause, evidence, "--whole looks at all", "note")
    yield checks.lengths_told(lengths)
    if isinstance(cfg, config.PPOConfig | config.GRPOConfig):
        fitting = [n for n in lengths if n + cfg.rollout.max_new_tokens <= cfg.base.max_len]
        longest = max(fitting, default=0) + cfg.rollout.max_new_tokens
        yield preflight.room(cfg, lengths)
    else:
        longest = max((len(row.tokens) for row in rows), default=0)
        yield checks.cut(lengths, cfg.base.max_len, side=preflight.cut_side(cfg), positions=model.positions)
    yield from preflight.of_rows(cfg, form, rows, lost=sequences.lost)
    yield checks.vocabulary(form, rows=model.rows, model_ends=model.end_ids)
    yield checks.context(longest, max_len=cfg.base.max_len, positions=model.positions)
    if isinstance(cfg, config.PPOConfig | config.GRPOConfig):
        yield from of_judges(cfg, rows, form)
        prompts = round(len(fitting) * sequences.scale)
        yield preflight.rl_steps(cfg, prompts, sum(fitting) / max(1, len(fitting)))
    else:
        yield preflight.offline_steps(cfg, len(rows) // sequences.per_record, rows, scale=sequences.scale)


@dataclass(frozen=True)
class Settings:
    """What a model's settings say; its weights are not read."""

    rows: int  # of the embedding
    positions: int | None
    end_ids: frozenset[int]


def read_settings(cfg: config.StageConfig, form: ChatFormat) -> Settings:
    source = find_model(cfg.base.model)
    read: Any = read_config(adapter_base(source) or source, form.tokenizer, setup.load_options(cfg.base, 0))
    text, ends = read.get_text_config(), read.eos_token_id
    end_ids = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return Settings(text.vocab_size, getattr(text, "max_position_embeddings", None), end_ids)


def of_judges(cfg: config.RLConfig, rows: Sequence[Encoded], form: ChatFormat) -> list[Finding]:
    """Every reward model among the judges is loaded and asked."""
    specs = parse_specs(cfg.judge.reward) + (parse_specs([cfg.judge.gold]) if cfg.judge.gold else [])
    folders = dict.fromkeys(
        folder for spec in specs if spec.kind in ("model", "ensemble") for folder in spec.body.split(",")
    )
    try:
        models = [load_reward_model(folder, form.tokenizer, cfg.base.dtype, nn.Module.cpu) for folder in folders]
    except UserError as fault:
        return [Finding("reward_scores", fault.problem, fault.evidence, fault.fix, "error")]
    return [preflight.scores_told(models, rows, form)] if models else []


# --- records to sequences ---------------------------------------------------------------------------------


def encode(cfg: config.StageConfig, records: Sequence[Any], form: ChatFormat) -> Sequences:
    """As the stage's trainer does it, but with what it cuts and drops counted."""
    match cfg:
        case config.SFTConfig():
            return encode_chats(form.conversations(record.messages for record in records), cfg.base.max_len)
        case config.RewardConfig():
            return encode_sides(records, form, lambda lead, answer, _: last(lead, answer, cfg.base.max_len))
        case config.PreferConfig() if cfg.method.reads == "judged":
            return encode_judged(records, form, cfg.base.max_len)
        case config.PreferConfig():
            return encode_sides(
                records, form, lambda lead, answer, longest: cut_to_fit(lead, answer, cfg.base.max_len, longest=longest)
            )
    prompts = form.prompts(record.messages for record in records)
    return Sequences(preflight.uncounted(prompts), [len(row) for row in prompts], 1)


def encode_chats(rows: Sequence[Encoded], max_len: int) -> Sequences:
    kept = [Encoded(row.tokens[:max_len], row.counts[:max_len]) for row in rows]
    return Sequences([row for row in kept if any(row.counts[1:])], [len(row.tokens) for row in rows], 1)


def encode_sides(
    pairs: Sequence[Pair], form: ChatFormat, cut: Callable[[list[int], Encoded, int], Encoded]
) -> Sequences:
    sides = form.all_answered((pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected))
    rows = list[Encoded]()
    for good, bad in zip(sides[::2], sides[1::2], strict=True):
        longest = max(len(good[1].tokens), len(bad[1].tokens))
        both = [cut(*good, longest), cut(*bad, longest)]
        rows += both if both[0].tokens != both[1].tokens else []
    return Sequences(rows, [len(lead) + len(answer.tokens) for lead, answer in sides], 2)


def last(lead: list[int], answer: Encoded, max_len: int) -> Encoded:
    """A pair of the reward model loses its beginning."""
    tokens, counts = [*lead, *answer.tokens], [False] * len(lead) + answer.counts
    return Encoded(tokens[-max_len:], counts[-max_len:])


def encode_judged(records: Sequence[Pair | Judged], form: ChatFormat, max_len: int) -> Sequences:
    asked = ((record.prompt, answer) for record in records for answer in checks.answers_of(record))
    sides = form.all_answered(asked)
    return Sequences(
        [cut_to_fit(lead, answer, max_len) for lead, answer in sides],
        [len(lead) + len(answer.tokens) for lead, answer in sides],
        1,
    )
