"""`kinkajou runs` and `kinkajou verify`: what they say of whole, damaged, running and broken folders."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kinkajou.checkpoint.lock import RunLock
from kinkajou.checkpoint.place import Place
from kinkajou.checkpoint.shelf import Shelf
from kinkajou.cli import main


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


def put(run: Path, place: Place, *, state: bool = True) -> Path:
    shelf = Shelf(run / "checkpoints")
    folder = shelf.aside(place)
    (folder / "model.safetensors").write_bytes(b"weights")
    if state:
        (folder / "state").mkdir()
        (folder / "state" / "run.json").write_text('{"total": 40}')
    shelf.commit(place)
    return shelf.path(place)


def make_run(run: Path, stage: str = "sft", step: int = 20, **numbers: Any) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(f"[{stage}]\nlr = 0.1\n")
    rows = [{"step": i, "noise": 1.0, **numbers} for i in range(1, step + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def row_of(out: str, name: str) -> str:
    [line] = [line for line in out.splitlines() if line.split()[:1] == [name]]
    return " ".join(line.split())


# --- verify -----------------------------------------------------------------------------------------------


def test_verify_a_whole_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "verify", put(tmp_path, Place(3, 1)))
    assert (code, err) == (0, "")
    assert row_of(out, "step-000003+001") == "step-000003+001 20 yes whole"  # 7 bytes of weights, 13 of state


def test_verify_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        put(tmp_path, Place(step), state=step > 1)
    (tmp_path / "checkpoints" / "step-000003" / "model.safetensors").write_bytes(b"weighty")
    (tmp_path / "checkpoints" / ".step-000004.tmp").mkdir()
    for folder in (tmp_path, tmp_path / "checkpoints"):
        code, out, err = said(capsys, "verify", folder)
        assert code == 4
        assert row_of(out, "step-000001") == "step-000001 7 no whole"
        assert row_of(out, "step-000003") == "step-000003 20 yes damaged model.safetensors has another sha256"
        assert "1 checkpoint not finished" in out
        assert err.startswith(
            "error: 1 of 3 checkpoints is damaged\n  seen: step-000003: model.safetensors has another"
        )
        assert f"fix:  {tmp_path / 'checkpoints' / 'step-000002'} is the newest whole one" in err


def test_verify_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, Place(1))
    os.remove(put(tmp_path, Place(2)) / "manifest.json")
    code, out, err = said(capsys, "verify", "--json", tmp_path)
    assert code == 4
    assert "fix:  " in err
    first, second = json.loads(out)
    assert (first["name"], first["whole"], first["damages"], first["state"]) == ("step-000001", True, [], True)
    assert (second["whole"], second["damages"]) == (False, ["manifest.json is missing"])


def test_verify_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("")
    for folder, words in (
        (tmp_path, "no checkpoint in"),
        (tmp_path / "no", "no such folder"),
        (tmp_path / "notes", "no "),
    ):
        code, out, err = said(capsys, "verify", folder)
        assert (code, out) == (2, "")
        assert words in err
    assert said(capsys, "verify")[0] == 2


# --- runs -------------------------------------------------------------------------------------------------


def test_states_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("done", "stopped", "failed", "killed", "running"):
        put(make_run(tmp_path / name, loss=0.5), Place(20))
    (tmp_path / "done" / "done.json").write_text('{"step": 20, "checkpoint": "step-000020"}')
    finding = {"step": 20, "name": "not_finite", "level": "error"}
    (tmp_path / "failed" / "findings.jsonl").write_text(json.dumps(finding) + "\n")
    owner = {"pid": 2**22 + 1, "host": os.uname().nodename, "start": "2026-01-01 00:00:00", "silence": 120}
    (tmp_path / "killed" / ".lock").write_text(json.dumps(owner))
    with RunLock(tmp_path / "running"):
        code, out, err = said(capsys, "runs", tmp_path)
        assert (code, err) == (0, "")
        for name in ("done", "stopped", "failed", "killed", "running"):
            assert row_of(out, name).startswith(f"{name} sft {name} 20 of 40 20 loss 0.5")
    said(capsys, "runs", tmp_path)
    RunLock(tmp_path / "running").release()  # looking has not left a lock


def test_a_run_of_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "far")
    owner = {"pid": 7, "host": "elsewhere", "start": "2026-01-01 00:00:00", "silence": 120}
    (run / ".lock").write_text(json.dumps(owner))
    assert json.loads(said(capsys, "runs", "--json", tmp_path)[1])[0]["state"] == "running"
    os.utime(run / ".lock", (time.time() - 130,) * 2)
    assert json.loads(said(capsys, "runs", "--json", tmp_path)[1])[0]["state"] == "killed"


def test_what_a_run_is_told_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ppo = make_run(tmp_path / "a" / "ppo", "ppo", step=7, response_length=12.0, kl_ref=0.25, score=None, ended=1.0)
    (ppo / "config.toml").write_text("[ppo]\nsteps = 9\n")
    (ppo / "best.json").write_text('{"step": 5, "metric": "eval_gold", "value": 0.75}')
    put(ppo, Place(4), state=False)
    put(ppo, Place(6), state=False)
    (ppo / "checkpoints" / "step-000006" / "model.safetensors").unlink()
    os.utime(ppo / "metrics.jsonl", (time.time() - 7200,) * 2)
    for name in ("config.toml", "checkpoints"):
        os.utime(ppo / name, (1, 1))
    make_run(tmp_path / "b")
    make_run(tmp_path / "a" / "ppo" / "inner")  # below a run: not looked for
    make_run(tmp_path / "a" / "deep" / "deeper")  # three levels down
    code, out, _ = said(capsys, "runs", tmp_path)
    assert code == 0
    assert len(out.splitlines()) == 3
    line = "a/ppo ppo stopped 7 of 9 4, 1 damaged eval_gold 0.75 at 5 score -, kl_ref 0.25, response_length 12 2 h"
    assert row_of(out, "a/ppo") == line
    assert out.splitlines()[1].split()[0] == "b"  # the newest first
    [one] = json.loads(said(capsys, "runs", ppo, "--json")[1])
    assert one["name"] == "ppo"
    assert one["metrics"] == {"score": None, "kl_ref": 0.25, "response_length": 12.0}
    assert (one["checkpoint"], one["damaged"], one["total"]) == ("step-000004", 1, 9)


def test_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capsys, "runs")
    assert (code, out) == (2, "")
    assert "no run in ." in err
    code, _, err = said(capsys, "runs", tmp_path / "none")
    assert code == 2
    assert "no such folder" in err


BROKEN = [
    b"",
    b"\x00",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b"{" * 5000,
    b"null",
    b"[]",
    b'{"step": "x", "metric": [], "value": {}, "total": "no"}',
    b'{"step": 1e400}',
    b'{"step": NaN}',
    b'{"step": -1, "value": true}',
    b'{"step": 99999999999999999999999999, "metric": "\x1b[31m", "value": 1}',
    b"[sft]\nsteps = 1e999\n",
    b"[sft]\nsteps = 'x'\n[sft]",
    b"sft = 3",
    b"[x]" * 3000,
    b'{"pid": -1, "host": "\\u001b[31m", "start": 3, "silence": 1e300}',
    b"9" * 10_000,
]
FILES = ("config.toml", "metrics.jsonl", "best.json", "done.json", "findings.jsonl", ".lock", "checkpoints")
BELOW = ("step-000020/manifest.json", "step-000020/state/run.json", "step-000020")


def spoil(run: Path, dice: random.Random) -> None:
    """Something broken in place of a file: bytes, a folder, a dead link, a pipe, nothing."""
    names = [*FILES, *(f"checkpoints/{name}" for name in BELOW)]
    for name in dice.sample(names, 3):
        path = run / name
        if not path.parent.is_dir():
            continue
        subprocess.run(["rm", "-rf", str(path)], check=True)
        kind = dice.randrange(8)
        if kind == 0:
            path.mkdir()
        elif kind == 1:
            path.symlink_to(run / "nowhere")
        elif kind == 2:
            path.symlink_to(path)
        elif kind == 3:
            os.mkfifo(path)
        elif kind > 4:
            path.write_bytes(dice.choice(BROKEN))


@pytest.mark.parametrize("seed", range(4))
def test_broken_folders_are_no_fault(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    dice = random.Random(seed)
    for i in range(20):
        put(make_run(tmp_path / f"run-{i}", loss=0.5), Place(20))
        spoil(tmp_path / f"run-{i}", dice)
    code, out, err = said(capsys, "runs", tmp_path)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    for i in range(20):
        run = tmp_path / f"run-{i}"
        assert said(capsys, "runs", run)[0] in (0, 2)
        assert said(capsys, "verify", run)[0] in (0, 2, 4)


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_every_file_of_such_bytes(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", loss=0.5)
    put(run, Place(20))
    for name in FILES[:-1]:
        (run / name).write_bytes(content)
    for name in BELOW[:2]:
        (run / "checkpoints" / name).write_bytes(content)
    code, out, err = said(capsys, "runs", tmp_path)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert said(capsys, "verify", run)[0] == 4


def test_they_come_up_without_torch(tmp_path: Path) -> None:
    put(make_run(tmp_path / "run"), Place(20))
    code = "import sys; from kinkajou.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    for command in ("runs", "verify"):
        words = [sys.executable, "-c", code, command, str(tmp_path / "run")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stdout.endswith("False\n")
