"""The report as a browser takes it: parsed, with what is text kept apart from what is markup."""

import base64
import hashlib
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kinkajou.errors import UserError
from kinkajou.report.catalogue import panels_of
from kinkajou.report.curves import smooth, thin
from kinkajou.report.html import write_report
from kinkajou.report.samples import chosen_steps
from kinkajou.report.scale import duration, nice_ticks, readable, tick_labels, value_range

CONFIG = '[ppo]\nsteps = 20\nseed = 1\nnote = "a < b & c"\n\n[environment]\ngit_commit = "4f1c2a9"\n'


class Page(HTMLParser):
    """Every element and the text of the page; asserts that tags are balanced."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str, role: str = "") -> list[dict[str, str]]:
        found = [attributes for name, attributes in self.elements if name == tag]
        return [one for one in found if not role or role in one.get("class", "").split()]

    @property
    def labels(self) -> list[str]:
        return [plot["aria-label"] for plot in self.all("svg", "plot")]


Rows = list[dict[str, Any]]


def write_run(folder: Path, rows: Rows, samples: Rows | None = None, *, config: str = CONFIG, tail: str = "") -> Path:
    """`tail` is what a killed run leaves at the end of metrics.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


def ppo_rows(count: int = 20) -> Rows:
    rows: Rows = []
    for step in range(1, count + 1):
        rows.append({"step": step, "time_s": 3.5 * step, "score": step / 10, "kl_ref": step / 50})
        if step % 5 == 0:
            rows[-1] |= {"eval_gold": 0.5, "eval_gold_low": 0.4, "eval_gold_high": 0.6}
    return rows


def report(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text("utf-8"))


def test_run_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "ppo", ppo_rows(), [])
    (run / "best.json").write_text('{"step": 10, "metric": "eval_gold", "value": 0.5}')
    page = report(run)
    assert page.all("meta")[1]["content"].startswith("default-src 'none'")
    for said in ("PPO", "complete", "1 min 10 s", "step 10 (truth 0.500)", "a < b & c", "4f1c2a9"):
        assert said in page.text
    titles = ["The reward model's score", "The truth, on held-out prompts", "Score", "Truth", "KL to the reference"]
    assert [label.split(":")[0] for label in page.labels] == titles
    # The kept step stands in every chart; the band is drawn, not plotted as two more metrics.
    assert len(page.all("path", "mark")) == 5
    assert len(page.all("path", "band")) == 2
    assert list(tmp_path.glob("**/.report*")) == []


