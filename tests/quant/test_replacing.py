"""What an output may replace, that it appears whole or not at all, and what a full disk is told as."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from kinkajou.config import ExportConfig, QuantizeConfig
from kinkajou.data.tokenizer import train_tokenizer
from kinkajou.errors import UserError
from kinkajou.quant import output as outputs
from kinkajou.quant.command import quantize
from kinkajou.quant.export import export
from kinkajou.quant.output import check_fits, check_output, whole
from tiny import save_source, tiny_tokenizer

MODEL = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


def a_model(folder: Path, *more: str) -> Path:
    folder.mkdir()
    for name in (*MODEL, *more):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """`ulimit -f`, in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(*args: object, **settings: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fault", [SafetensorError("No space left"), OSError(28, "No space left")])
def test_a_storage_that_takes_no_more_is_told_of(fault: Exception, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be written") as caught, whole(tmp_path / "out", overwrite=False):
        raise fault
    assert caught.value.exit_code == 4
    assert "No space left" in caught.value.evidence
    assert "checkpoint" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kinkajou.models import quantised_files
    from kinkajou.quant import export as exporting

    size = {"hidden_size": 64, "intermediate_size": 64}
    save_source(tmp_path / "model", AutoModelForCausalLM, "llama", tiny_tokenizer(words=94), **size)
    (tmp_path / "text.txt").write_text("w5 w6 w7 " * 60)
    monkeypatch.setattr(quantised_files, "save_file", full_disk)
    monkeypatch.setattr(exporting, "save_model", full_disk)
    for run in (
        lambda: export(str(tmp_path / "model"), ExportConfig(output=str(tmp_path / "out"))),
        lambda: quantize(
            str(tmp_path / "model"), QuantizeConfig(output=str(tmp_path / "out"), data=str(tmp_path / "text.txt"))
        ),
    ):
        with pytest.raises(UserError, match="could not be written") as caught:
            run()
        assert caught.value.exit_code == 4
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


@pytest.mark.parametrize("kind", ["quantize", "merged", "gguf"])
def test_a_limit_of_files_is_seen_before_anything_is_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(f"w{3 + i * i % 90}" for i in range(300))
    tokenizer = train_tokenizer([text], 300) if kind == "gguf" else tiny_tokenizer(words=94)
    size = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": max(97, len(tokenizer))}
    save_source(tmp_path / "model", AutoModelForCausalLM, "llama", tokenizer, **size)
    (tmp_path / "text.txt").write_text(text)
    model, out = str(tmp_path / "model"), str(tmp_path / "x.gguf")
    runs = {
        "quantize": lambda: quantize(model, QuantizeConfig(output=out, data=str(tmp_path / "text.txt"))),
        "merged": lambda: export(model, ExportConfig(output=out)),
        "gguf": lambda: export(model, ExportConfig(output=out, to="gguf")),
    }
    with pytest.raises(UserError, match="longer than this process may write") as caught, files_of_at_most(30_000):
        runs[kind]()
    assert caught.value.exit_code == 4
    assert "ulimit -f" in caught.value.evidence
    assert "checkpoint" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_no_room_is_told_of_the_model_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="the model does not fit") as caught:
        check_fits(tmp_path / "out", 1 << 60)
    assert "keep_last" not in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("through", ["held.json", "link.json"])
def test_no_text_that_is_read_is_replaced(through: str, tmp_path: Path) -> None:
    """Also through a link, which would lead nowhere, and of a link in it, which would be gone."""
    out = a_model(tmp_path / "out", "vocab.json")
    (tmp_path / "held.json").symlink_to(out / "vocab.json")
    (tmp_path / "elsewhere.json").write_text("[]")
    (out / "added_tokens.json").symlink_to(tmp_path / "elsewhere.json")
    read = tmp_path / "held.json" if through == "held.json" else out / "added_tokens.json"
    with pytest.raises(UserError, match="would replace what is read"):
        check_output(out, "none", overwrite=True, read=(str(read),))
    check_output(out, "none", overwrite=True, read=(str(tmp_path / "elsewhere.json"), ""))


def test_quantize_protects_all_that_it_reads(tmp_path: Path) -> None:
    out = a_model(tmp_path / "out", "vocab.json")
    for name in ("data", "calibrate", "reward"):
        given = {"data": str(tmp_path / "other.txt")} | {name: str(out if name == "reward" else out / "vocab.json")}
        with pytest.raises(UserError, match="would replace what is read"):
            quantize(str(a_model(tmp_path / f"m-{name}")), QuantizeConfig(output=str(out), overwrite=True, **given))


@pytest.mark.parametrize("name", ["letters/a.txt", "rows.jsonl", "notes.txt", "data.json", "photos/x.safetensors"])
def test_a_model_with_something_of_ours_beside_it_is_not_replaced(name: str, tmp_path: Path) -> None:
    out = a_model(tmp_path / "out", name)
    with pytest.raises(UserError, match="not a model's") as caught:
        check_output(out, "none", overwrite=True)
    assert name.split("/")[0] in caught.value.evidence


def test_what_our_commands_write_may_be_replaced(tmp_path: Path) -> None:
    names = ("gate.json", "generation_config.json", "tokenizer_config.json", "model-00001-of-00002.safetensors")
    named = ("model.safetensors.index.json", "additional_chat_templates/tool_use.jinja")
    check_output(a_model(tmp_path / "out", *names, *named), "none", overwrite=True)


def test_two_runs_do_not_write_to_one_place(tmp_path: Path) -> None:
    with whole(tmp_path / "out", overwrite=False) as first:
        first.mkdir()
        (first / "config.json").write_text("first")
        with pytest.raises(UserError, match="another process"), whole(tmp_path / "out", overwrite=True):
            raise AssertionError("the second got in")
    assert (tmp_path / "out" / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_came_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    def both() -> None:
        with whole(tmp_path / "out", overwrite=False) as aside:
            aside.write_text("mine")
            (tmp_path / "out").write_text("theirs")

    with pytest.raises(UserError, match="is there already"):
        both()
    assert (tmp_path / "out").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from kinkajou.quant.output import whole\n"
        "with whole(pathlib.Path(sys.argv[1]), overwrite=False) as aside:\n"
        "    aside.mkdir()\n"
        "    (aside / 'model.safetensors').write_text('half')\n"
        "    os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], timeout=100, check=False)
    assert done.returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    with whole(tmp_path / "out", overwrite=False) as aside:
        aside.write_text("whole")
    assert (tmp_path / "out").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_model_that_cannot_be_deleted_is_no_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, delete = a_model(tmp_path / "out"), outputs.delete

    def stuck(path: Path) -> None:
        if path.name.endswith(".old") and os.path.lexists(path):
            raise PermissionError(13, "Permission denied", str(path))
        delete(path)

    monkeypatch.setattr(outputs, "delete", stuck)
    with whole(out, overwrite=True) as aside:
        aside.write_text("new")
    assert out.read_text() == "new"
    assert "could not be deleted" in capsys.readouterr().out
