"""The reader of old files: whatever is more or less than tensors by name is refused, and nothing in it runs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import coati_pickle
import coati_weights
import pytest
import torch
from torch import nn

from kinkajou.errors import UserError


class Payload:
    """What a pickle can make its reader call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def hostile(kind: str, folder: Path) -> Path:
    file, canary, ones = folder / "evil.pt", folder / "canary", torch.ones(3)
    made: dict[str, Any] = {
        "system": {"a": ones, "x": Payload(os.system, f"touch {canary}")},
        "open": {"a": ones, "x": Payload(open, str(canary), "w")},
        "exec": {"a": ones, "x": Payload(exec, f"open({str(canary)!r}, 'w')")},
        "optimizer": torch.optim.Adam([nn.Parameter(ones)]).state_dict(),
        "list": [ones],
        "text": {"a": "b"},
        "numbered": {1: ones},
        "sparse": {"a": ones.to_sparse()},
        "parameter": {"a": nn.Parameter(ones)},
        "claims": {"a": torch.ones(1).expand(10**9)},
    }
    if kind in made:
        torch.save(made[kind], file)
    elif kind == "old":
        torch.save({"a": ones}, file, _use_new_zipfile_serialization=False)
    elif kind == "cut":
        torch.save({"a": torch.ones(1000)}, file)
        file.write_bytes(file.read_bytes()[:2000])
    elif kind == "bomb":
        torch.save({"a": ones}, folder / "plain.pt")
        with zipfile.ZipFile(folder / "plain.pt") as plain, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    else:
        file.write_bytes(b"")
    return file


SAID = {
    "system": "made of tensors alone",
    "open": "made of tensors alone",
    "exec": "made of tensors alone",
    "optimizer": "an optimiser's state",
    "list": "not weights by name",
    "text": "not a plain tensor",
    "numbered": "no short text",
    "sparse": "not a plain tensor",
    "parameter": "not a plain tensor",
    "claims": "more bytes than the file has",
    "old": "before torch 1.6",
    "cut": "no archive of torch.save",
    "bomb": "is compressed",
    "empty": "no archive of torch.save",
}


@pytest.mark.parametrize("kind", SAID)
def test_what_is_more_or_less_than_tensors_is_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = hostile(kind, tmp_path)
    with pytest.raises(SystemExit) as left:
        coati_pickle.tensors_of(file)
    assert left.value.code == 2
    assert SAID[kind] in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", ["system", pytest.param("cut", marks=pytest.mark.slow)])
def test_the_sentence_comes_out_of_the_readers_process(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is refused") as fault:
        coati_weights.read_apart(hostile(kind, tmp_path))
    assert SAID[kind] in fault.value.evidence
    assert "Traceback" not in fault.value.evidence
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("fault", [MemoryError("x"), OSError("x")])
def test_a_reader_that_fails_is_told(fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another exit code than that of a refusal: with its last words."""
    (tmp_path / "reader.py").write_text(f"raise {fault!r}")
    monkeypatch.setattr(coati_weights, "READER", tmp_path / "reader.py")
    with pytest.raises(UserError, match="ended with 1") as told:
        coati_weights.read_apart(hostile("list", tmp_path))
    assert repr(fault).split("(")[0] in told.value.evidence


def test_a_payload_that_would_run_with_a_laxer_reader(tmp_path: Path) -> None:
    """The canary is a real one."""
    torch.load(hostile("system", tmp_path), weights_only=False)
    assert (tmp_path / "canary").exists()


ATTEMPTS = {
    "socket": "import socket; socket.socket()",
    "process": "import os; os.system('touch canary')",
    "file": "open('canary', 'w')",
    "removal": "import os; os.remove('kept')",
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_the_reader_can_do_nothing_else_even_if_code_ran(attempt: str, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    code = f"import coati_pickle; coati_pickle.seal_off(); {ATTEMPTS[attempt]}; print('done')"
    env = {"PATH": os.defpath, "PYTHONPATH": str(Path(coati_pickle.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "refused" in done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_an_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    monkeypatch.setattr(torch, "load", None)  # it does not come to that
    with pytest.raises(SystemExit):
        coati_pickle.read(tmp_path / "any.pt")
