"""What the gate reads: held-out text of a file, or what the original says itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinkajou.config import QuantizeConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.containers import faults_named
from kinkajou.data.sources import read_chats, read_pairs, read_prompts
from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel, PackedModel
from kinkajou.quant.gate import own_text

LENGTH, PROMPTS, CALIBRATION = 256, 16, 32_768
LETTERS, SPARE = 8, 64
"""Of a long text so many characters are read for each token that is wanted, until there are so many tokens more."""


@dataclass(frozen=True)
class Text:
    rows: list[list[int]]
    prompts: list[list[int]]
    told: str
    """Where it is from."""
    room: int
    """Tokens that an answer to any prompt has room for, 64 at most."""


@dataclass(frozen=True)
class Read:
    rows: list[list[int]]
    prompts: list[list[int]]
    cut: bool
    """Whether the source holds more."""

    def told(self, source: str) -> str:
        count = f"{sum(map(len, self.rows)):,} tokens of {Path(source).name}"
        return f"the first {count}" if self.cut else count


def gate_text(cfg: QuantizeConfig, form: ChatFormat, model: PackedModel) -> Text:
    """At most `gate_tokens` tokens in rows of at most 256."""
    length = row_length(model)
    prompts: list[list[int]] = []
    if cfg.data:
        found = read_rows(cfg.data, form, length, cfg.gate_tokens)
        rows, prompts, told = found.rows, found.prompts, found.told(cfg.data)
    elif isinstance(model, LanguageModel):
        print("note: no --data: the gate reads what the original says itself; held-out text tells more")
        rows = bounded(own_text(model, form, tokens=cfg.gate_tokens, length=length, seed=cfg.seed), cfg.gate_tokens)
        told = f"{sum(map(len, rows)):,} tokens of text of its own"
    else:
        raise UserError("a reward model has nothing to say by itself", fix="--data FILE with held-out records")
    prompts = (prompts or [row[: max(1, min(32, len(row) // 2))] for row in rows])[:PROMPTS]
    room = min(64, length_limit(model) - max(map(len, prompts)))
    if room < 8:
        prompts, room = [prompt[-(length // 2) :] for prompt in prompts], length // 2
    return Text(rows, prompts, told, min(64, room))


def check_texts(cfg: QuantizeConfig) -> None:
    if cfg.calibrate and cfg.data and Path(cfg.calibrate).resolve() == Path(cfg.data).resolve():
        raise UserError(
            "the gate must not read the text that the weights were fitted to", fix="two files: --calibrate and --data"
        )


def calibration_rows(cfg: QuantizeConfig, form: ChatFormat, model: PackedModel) -> list[list[int]]:
    found = read_rows(cfg.calibrate, form, row_length(model), CALIBRATION)
    print(f"the rounding is fitted to {found.told(cfg.calibrate)}")
    return found.rows


def length_limit(model: PackedModel) -> int:
    return int(getattr(model.inner.config, "max_position_embeddings", None) or 4096)


def row_length(model: PackedModel) -> int:
    return min(LENGTH, length_limit(model))


def bounded(rows: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """The first rows, `tokens` tokens together."""
    found: list[list[int]] = []
    for row in rows:
        if tokens < 2:
            break
        found.append(row[:tokens])
        tokens -= len(found[-1])
    return found


def read_rows(source: str, form: ChatFormat, length: int, tokens: int) -> Read:
    """Rows of 2 to `length` tokens, `tokens` together, and the prompts of records; UserError where it has none."""
    prompts: list[list[int]] = []
    more = False
    if source.endswith(".txt"):
        ids, more = first_tokens(Path(source), form, tokens)
        rows = [ids[i : i + length] for i in range(0, len(ids), length)]
    else:
        rows, prompts = of_records(source, form, tokens)
        rows, prompts = [row[:length] for row in rows], [prompt for prompt in prompts if len(prompt) <= length // 2]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise UserError(f"{source} holds no text to compare models on", fix="give a file with more in it")
    used = bounded(rows, tokens)
    return Read(used, prompts, more or sum(map(len, used)) < sum(map(len, rows)))


def first_tokens(path: Path, form: ChatFormat, wanted: int) -> tuple[list[int], bool]:
    """The first tokens of a text, and whether it has more; of a long one no more is read than that takes."""
    if not path.is_file():
        raise UserError(f"{path}: no such file", fix="correct the path")
    text, size = "", LETTERS * wanted
    with faults_named(str(path)), path.open(encoding="utf-8") as file:
        while True:
            try:
                fresh = file.read(size)
            except UnicodeDecodeError:
                raise UserError(f"{path} is not UTF-8") from None
            text, ended = text + fresh, len(fresh) < size
            ids = list(form.tokenizer(text, verbose=False)["input_ids"])
            # The last tokens before a cut may be others than those of the whole text.
            if ended or len(ids) >= wanted + SPARE:
                return ids[:wanted], len(ids) > wanted
            size = len(text)


def of_records(source: str, form: ChatFormat, most: int) -> tuple[list[list[int]], list[list[int]]]:
    """Chats, pairs (what was chosen) or prompts, whichever the first `most` records are; else the fault of chats."""

    def chats() -> Any:
        found = [chat.messages for chat in read_chats(source, max_rows=most).rows]
        asked = [m[:-1] for m in found if m[0].role != "text" and len(m) > 1]
        return [row.tokens for row in form.conversations(found)], form.prompts(asked)

    def pairs() -> Any:
        found = read_pairs(source, max_rows=most).rows
        return [chosen for chosen, _ in form.pairs(found)], form.prompts(pair.prompt for pair in found)

    def prompts() -> Any:
        asked = form.prompts(prompt.messages for prompt in read_prompts(source, max_rows=most).rows)
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
