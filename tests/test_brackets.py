"""What users wrote is shown as it is: square brackets in it are no markup of ours."""

from pathlib import Path

import pytest

from kinkajou.demo import show


def test_answers_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "[/x]", "before": "[bold]a", "after": "b[/]", "before_score": 1.0, "after_score": 2.0}
    rows = {"tables": [{"rows": [("[/y]", "[red]")]}], "comparison": {"rows": [row]}}
    show({"title": "[/z]", "next": "[/n]", **rows}, Path("a[/b].html"))
    said = capsys.readouterr().out
    assert all(text in said for text in ("[/x]", "[bold]a", "b[/]", "[/y]", "[red]", "[/z]", "[/n]", "a[/b].html"))
