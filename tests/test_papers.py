"""docs/papers.md is what the docstrings say today, and every source in them has a title."""

from pathlib import Path

from benchmarks import papers

ROOT = Path(__file__).resolve().parents[1]


def test_every_source_has_a_title() -> None:
    assert not papers.unknown()
    used = {paper for formula in papers.formulas() for paper in formula.papers}
    assert not set(papers.PAPERS) - used  # nor a title without a formula


def test_the_page_is_not_behind_the_code() -> None:
    assert papers.PAGE.read_text(encoding="utf-8") == papers.page(), "python -m benchmarks.papers --write"


def test_lines_point_at_the_formulas() -> None:
    found = list(papers.formulas())
    assert len(found) > 40
    for formula in found:
        line = (ROOT / formula.place).read_text(encoding="utf-8").splitlines()[formula.line - 1]
        assert line.startswith(f"def {formula.name}(")