def test_folder_of_stages_in_the_order_of_the_summary(tmp_path: Path) -> None:
    for name in ("ppo", "reward", "sft"):
        write_run(tmp_path / name, ppo_rows() if name == "ppo" else [{"step": 1, "time_s": 1, "loss": 2.5}])
    row = {"prompt": "p", "before": "q", "after": "r", "before_score": 1, "after_score": 3}
    summary = {
        "title": "A demo",
        "lead": "Three runs, see `docs`.",
        "stages": ["sft", "reward", "ppo", "serve"],
        "tables": [{"title": "Results", "columns": ["m", "x"], "rows": [["a", 31.0], ["b", 4.25], ["c", None]]}],
        "comparison": {"before": "after SFT", "after": "after PPO", "rows": [row]},
        "picture": {"stage": "ppo", "title": "Score and truth", "left": "score", "right": "eval_gold", "mark": 10},
        "next": "Run `kinkajou chat`.",
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = report(tmp_path)
    places = [page.text.index(f"folder{name}") for name in ("sft", "reward", "ppo")]
    assert places == sorted(places)
    assert "Stage “serve” has no metrics.jsonl yet." in page.text
    for said in ("A demo", "Score and truth", "step 10, kept", "31.00", "4.25", "1 → 3", "on 1 of 1"):
        assert said in page.text
    assert "<code>kinkajou chat</code>" in page.source
    assert {link["href"] for link in page.all("a")} == {"#stage-1", "#stage-2", "#stage-3"}
    assert page.text.index("Score and truth") < page.text.index("Results") < places[0]


def test_stages_without_a_summary_come_in_order_of_their_settings(tmp_path: Path) -> None:
    for age, name in enumerate(("b", "c", "a")):
        write_run(tmp_path / name, [{"step": 1, "loss": 1.0}])
        os.utime(tmp_path / name / "config.toml", (age * 100, age * 100))
    (tmp_path / "logs").mkdir()
    text = report(tmp_path).text
    assert text.index("PPO · b") < text.index("PPO · c") < text.index("PPO · a")


HOSTILE = "</td></script><script>alert(1)</script><img src=x onerror=alert(2)>\"' \u202e\ud800\x00\x1b[0m&amp;"


def test_text_of_models_and_data_is_inert(tmp_path: Path) -> None:
    row = {HOSTILE: 1.0, f"eval_{HOSTILE}": 2.0, "score": 1.0, "eval_gold": 1.0}
    rows = [{"step": 1} | row, {"step": 2} | row]
    sample = {"step": 1, "prompt": HOSTILE, "response": HOSTILE, "score": 1, "ended": False, HOSTILE: 3}
    summary = {
        "title": HOSTILE,
        "lead": f"`{HOSTILE}`",
        "next": HOSTILE,
        "stages": [HOSTILE],
        "tables": [{"title": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]], "note": HOSTILE}],
        "comparison": {"title": HOSTILE, "before": HOSTILE, "after": HOSTILE, "rows": [{"prompt": HOSTILE}]},
        "picture": {"title": HOSTILE, "note": HOSTILE},
    }
    for name in ("ppo", "x<script>y"):
        write_run(tmp_path / name, rows, [sample], config='["<script>"]\n"<img>" = "</table><script>"\n')
        (tmp_path / name / "best.json").write_text(json.dumps({"step": 1, "metric": HOSTILE, "value": 1}))
        finding = {"step": 1, "name": HOSTILE, "cause": HOSTILE, "action": HOSTILE, "evidence": {HOSTILE: HOSTILE}}
        (tmp_path / name / "findings.jsonl").write_text(json.dumps(finding | {"metrics": [HOSTILE, "score"]}))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = report(tmp_path)
    assert len(page.all("script")) == 1
    assert len(page.all("section", "picture")) == 1
    assert page.all("img") == []
    assert "<script>alert(1)</script>" in page.text
    assert all(not key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert re.search(r"[\x00\x1b\u202e]", page.source) is None


def test_policy_lets_only_our_own_style_and_script_run(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, ppo_rows()))
    policy = page.all("meta")[1]["content"]
    for tag in ("style", "script"):
        inline = page.source.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    # Style attributes and handlers would be refused by that policy.
    assert not any("style" in attributes for _, attributes in page.elements)


def test_page_fetches_nothing(tmp_path: Path) -> None:
    sample = {"step": 1, "prompt": "see https://example.org/x", "response": "no", "ended": True}
    page = report(write_run(tmp_path, ppo_rows(), [sample]))
    assert "http" not in page.source.replace("https://example.org/x", "").replace("http-equiv", "")
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert not any({"src", "href", "srcset"} & attributes.keys() for _, attributes in page.elements)


def test_line_cut_by_a_kill_is_skipped_and_counted(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, ppo_rows(7), tail='{"step": 8, "time_s": 28.0, "sco'))
    assert "1 line of metrics.jsonl could not be read and was skipped." in page.text
    assert "7 of 20 steps" in page.text


def test_lines_that_are_no_objects_with_a_step_are_counted(tmp_path: Path) -> None:
    tail = '[1]\n{"loss": 1}\n{"step": null}\n{"step": "9"}\n\n' + "[" * 100_000 + "\n\x00\n"
    page = report(write_run(tmp_path, ppo_rows(7), tail=tail))
    assert "6 lines of metrics.jsonl could not be read and were skipped." in page.text


def test_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    rows = [{"step": step, "time_s": float(step), "loss": 9.0} for step in range(1, 9)]
    rows += [{"step": step, "time_s": step - 5.0, "loss": 1.0} for step in (6, 7)]
    page = report(write_run(tmp_path, rows))
    assert "Resumed once" in page.text
    assert "from 9 to 1 at step 7" in page.labels[0]


def test_evaluation_on_a_line_of_its_own_joins_its_step(tmp_path: Path) -> None:
    rows = [{"step": 1, "time_s": 1.0, "loss": 2.0}, {"step": 2, "time_s": 2.0, "loss": 1.0}]
    page = report(write_run(tmp_path, [*rows, {"step": 1, "time_s": 2.5, "eval_loss": 3.0}]))
    assert "Resumed" not in page.text
    assert "held-out from 3 to 3 at step 1" in page.labels[0]


