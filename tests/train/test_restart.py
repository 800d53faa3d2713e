"""Which try of a torchrun this is: an earlier one's run goes on even where the command says --overwrite."""

import os
from pathlib import Path

import pytest

from kinkajou import config
from kinkajou.train.console import environment
from kinkajou.train.restart import launcher, started, written_by_last_try


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that another process, started by the same parent, has begun."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    now = launcher() or ""
    assert now.endswith(f" {os.getppid()} {started(os.getppid())} {os.getpid()}")
    write(tmp_path, now.rpartition(" ")[0] + " 1")
    return tmp_path


def write(folder: Path, launched: str) -> None:
    (folder / "config.toml").write_text(config.to_toml({"sft": {"seed": 1}, "environment": {"launcher": launched}}))


def test_an_earlier_try_of_the_same_torchrun(folder: Path) -> None:
    assert written_by_last_try(folder)


def test_any_other_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = launcher() or ""
    words = own.split()
    for changed in (
        own,  # this very process: a second stage into the same folder
        " ".join(["job8", *words[1:4], "1"]),
        " ".join([words[0], "elsewhere", *words[2:4], "1"]),
        " ".join([*words[:2], "1", words[3], "1"]),
        " ".join([*words[:3], "1", "1"]),
    ):
        write(folder, changed)
        assert not written_by_last_try(folder)
    (folder / "config.toml").write_text("no toml")
    assert not written_by_last_try(folder)
    write(folder, own.rpartition(" ")[0] + " 1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert not written_by_last_try(folder)


def test_a_run_without_torchrun_names_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert "launcher" not in environment(1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    assert environment(1)["launcher"] == launcher()
