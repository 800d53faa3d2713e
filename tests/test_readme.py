"""What the README tells a newcomer to type."""

import json
import re
import shlex
from pathlib import Path

import pytest

from kinkajou.cli import main

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```shell\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
LINES = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
STAGES = [line for line in LINES if re.match(r"kinkajou (sft|reward|prefer|ppo|grpo) ", line)]


def test_the_readme_shows_every_stage() -> None:
    assert {line.split()[1] for line in STAGES} == {"sft", "reward", "prefer", "ppo", "grpo"}


@pytest.mark.parametrize("line", STAGES)
def test_stage_commands_are_complete(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main([*shlex.split(line)[1:], "--print-config"]) == 0, capsys.readouterr().err


def test_make_targets_exist() -> None:
    named = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert named == {"demo", "test"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in named)


def test_the_demo_runs_whole_at_a_small_scale(tmp_path: Path) -> None:
    assert main(["demo", "--output", str(tmp_path / "demo"), "--scale", "0.01"]) == 0
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert [row[0] for row in summary["tables"][0]["rows"]][:2] == [
        "checker's score on test prompts, after SFT",
        "checker's score on test prompts, after PPO",
    ]
    assert main(["chat", str(tmp_path / "demo" / "ppo"), "--message", "What is the capital of France?"]) == 0
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 2