@pytest.mark.parametrize("file", ["config.toml", "best.json", "samples.jsonl", "findings.jsonl", "summary.json"])
@pytest.mark.parametrize("content", [None, "", "[[[", "[1, 2]", "{} = 3", '{"step": "x"}', "\x00"])
def test_other_files_may_be_missing_or_broken(tmp_path: Path, file: str, content: str | None) -> None:
    run = write_run(tmp_path, ppo_rows(), [{"step": 1, "prompt": "p", "response": "r"}])
    (run / file).unlink(missing_ok=True)
    if content is not None:
        (run / file).write_text(content)
    page = report(run)
    assert "KL to the reference" in page.text
    if content == "[[[":
        assert "could not be read" in page.text
    if content is None and file == "config.toml":
        assert "config.toml is missing" in page.text


def test_summary_with_wrong_types_does_not_stop_the_report(tmp_path: Path) -> None:
    write_run(tmp_path / "ppo", ppo_rows())
    for wrong in (3, "x", ["x"], {"rows": [1]}, {"rows": [[1, "a"], [True]], "columns": 3}, None):
        keys = ("title", "lead", "stages", "tables", "comparison", "picture", "next")
        (tmp_path / "summary.json").write_text(json.dumps(dict.fromkeys(keys, wrong)))
        report(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"picture": {"stage": "sft", "mark": "ten", "left": 1}}))
    assert report(tmp_path).all("section", "picture") == []


def test_folder_without_metrics_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"no metrics\.jsonl") as error:
        write_report(tmp_path)
    assert error.value.evidence == "notes.txt"
    assert error.value.fix
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "report.html").exists()


def test_run_without_a_single_step(tmp_path: Path) -> None:
    assert "no step recorded yet" in report(write_run(tmp_path, [])).text


def test_unknown_metrics_are_plotted_under_other(tmp_path: Path) -> None:
    rows = [{"step": s, "surprise": s, "eval_surprise": s, "eval_odd": 1, "name": "text"} for s in (1, 2, 3)]
    page = report(write_run(tmp_path, rows))
    assert [label.split(":")[0] for label in page.labels] == ["surprise", "odd"]
    assert "Other" in page.text


def test_every_key_is_plotted_exactly_once() -> None:
    keys = ["loss", "eval_loss", "lr", "gold", "eval_kl_ref", "mine", "mine_low", "mine_high", "x_low"]
    for kind in ("sft", "reward", "ppo", "dpo", "something"):
        shown = [key for _, panels in panels_of(kind, keys) for panel in panels for key in panel.keys]
        assert sorted(shown) == sorted(set(keys) - {"mine_low", "mine_high"})


def test_null_and_nan_leave_a_gap_and_are_said(tmp_path: Path) -> None:
    rows: Rows = [{"step": s, "loss": 1.0 + s, "lr": None, "entropy": 2.0} for s in range(1, 8)]
    rows[3]["loss"] = None
    rows[4]["loss"] = math.nan
    del rows[5]["entropy"]
    page = report(write_run(tmp_path, rows))
    assert "Not a number at 2 steps (red ticks)." in page.text
    assert "Not a number at all 7 steps." in page.text
    strokes = {path["d"].count("M") for path in page.all("path", "line")}
    assert strokes == {2, 1}  # null lifts the pen, a missing key does not
    assert smooth([(1, 1.0), (2, None), (3, 1.0)]) == [(1, 1.0), (2, None), (3, 1.0)]
    assert "nan" not in " ".join(path["d"] for path in page.all("path")).lower()


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-7, 5e20, 1e-300, True])
@pytest.mark.parametrize("steps", [[0], [7], [1, 2], list(range(50))])
def test_constant_and_single_points_render(tmp_path: Path, value: float, steps: list[int]) -> None:
    keys = ("loss", "clip_frac", "first_ratio", "lr_policy", "other")
    page = report(write_run(tmp_path, [{"step": step} | dict.fromkeys(keys, value) for step in steps]))
    assert len(page.labels) == len(keys)
    assert len(page.all("path", "dots")) == (len(keys) if len(steps) == 1 else 0)
    for path in page.all("path"):
        assert re.fullmatch(r"[MlhvHVz\d\s-]+", path["d"]), path


def test_extreme_values_stay_finite(tmp_path: Path) -> None:
    values = [1e308, -1e308, 10**400, 5e-324, 0.0, 1e99, -1e99]
    report(write_run(tmp_path, [{"step": step, "loss": value} for step, value in enumerate(values)]))


