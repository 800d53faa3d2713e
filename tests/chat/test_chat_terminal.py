"""The real thing: `kinkajou chat` on a pseudo-terminal, with keys that are pressed."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chatting import SAYINGS
from teletype import Teletype, teletype

from kinkajou.engine.session import Said, Session

PROMPT = r"you: $"
LONG = ["--temperature", "5", "--max-new-tokens", "60"]
GREEDY = ["--temperature", "0", "--max-new-tokens", "6"]


def slow() -> None:
    """Every step of a model takes as long as a large one's."""
    step: Callable[[Session], list[Said]] = Session.step

    def slower(self: Session) -> list[Said]:
        time.sleep(0.05)
        return step(self)

    Session.step = slower  # type: ignore[method-assign]


def say(terminal: Teletype, text: str) -> str:
    """Types a line and waits for the next prompt; returns what came in between."""
    terminal.type(text + "\n")
    return terminal.expect(PROMPT)


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(folder: str, tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    with teletype(["chat", folder, *LONG], before=slow) as terminal:
        terminal.expect(PROMPT)
        terminal.type("w5 w8\n")
        terminal.expect(r"w5 w8\r\n.*w\d+ w\d+")
        terminal.type("\x03")
        assert "stopped, what was said is kept · " in terminal.expect(PROMPT)
        say(terminal, "/temperature 0")
        assert "w6 w7\r\n" in say(terminal, "w5 w9")
        say(terminal, f"/save {file}")
        terminal.type("\x04")
        assert terminal.code() == 0
    messages = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[1]["ended"] is False
    shown = terminal.shown().replace("^C", "")  # the terminal's own echo, wherever it fell
    assert messages[1]["content"] in " ".join(shown.split())
    assert 2 <= len(messages[1]["content"].split()) < 40
    assert messages[3] == {"role": "assistant", "content": "w6 w7"}


def test_ctrl_c_at_the_prompt_clears_the_line_and_says_how_to_leave(folder: str) -> None:
    with teletype(["chat", folder, *GREEDY]) as terminal:
        terminal.expect(PROMPT)
        for typed in ("", "half a li", '"""\n'):
            terminal.type(typed)
            terminal.expect(r"\.\.\.  $" if typed.startswith('"') else f"{typed}$")
            terminal.interrupt()
            assert "/quit or ctrl-D leaves" in terminal.expect(PROMPT)
        assert "w6 w7\r\n" in say(terminal, "w5 w8")
        terminal.type("/quit\n")
        assert terminal.code() == 0
    assert "half a li" not in terminal.shown().split("w5 w8")[1]


def test_keys_of_a_line_editor(folder: str) -> None:
    """Up brings back what was typed, tab completes a command, a pasted text is one message, /edit fills the line."""
    with teletype(["chat", folder, *GREEDY]) as terminal:
        terminal.expect(PROMPT)
        say(terminal, "w5 w8")
        terminal.type("\x1b[A")
        terminal.expect("w5 w8$")
        terminal.type("\x7f9\n")
        terminal.expect(PROMPT)
        terminal.type("/tok\t")
        terminal.expect("/tokens")
        assert "in 4 messages" in say(terminal, "")
        say(terminal, "\x1b[200~w5\nw9\x1b[201~")
        assert "in 6 messages" in say(terminal, "/tokens")
        terminal.type("/edit\n")
        terminal.expect("w5.*w9$")
        assert "w6" in say(terminal, " w10")
        assert "taken back: w5 w9 w10" in say(terminal, "/undo")
        assert "taken back: w5 w9\x1b" in say(terminal, "/undo")
        terminal.type("\x04")
        assert terminal.code() == 0


def test_nothing_that_a_model_says_is_obeyed(speaker: str) -> None:
    with teletype(["chat", speaker, "--temperature", "0", "--max-new-tokens", "20"]) as terminal:
        terminal.expect(PROMPT)
        assert SAYINGS["a"] in say(terminal, "a")
        say(terminal, "/new")
        assert "␛]52;c;QQ==␇␍␛[2J\r\n" in say(terminal, "b")
        terminal.type("\x04")
        assert terminal.code() == 0
    ours = re.compile(r"\x1b\[[0-9;?]*[mhlK]")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", ours.sub("", terminal.seen.decode()))
    assert "\x1b[2m" in terminal.seen.decode()  # notes are dim, so the pattern above has something to forget


def test_a_question_of_a_file_moves_nothing(folder: str, tmp_path: Path) -> None:
    """Neither told nor put on the line to be changed."""
    file = tmp_path / "theirs.jsonl"
    said = [{"role": "user", "content": "q \x9b31m\u202eX \u2028z"}, {"role": "assistant", "content": "b"}]
    file.write_text(json.dumps({"messages": said}))
    with teletype(["chat", folder, *GREEDY]) as terminal:
        terminal.expect(PROMPT)
        assert "loaded 1 turn" in say(terminal, f"/load {file}")
        assert "would move or mislead the terminal" in say(terminal, "/edit")
        assert "taken back: q" in say(terminal, "/undo")
        terminal.type("\x04")
        assert terminal.code() == 0  # a person has seen the fault
    assert not set("\x9b\u202e\u2028") & set(terminal.seen.decode())


def test_bytes_that_are_no_text(folder: str) -> None:
    with teletype(["chat", folder, *GREEDY]) as terminal:
        terminal.expect(PROMPT)
        os.write(terminal.file, b"w5 \xff\xfe\n")
        assert "bytes that are no UTF-8" in terminal.expect(PROMPT)
        assert "w6 w7\r\n" in say(terminal, "w5 w8")
        terminal.type("\x04")
        assert terminal.code() == 0


@pytest.mark.parametrize(("columns", "beside"), [(100, True), (60, False)])
def test_two_models(columns: int, beside: bool, folder: str, rival: str) -> None:
    """Side by side where there is room, else one after the other."""
    flags = ["--versus", rival, *GREEDY]
    with teletype(["chat", folder, *flags], columns=columns) as terminal:
        terminal.expect(PROMPT)
        say(terminal, "w5 w8")
        assert "both go on" in say(terminal, "/pick 1")
        terminal.type("\x04")
        assert terminal.code() == 0
    rows = [re.sub(" +", " ", row) for row in terminal.shown().split("\n")]
    assert ("w6 w7 │ w9 w10 w11" in rows) is beside
    assert ("w6 w7" in rows and "w9 w10 w11" in rows) is not beside


def test_ctrl_c_stops_both(folder: str, rival: str) -> None:
    with teletype(["chat", folder, "--versus", rival, *LONG], before=slow) as terminal:
        terminal.expect(PROMPT)
        terminal.type("w5 w8\n")
        terminal.expect(r"w\d+ .*│ w\d+")
        terminal.type("\x03")
        assert terminal.expect(PROMPT).count("stopped, what was said is kept") == 2
        terminal.type("\x04")
        assert terminal.code() == 0


def test_ctrl_c_while_it_loads(folder: str) -> None:
    def stuck() -> None:
        from kinkajou.chat import talker

        talker.load_language_model = lambda *_: time.sleep(60)  # type: ignore[assignment]

    with teletype(["chat", folder], before=stuck) as terminal:
        terminal.expect("loading ")
        time.sleep(0.2)
        terminal.type("\x03")
        terminal.expect("interrupted")
        assert terminal.code() == 130
    assert "Traceback" not in terminal.shown()


def test_ctrl_c_ends_one_message(folder: str) -> None:
    with teletype(["chat", folder, *LONG, "--message", "w5 w8"], before=slow) as terminal:
        terminal.expect(r"w\d+ w\d+")
        terminal.type("\x03")
        terminal.expect("interrupted")
        assert terminal.code() == 130
