"""`/save` and `/load` where something is in the way: a sentence, and the conversation stays."""

import json
import os
import stat
from pathlib import Path

import pytest
from chatting import Talk

from kinkajou.chat import conversation
from kinkajou.chat.conversation import Conversation, Turn, load, save
from kinkajou.data.records import Message
from kinkajou.errors import UserError

SAID = Conversation("", [Turn(1, (Message("user", "secret"),), Message("assistant", "x"))])
ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/save ~nosuchuser/x.jsonl", "~nosuchuser/x.jsonl: there is no such home"),
        ("/load ~nosuchuser/x.jsonl", "~nosuchuser/x.jsonl: there is no such home"),
        ("/save one.jsonl/z.jsonl", "could not be written"),
        (f"/save {'n' * 300}.jsonl", "could not be written"),
        (f"/load {'n' * 300}.jsonl", "cannot be read"),
        ("/save x\0y.jsonl", "no file has a NUL character in its name"),
        ("/load x\0y.jsonl", "no file has a NUL character in its name"),
        (f"/load one.jsonl {'9' * 5000}", "one.jsonl holds 1 conversation"),
        ("/load one.jsonl 0", "one.jsonl holds 1 conversation"),
        ("/save shut/x.jsonl", "could not be written"),
        ("/save loop.jsonl/x.jsonl", "could not be written"),
        ("/save dangling.jsonl", "dangling.jsonl is there already"),
        ("/save folder.jsonl", "folder.jsonl is there already"),
    ],
)
def test_a_path_that_leads_nowhere(
    line: str, words: str, talk: Talk, asked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.jsonl").write_text(ROW)
    Path("folder.jsonl").mkdir()
    Path("shut").mkdir(mode=0)
    Path("loop.jsonl").symlink_to("loop.jsonl")
    Path("dangling.jsonl").symlink_to("nowhere")
    if line.startswith("/save shut") and os.geteuid() == 0:  # root may write anywhere
        monkeypatch.setattr(conversation.tempfile, "mkstemp", refused)
    seen = talk("w5 w8", line, "w5 w9")
    assert words in seen.err
    assert seen.code == 2
    assert asked[-1] == ["w5 w8", "w6 w7", "w5 w9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("dangling.jsonl", "folder.jsonl", "loop.jsonl", "one.jsonl", "shut"),
    ]


def refused(*_: object, **__: object) -> tuple[int, str]:
    raise PermissionError(13, "Permission denied")


def test_what_the_system_refuses_inside_a_command(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinkajou.chat.slash.save", refused)
    seen = talk("w5 w8", "/save x.jsonl", "w5 w9")
    assert "error: /save could not be done\n  seen: [Errno 13] Permission denied" in seen.err
    assert len(seen.answers) == 2


def test_nothing_that_lies_there_is_written_through(tmp_path: Path) -> None:
    """Another's link or file in a folder that all may write."""
    victim = tmp_path / "victim.txt"
    victim.write_text("precious\n")
    (tmp_path / ".a.jsonl.part").symlink_to(victim)
    (tmp_path / ".b.jsonl.part").write_text("mine")
    (tmp_path / ".b.jsonl.part").chmod(0o644)
    for name in ("a.jsonl", "b.jsonl"):
        save(tmp_path / name, [("m", SAID)], replace=False)
        assert not (tmp_path / name).is_symlink()
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        assert load(str(tmp_path / name)) == [SAID]
    assert victim.read_text() == "precious\n"
    assert (tmp_path / ".b.jsonl.part").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 5


def test_an_interrupt_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a.jsonl", [("m", SAID)], replace=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("nul", ["asked", "answer"])
def test_what_no_record_can_hold_is_left_out_and_that_is_said(nul: str, tmp_path: Path) -> None:
    words = {"asked": "q", "answer": "x", nul: "a\0b"}
    bad = Turn(2, (Message("user", words["asked"]),), Message("assistant", words["answer"]))
    empty = Turn(3, (Message("user", "q"),), Message("assistant", " "))
    said = Conversation("sys", [*SAID.turns, bad, empty])
    left = save(tmp_path / "a.jsonl", [("m", said)], replace=False)
    assert left == "1 empty answer and 1 turn with a NUL character, which no record may hold"
    assert load(str(tmp_path / "a.jsonl")) == [Conversation("sys", SAID.turns)]
    with pytest.raises(UserError, match="nothing that a record may hold"):
        save(tmp_path / "b.jsonl", [("m", Conversation("", [bad]))], replace=False)
    with pytest.raises(UserError, match="no record can hold this conversation"):
        save(tmp_path / "b.jsonl", [("m", Conversation("a\0b", SAID.turns))], replace=False)


def test_a_model_whose_folder_is_no_text(tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", [("runs/\udcff", SAID)], replace=False)
    assert json.loads((tmp_path / "a.jsonl").read_text())["model"] == r"runs/\udcff"


def test_a_fault_of_a_file_advises_nothing_that_chat_has_not(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    for text in ('{"messages": 3}\n' + ROW, "{\n" + ROW, ROW + '{"messages": [{"role": "user", "content": "a"}]}\n'):
        file.write_text(text)
        seen = talk(f"/load {file}")
        assert f"error: {file}:" in seen.err
        assert "bad" in seen.err
        assert "--bad" not in seen.err
        assert "fix:" in seen.err