def test_far_outlier_does_not_flatten_the_curve(tmp_path: Path) -> None:
    rows = [{"step": step, "grad_norm": 1 + step % 7 / 10} for step in range(100)]
    rows[50]["grad_norm"] = 5000.0
    page = report(write_run(tmp_path, rows))
    assert "1 value lies off this axis, as far as 5,000." in page.text
    assert "highest 5,000 at step 50" in page.labels[0]


def test_samples_show_first_kept_and_last(tmp_path: Path) -> None:
    samples = [
        {"step": step, "prompt": "p", "response": f"answer {step}", "score": step, "ended": step < 20}
        for step in range(1, 21)
    ]
    run = write_run(tmp_path, ppo_rows(), [*samples, samples[-1]])
    (run / "best.json").write_text('{"step": 9}')
    page = report(run)
    names = [step["data-name"] for step in page.all("section", "step")]
    assert names[0] == "step 1"
    assert names[-1] == "step 20"
    assert "step 9 (kept)" in names
    assert page.text.count("answer 20") == 1
    assert len(page.all("span", "cutoff")) == 1


def test_long_run_stays_small(tmp_path: Path) -> None:
    keys = ["score", "eval_gold", *(f"metric_{index}" for index in range(22))]
    rows = [
        {"step": s, "time_s": s * 1.1} | {key: math.sin(s * 0.7 + i) + 1.5 for i, key in enumerate(keys)}
        for s in range(1, 5001)
    ]
    samples = [{"step": s, "prompt": "p" * 5000, "response": "r" * 5000} for s in range(1, 5001, 100)]
    write_report(write_run(tmp_path, rows, samples))
    assert (tmp_path / "report.html").stat().st_size < 400_000


def test_thinning_keeps_ends_extremes_and_gaps() -> None:
    points: list[tuple[int, float | None]] = [(step, math.sin(step / 50)) for step in range(10_000)]
    points[1234], points[777] = (1234, 9.0), (777, None)
    kept = thin(points, 400)
    assert sum(value is not None for _, value in kept) <= 400
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert (1234, 9.0) in kept
    assert (777, None) in kept
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)


def test_smoothing_leaves_a_straight_line_alone() -> None:
    line: list[tuple[int, float | None]] = [(step, 3.0 - 0.5 * step) for step in range(100)]
    for (_, straight), (_, smoothed) in zip(line, smooth(line), strict=True):
        assert smoothed == pytest.approx(straight, abs=1e-9)


def test_chosen_steps() -> None:
    assert chosen_steps([3, 4], None) == [3, 4]
    assert chosen_steps(range(0, 101, 10), None) == [0, 20, 50, 80, 100]
    assert chosen_steps(range(0, 101, 10), 60) == [0, 20, 60, 80, 100]
    assert chosen_steps(range(0, 101, 10), 61) == [0, 20, 50, 80, 100]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 0.9, ["0", "0.2", "0.4", "0.6", "0.8"]),
        (-0.03, 0.03, ["\u22120.02", "0", "0.02"]),
        (0.0, 2.1e-5, ["0", "5e\u22126", "1e\u22125", "1.5e\u22125", "2e\u22125"]),
        (0.0, 21_000.0, ["0", "5k", "10k", "15k", "20k"]),
        (900.0, 3100.0, ["1,000", "1,500", "2,000", "2,500", "3,000"]),
    ],
)
def test_ticks_are_nice_numbers(low: float, high: float, labels: list[str]) -> None:
    assert tick_labels(nice_ticks(low, high, most=5)) == labels


def test_numbers_are_readable() -> None:
    minus = "\N{MINUS SIGN}"
    shown = [readable(value) for value in (0.0, 0.41234, -12.3456, 1234.4, 2.5e6, 1.234e-5, 3e12)]
    assert shown == ["0", "0.412", f"{minus}12.35", "1,234", "2.5M", f"1.23e{minus}5", "3e12"]
    spoken = ["3.2 s", "38 s", "4 min 12 s", "2 h 05 min", "2 d 7 h"]
    assert [duration(seconds) for seconds in (3.21, 38.4, 252, 7500, 200_000)] == spoken


def test_noise_of_a_constant_is_not_blown_up() -> None:
    low, high = value_range([1 - 1e-9, 1 + 1e-9])
    assert high - low >= 1e-5
    assert value_range([1.0, 1.0001], min_span=0.02) == pytest.approx((0.99005, 1.01005))
