"""What a model says as a terminal gets it: stand-ins, rows, columns."""

import os
import re
import time
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


IGNORABLE = [
    *((0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F)),
    *((0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF)),
    *((0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)),
]
"""Default_Ignorable_Code_Point of Unicode 16 (DerivedCoreProperties.txt): what a font draws as nothing."""
NEEDED = {0x34F, *range(0x180B, 0x1810), 0x200B, 0x200C, 0x200D, *range(0xFE00, 0xFE10)}
"""By writing of today: joining, breaking and choosing shapes."""


def test_text_that_nobody_would_see_is_shown() -> None:
    """All that is drawn as nothing, but what languages and emoji are written with."""
    everything = {code for first, last in IGNORABLE for code in range(first, last + 1)}
    assert {code for code in everything if safe(chr(code)) == chr(code)} == NEEDED
    assert safe("a\u00adb\ufeffc\U000e0141") == r"a\xadb\ufeffc\U000e0141"
    persian, khmer, mongolian = "\u0645\u06cc\u200c\u0634\u0648\u062f", "ភាសា\u200bខ្មែរ", "ᠪᠣᠯᠤᠨ\u180e\u1820"
    for text in ("नमस्ते", persian, khmer, mongolian, "❤\ufe0f\u200d🔥", "☎\ufe0e", "1\ufe0f\u20e3"):
        assert safe(text) == text


@pytest.mark.parametrize(
    "text",
    ["❤️" * 60, "1️⃣" * 40, "👨\u200d👩\u200d👧" * 30, "🇩🇪" * 30, "é" * 50, "नमस्ते" * 20, "❤️ ab " * 20, "a❤️" * 30],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_no_row_is_wider_than_its_column(text: str, size: int) -> None:
    """Also where a mark makes the letter before it wider, which no row begins with."""
    column, whole = Column(20), Column(20)
    for i in range(0, len(text), size):
        column.add(text[i : i + size])
    whole.add(text)
    for one in (column, whole):
        one.finish()
    assert column.rows == whole.rows
    assert all(14 <= cell_len(row) <= 20 for row in column.rows[:-1])
    assert all(cell_len(column.row(i)) == 20 for i in range(len(column.rows)))
    assert "".join(column.rows).replace(" ", "") == text.replace(" ", "")
    assert not any(row[0] in "\ufe0f\u200d\u20e3" or row.endswith("\u200d") for row in column.rows)


def test_long_texts_are_broken_into_rows_quickly() -> None:
    column, began = Column(60), time.process_time()
    for _ in range(4000):
        column.add("❤️ 中")
    assert time.process_time() - began < 5


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
