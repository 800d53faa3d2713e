"""What the gate reads: held-out text of a file, or what the original says itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinkajou.config import QuantizeConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.sources import read_chats, read_pairs, read_prompts
from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel, PackedModel
from kinkajou.quant.gate import own_text

LENGTH, PROMPTS, CALIBRATION = 256, 16, 32_768


@dataclass(frozen=True)
class Text:
    rows: list[list[int]]
    prompts: list[list[int]]
    told: str
    """Where it is from."""
    room: int
    """Tokens that an answer to any prompt has room for, 64 at most."""


def gate_text(cfg: QuantizeConfig, form: ChatFormat, model: PackedModel) -> Text:
    """At most `gate_tokens` tokens in rows of at most 256."""
    length = row_length(model)
    if cfg.data:
        rows, prompts = read_rows(cfg.data, form, length)
        told = Path(cfg.data).name
    elif isinstance(model, LanguageModel):
        rows = own_text(model, form, tokens=cfg.gate_tokens, length=length, seed=cfg.seed)
        prompts, told = [], "text of its own"
        print("note: no --data: the gate reads what the original says itself; held-out text tells more")
    else:
        raise UserError("a reward model has nothing to say by itself", fix="--data FILE with held-out records")
    rows = bounded(rows, cfg.gate_tokens)
    prompts = (prompts or [row[: max(1, min(32, len(row) // 2))] for row in rows])[:PROMPTS]
    room = min(64, length_limit(model) - max(map(len, prompts)))
    if room < 8:
        prompts, room = [prompt[-(length // 2) :] for prompt in prompts], length // 2
    return Text(rows, prompts, f"{sum(map(len, rows)):,} tokens of {told}", min(64, room))


def calibration_rows(cfg: QuantizeConfig, form: ChatFormat, model: PackedModel) -> list[list[int]]:
    if Path(cfg.calibrate).resolve() == Path(cfg.data or ".").resolve():
        raise UserError(
            "the gate must not read the text that the weights were fitted to", fix="two files: --calibrate and --data"
        )
    rows, _ = read_rows(cfg.calibrate, form, row_length(model))
    return bounded(rows, CALIBRATION)


def length_limit(model: PackedModel) -> int:
    return int(getattr(model.inner.config, "max_position_embeddings", None) or 4096)


def row_length(model: PackedModel) -> int:
    return min(LENGTH, length_limit(model))


def bounded(rows: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """The first rows, `tokens` tokens together."""
    found: list[list[int]] = []
    for row in rows:
        left = tokens - sum(map(len, found))
        if left < 2:
            break
        found.append(row[:left])
    return found


def read_rows(source: str, form: ChatFormat, length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of 2 to `length` tokens, and the prompts of records; UserError where the source has none."""
    if source.endswith(".txt"):
        path = Path(source)
        if not path.is_file():
            raise UserError(f"{source}: no such file", fix="correct the path")
        try:
            ids = form.tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        except UnicodeDecodeError:
            raise UserError(f"{source} is not UTF-8") from None
        rows = [list(ids[i : i + length]) for i in range(0, len(ids), length)]
        prompts: list[list[int]] = []
    else:
        rows, prompts = of_records(source, form)
        rows, prompts = [row[:length] for row in rows], [prompt for prompt in prompts if len(prompt) <= length // 2]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise UserError(f"{source} holds no text to compare models on", fix="give a file with more in it")
    return rows, prompts


def of_records(source: str, form: ChatFormat) -> tuple[list[list[int]], list[list[int]]]:
    """Chats, pairs (what was chosen) or prompts, whichever the records are; the fault of chats where they are none."""

    def chats() -> Any:
        found = [chat.messages for chat in read_chats(source).rows]
        asked = [m[:-1] for m in found if m[0].role != "text" and len(m) > 1]
        return [row.tokens for row in form.conversations(found)], form.prompts(asked)

    def pairs() -> Any:
        found = read_pairs(source).rows
        return [chosen for chosen, _ in form.pairs(found)], form.prompts(pair.prompt for pair in found)

    def prompts() -> Any:
        asked = form.prompts(prompt.messages for prompt in read_prompts(source).rows)
        return asked, asked

    first: UserError | None = None
    readers: tuple[Callable[[], Any], ...] = (pairs, chats, prompts)
    for read in readers:
        try:
            rows, asked = read()
            return rows, asked
        except UserError as fault:
            first = fault if read is chats else first or fault
    assert first is not None
    raise first
