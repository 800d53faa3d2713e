"""The page of `kinkajou check`: trained tokens, lengths, findings."""

from collections.abc import Iterator, Sequence
from typing import Literal

from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from kinkajou.data.chat import ChatFormat, Encoded
from kinkajou.data.preflight import Record, answers_of, histogram, stretches
from kinkajou.findings import Finding

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
TRAINED, UNTRAINED = "black on green", "dim"
HEAD, TAIL = 600, 300
"""Characters shown of a longer stretch, from its beginning and its end."""
BAR = 40


def console_of(colour: Literal["auto", "always", "never"]) -> Console:
    if colour == "always":
        return Console(highlight=False, force_terminal=True, color_system="standard", no_color=False)
    return Console(highlight=False, no_color=True if colour == "never" else None)


def tokens_shown(
    records: Sequence[Record], rows: Sequence[Encoded], form: ChatFormat, console: Console, *, num_shown: int
) -> Iterator[RenderableType]:
    """The first records token by token."""
    per_record = max(1, len(answers_of(records[0]))) if records else 1
    chosen = rows[: num_shown * per_record]
    if not chosen:
        return
    coloured = console.is_terminal and not console.no_color
    yield Rule("Which tokens are trained", style="none", align="left")
    legend = Text("trained tokens: ")
    legend.append_text(trained("like this", coloured))
    yield legend if any(any(row.counts) for row in chosen) else Text("prompts: nothing in them is trained", style="dim")
    for number, row in enumerate(chosen):
        side = f", {('chosen', 'rejected')[number % 2]}" if per_record == 2 else ""
        yield Text(
            f"\nsequence {number // per_record + 1}{side}: {len(row.tokens):,} tokens, {sum(row.counts):,} trained"
        )
        yield row_shown(row, form, coloured)


def row_shown(row: Encoded, form: ChatFormat, coloured: bool) -> Text:
    """Its text, control tokens included, with what counts in colour or in brackets."""
    text, done = Text(), 0
    for start, end in [*stretches(row), (len(row.tokens), len(row.tokens))]:
        for tokens, said in ((row.tokens[done:start], False), (row.tokens[start:end], True)):
            words = printable(str(form.tokenizer.decode(tokens)))
            if tokens:
                text.append_text(trained(words, coloured) if said else Text(words, UNTRAINED if coloured else ""))
        done = end
    return text


def trained(words: str, coloured: bool) -> Text:
    return Text(words, TRAINED) if coloured else Text(f"[{words}]")


def printable(words: str) -> str:
    """What a terminal shows as it is: other control characters escaped, the middle of long text left out."""
    if len(words) > HEAD + TAIL:
        words = f"{words[:HEAD]} ... {len(words) - HEAD - TAIL:,} characters ... {words[-TAIL:]}"
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in words)


def lengths_shown(lengths: Sequence[int]) -> Iterator[RenderableType]:
    if not lengths:
        return
    yield Text()
    yield Rule("Tokens a sequence, before anything is cut", style="none", align="left")
    bins = histogram(lengths)
    most = max(count for _, _, count in bins)
    table = Table.grid(padding=(0, 1))
    for _ in range(2):
        table.add_column(justify="right")
    for low, high, count in bins:
        table.add_row(f"{low:,} to {high:,}", f"{count:,}", "#" * -(-BAR * count // most))
    yield table


def findings_shown(found: Sequence[Finding]) -> Iterator[RenderableType]:
    yield Text()
    yield Rule("Checks", style="none", align="left")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for item in found:
        said = item.evidence if item.level == "ok" else f"{item.cause}\n{item.details}"
        table.add_row(Text(item.level, STYLES[item.level]), item.name, Text(said))
    yield table
    counts = ", ".join(f"{level} {sum(item.level == level for item in found)}" for level in STYLES)
    yield Text(f"\n{len(found)} checks: {counts}")
