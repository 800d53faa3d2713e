"""The growth benchmark: what is read off figures, the drawing, and a point that is really measured."""

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from benchmarks.drawing import Line, Panel, figure
from benchmarks.growth import points
from benchmarks.growth_page import change, straight, write
from benchmarks.growth_points import Measured, Point, as_row, from_row, measure

MB = 2**20


def test_a_line_is_found() -> None:
    """By hand: through (1, 5) and (3, 9) goes 3 + 2 x; a third point off it changes the line and its worst error."""
    line = straight([(1, 5), (3, 9)])
    assert line.start == pytest.approx(3)
    assert line.slope == pytest.approx(2)
    assert line.worst == pytest.approx(0, abs=1e-12)
    points = [(1.0, 5.0), (3.0, 9.0), (4.0, 14.0)]
    line = straight(points)

    def loss(start: float, slope: float) -> float:
        return sum(((start + slope * x) / y - 1) ** 2 for x, y in points)

    around = [(a, b) for a in (-0.01, 0, 0.01) for b in (-0.01, 0, 0.01) if a or b]
    assert all(loss(line.start, line.slope) < loss(line.start + a, line.slope + b) for a, b in around)
    assert line.worst == pytest.approx(max(abs((line.start + line.slope * x) / y - 1) for x, y in points))


def test_change_in_words() -> None:
    assert change([(1, 100), (2, 250)], "us") == "goes from 100 to 250 us (2.5-fold)"
    assert change([(1, 100), (2, 900), (3, 104)], "MB") == "stays within 10 % (100 and 104 MB)"


def figures(point: Point) -> Measured:
    """A machine whose step takes 100 us + 50 ns x length a token and 12 ns for each entry; memory 300 MB."""
    if point.new:
        seconds, tokens = point.rows * point.new * 8e-3 / point.slots, point.rows * point.new
    else:
        tokens = point.rows * point.length
        seconds = tokens * (100e-6 + 50e-9 * point.length + 12e-9 * point.vocabulary)
    return Measured([seconds, 0.9 * seconds, 5 * seconds], tokens, 3_000_000, 200 * MB, 500 * MB)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    rows = [as_row(point, figures(point)) for point in points(quick=False)]
    machine = {"cpu": "a processor", "memory_gb": 24.0}
    about = {"when": "2026-01-02T00:00:00", "commit": "abc", "machine": machine, "versions": {"torch": "2"}}
    found: dict[str, Any] = about | {"settings": {"repetitions": 3, "threads": 2, "priority": "raised"}}
    write(found | {"points": rows}, tmp_path)
    return tmp_path


def test_the_page_says_what_the_figures_say(page: Path) -> None:
    """a is 100 + 12 x 8.192 us, b 50 ns, so both are equal at 198.304 / 0.05 tokens; 120 us for 10,000 entries."""
    text = " ".join((page / "growth.md").read_text().split())
    assert "a = 198 us and b = 50.0 ns" in text
    assert "as all the rest at 3,966 tokens" in text
    assert "between 300 and 300 MB" in text
    assert "120 us for each 10,000 entries" in text
    assert f"{1024 * 250880 * 4 / MB:,.0f} MB there" in text
    assert f"needs {300 - 16 * 3e6 / MB:,.0f} MB at the smallest" in text
    assert "| 8,192 | 608 | 608 | 300 | 300 |" in text  # 198.304 + 409.6 us
    assert "less the 200 MB" in text
    assert "from 32 slots on it is within twice the best" in text


def test_pictures_are_whole_and_linked(page: Path) -> None:
    names = re.findall(r"\]\(images/(growth-\w+\.svg)\)", (page / "growth.md").read_text())
    assert len(names) == 5
    assert {path.name for path in (page / "images").iterdir()} == set(names)
    for name in names:
        root = ET.fromstring((page / "images" / name).read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not re.search(r"nan|inf|href|<style|<script", (page / "images" / name).read_text())


def test_points_lie_where_they_should() -> None:
    """On a logarithmic axis 4 lies halfway between 1 and 16; values are heights from the line of 0."""
    drawn = figure([Panel("t", "x", [Line("fp32", [(1, 10), (4, 5), (16, 20)])])])
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
    (x1, y1), (x2, y2), (x3, y3) = ((float(x), float(y)) for x, y in circles)
    assert x2 == pytest.approx((x1 + x3) / 2, abs=0.1)
    zero = float(re.search(r'<path d="M[\d.]+ ([\d.]+)L[^"]*" fill="none" stroke="#9ca3af"', drawn)[1])  # type: ignore[index]
    assert (zero - y3) / (zero - y1) == pytest.approx(2, abs=0.02)
    assert (zero - y2) / (zero - y1) == pytest.approx(0.5, abs=0.02)


def test_a_training_step_is_measured() -> None:
    point = Point(curve="length", x=8, rows=3, length=8, vocabulary=64)
    found = measure(point, repetitions=2, budget_s=0.0)
    assert len(found.seconds) == 2
    assert found.tokens == 24
    layer = 4 * 256 * 256 + 3 * 256 * 688 + 2 * 256
    assert found.parameters == 64 * 256 + 4 * layer + 256
    assert found.peak_bytes > found.start_bytes > 0
    assert found.us_per_token == pytest.approx(1e6 * sum(found.seconds) / 2 / 24)
    assert from_row(as_row(point, found)) == (point, found)


def test_rollouts_are_measured() -> None:
    point = Point(curve="group", x=2, rows=4, length=6, new=3, group=2, slots=4, vocabulary=64)
    found = measure(point, repetitions=1, budget_s=0.0)
    assert found.tokens == 12
    assert math.isfinite(found.us_per_token)
