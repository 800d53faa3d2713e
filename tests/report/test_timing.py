"""What the clock says lies in a file of its own, beside what settings and seeds decide."""

import json
import re
from pathlib import Path

import pytest
from test_report import Rows, report, write_run


def write_timing(run: Path, rows: Rows, tail: str = "") -> Path:
    (run / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return run


def test_times_and_speeds_come_from_the_file_of_timing(tmp_path: Path) -> None:
    run = write_run(tmp_path, [{"step": step, "loss": 1.0} for step in (1, 2, 3)])
    timing = [{"step": step, "time_s": 20.0 * step, "train_tokens_per_s": 100.0 * step} for step in (1, 2, 3, 4)]
    page = report(write_timing(run, timing, tail='{"step": 5, "ti'))
    assert any("Throughput" in label and "from 100 to 300 at step 3" in label for label in page.labels)
    assert "1 line of timing.jsonl could not be read and was skipped." in page.text
    assert "Resumed" not in page.text
    assert "1 min 00 s" in page.text  # of step 3: step 4 has no numbers yet


@pytest.mark.parametrize(("again", "wall"), [([7.0, 8.0], "8 s"), ([1.5, 3.0], "9 s"), ([None, 8.5], "8.5 s")])
def test_resumed_run_with_a_clock_that_goes_on_or_starts_again(
    tmp_path: Path, again: list[float | None], wall: str
) -> None:
    """Eight steps of a second, then 7 and 8 once more."""
    run = write_run(tmp_path, [{"step": step, "loss": 1.0} for step in range(1, 9)])
    first = [{"step": step, "time_s": float(step), "train_tokens_per_s": 10.0} for step in range(1, 9)]
    second = [{"step": s, "time_s": t, "train_tokens_per_s": 70.0} for s, t in zip((7, 8), again, strict=True)]
    page = report(write_timing(run, first + second))
    assert "Resumed once" in page.text
    assert any("from 10 to 70 at step 8" in label for label in page.labels)
    assert re.search(rf"wall time\s*{re.escape(wall)}", page.text)
