"""Headings and bare tables of what a terminal is shown."""

from rich.table import Table
from rich.text import Text


def head(words: str) -> Text:
    return Text(f"\n{words}", "bold")


def grid(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    return table
