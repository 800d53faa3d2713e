"""What a model says as a terminal gets it: stand-ins, rows, columns."""

import os
import re
import unicodedata

import pytest
from rich.cells import cell_len
from teletype import screen as left_on_screen

from kinkajou.chat.screen import Column, Columns, Screen, safe

BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def test_no_control_character_gets_through() -> None:
    """Every character of Unicode that is a control, a surrogate, a separator of lines or turns the direction."""
    everything = list(map(chr, range(0x110000)))
    kinds = ("Cc", "Cs", "Zl", "Zp")
    moving = {x for x in everything if unicodedata.category(x) in kinds} - {"\n", "\t"}
    turning = {x for x in everything if unicodedata.bidirectional(x) in BIDI}
    assert (len(moving), len(turning)) == (63 + 2048 + 2, 9)
    assert not (moving | turning) & set(safe("".join(everything)))
    assert safe("a\x1b[2J\r\x07\x7f\x9b\u202eb") == "a␛[2J␍␇␡\\x9b\\u202eb"
    assert safe("é 👩\u200d🚀\n\tق") == "é 👩\u200d🚀\n\tق"


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("one two three", ["one two", "three"]),
        ("onetwothreefour", ["onetwoth", "reefour"]),
        ("a\n\nb", ["a", "", "b"]),
        ("中中中中中", ["中中中中", "中"]),  # two cells each
        ("one two\nthree", ["one two", "three"]),
        ("12345678", ["12345678"]),
        ("12345678 9", ["12345678", "9"]),
        ("a\tb", ["a    b"]),
        ("", []),
    ],
)
def test_rows_of_a_column(text: str, rows: list[str]) -> None:
    """However the text is cut into pieces."""
    for size in (1, 3, 100):
        column = Column(8)
        for i in range(0, len(text), size):
            column.add(text[i : i + size])
        column.finish()
        assert column.rows == rows
    assert all(cell_len(column.row(i)) == 8 for i in range(len(rows) + 1))


def test_marks_without_end_are_cut() -> None:
    column = Column(8)
    for _ in range(1000):
        column.add("\u0301")
    assert len(column.tail) <= 64


@pytest.mark.parametrize("lines", [4, 50])
def test_columns_leave_both_texts_whole(lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    """One far ahead of the other, on a terminal of few lines and of many."""
    left, right = [f"l{i}" for i in range(30)], [f"r{i}" for i in range(40)]
    columns = Columns(Screen(), os.terminal_size((21, lines)), ["1: x", "2: y"])
    for i in range(30):
        columns.add(0, f"{left[i]}\n")
        columns.due = 0  # draws each time
        if i % 10 == 0:
            columns.add(1, f"{right[i // 10]}\n")
    columns.finish(0)
    for row in right[3:]:
        columns.add(1, f"{row}\n")
        columns.due = 0
    columns.finish(1)
    rows = left_on_screen(capsys.readouterr().out).rstrip("\n").split("\n")
    assert rows[0] == "1: x     │ 2: y"
    cells = [[cell.strip() for cell in row.split("│")] for row in rows[1:]]
    assert cells == [[left[i] if i < 30 else "", right[i]] for i in range(40)]


def test_columns_never_go_back_further_than_the_terminal_has_lines(capsys: pytest.CaptureFixture[str]) -> None:
    columns = Columns(Screen(), os.terminal_size((21, 6)), ["1", "2"])
    for i in range(30):
        columns.due = 0
        columns.add(0, f"l{i}\n")
    columns.finish(0)
    columns.finish(1)
    assert max(map(int, re.findall(r"\x1b\[(\d+)F", capsys.readouterr().out))) == 4
