"""Commands that begin with a slash: what each shows, changes and refuses."""

import json
import re
import stat
from pathlib import Path

import pytest
from chatting import GREEDY, Talk, template_tokens

from kinkajou.chat.conversation import Conversation, Turn
from kinkajou.chat.dialogue import Dialogue
from kinkajou.chat.screen import Screen
from kinkajou.chat.slash import COMMANDS, SETTINGS, obey
from kinkajou.chat.talker import Talker
from kinkajou.config import ChatConfig
from kinkajou.data.records import Message
from kinkajou.data.sources import read_chats
from kinkajou.errors import UserError
from small import Small, write_rows

SAID = {
    "/temperature 0.2": "temperature 0.2",
    "/set temperature 0.2": "temperature 0.2",
    "/temperature": "temperature 0",
    "/top_k 3": "top_k 3",
    "/set min_p 0.1": "min_p 0.1",
    "/repetition_penalty 1.5": "repetition_penalty 1.5",
    "/max_new_tokens 99": "max_new_tokens 99",
    '/stop "a b" \\\\n': "stop 'a b' '\\n'",
    '/stop "é\\n" \\\\x': "stop 'é\\n' '\\\\x'",
    '/stop ""': "stop (none)",
    "/seed 7": "seed 7",
    "/set system you are w5": "system message: you are w5",
    "/system w20": "system message: w20",
    "/system": "no system message",
    "/tokens": "0 tokens in 0 messages, 0% of the context of 64",
    "/new": "a new conversation",
}
REFUSED = {
    "/temperature -1": ("temperature must be at least 0", "seen: /temperature -1"),
    "/temperature nan": ("temperature must be at least 0",),
    "/temperature inf": ("temperature must be finite",),
    "/temperature warm": ("temperature is a number",),
    "/top_k 1.5": ("top_k is a whole number",),
    "/set top_p 3": ("top_p must lie between",),
    "/max_new_tokens 0": ("max_new_tokens must be at least 1",),
    '/stop "a': ("a stop text is not closed",),
    "/set temprature 1": ("there is no setting temprature", "did you mean 'temperature'?"),
    "/set message hi": ("there is no setting message",),
    "/hlep": ("there is no command /hlep", "did you mean 'help'?", "//hlep sends it as a message"),
    "/": ("there is no command /",),
    "/undo 3": ("/undo takes nothing after it",),
    "/undo": ("nothing has been said yet",),
    "/retry": ("nothing to answer again",),
    "/edit": ("nothing has been said yet",),
    "/pick 1": ("there is one model alone", "--versus"),
    "/save": ("say where to",),
    "/save x.txt": ("kept in a .jsonl file", "/save x.txt.jsonl"),
    "/save x.jsonl": ("nothing has been answered yet",),
    "/load": ("say which file",),
    "/load nowhere.jsonl": ("nowhere.jsonl: no such file",),
}


@pytest.mark.parametrize("line", SAID)
def test_what_a_command_says(line: str, talk: Talk) -> None:
    seen = talk(line)
    assert seen.err.splitlines()[1:] == [SAID[line]]
    assert seen.out == ""


@pytest.mark.parametrize("line", REFUSED)
def test_what_a_command_refuses(line: str, talk: Talk, asked: list[list[str]]) -> None:
    """With a sentence; nothing is changed and nothing asked."""
    seen = talk(line, "/settings")
    unchanged = talk("/settings")
    assert all(words in seen.err for words in REFUSED[line])
    assert seen.err.endswith(unchanged.err.split("\n", 1)[1])
    assert not asked


def test_help_names_every_command_and_setting(talk: Talk) -> None:
    lines = talk("/help").err.splitlines()[1:]
    assert all(any(line.startswith(f"/{name}") for line in lines) for name in COMMANDS)
    assert all(name in lines[-4] for name in SETTINGS)
    assert max(map(len, lines)) <= 100


def test_settings_count_from_the_next_answer_on(talk: Talk) -> None:
    seen = talk("w5 w8", "/new", "/max_new_tokens 1", "w5 w8", "/new", "/max_new_tokens 6", "/stop w7", "w5 w8")
    assert seen.answers == ["w6 w7", "w6", "w6"]


def test_the_smallest_temperature_takes_the_likeliest_token(talk: Talk) -> None:
    """Logits divided by it are infinite."""
    seen = talk("/temperature 1e-40", "w5 w8", "/new", "/temperature 1", "/top_p 1e-6", "w5 w8")
    assert seen.answers == ["w6 w7", "w6 w7"]


def test_settings_shows_all_of_them(talk: Talk) -> None:
    cfg = ChatConfig(temperature=0.5, top_k=4, stop=("w9",), system="w20")
    lines = talk("/settings", cfg=cfg).err.splitlines()[1:]
    shown = dict(line.split(maxsplit=1) for line in lines[:-1])
    assert shown == {
        **{"temperature": "0.5", "top_k": "4", "top_p": "1", "min_p": "0", "repetition_penalty": "1"},
        **{"max_new_tokens": "256", "stop": "'w9'", "seed": "0", "system": "w20"},
    }


def test_the_same_seed_again(talk: Talk) -> None:
    """/seed starts the row of samples anew; /retry takes the next one of it."""
    warm = ChatConfig(temperature=3.0, max_new_tokens=12)
    one, again, other, third = talk("w30", "/retry", "/new", "/seed 5", "/seed 0", "w30", "/retry", cfg=warm).answers
    assert (one, again) == (other, third)
    assert one != again


def test_retry_asks_the_same_again(talk: Talk, asked: list[list[str]]) -> None:
    seen = talk("w5 w8", "w5 w9", "/retry")
    assert asked[1:] == [["w5 w8", "w6 w7", "w5 w9"]] * 2
    assert seen.answers[1] == seen.answers[2]  # greedy


def test_a_retry_without_an_answer_leaves_the_old_one(talk: Talk, asked: list[list[str]]) -> None:
    seen = talk("w5 w8", f"/system {'w5 ' * 80}", "/retry", '/system ""', "w5 w9")
    assert "longer than the model's context" in seen.err
    assert asked[-1] == ["w5 w8", "w6 w7", "w5 w9"]


def test_undo_takes_the_last_turn_back(talk: Talk, asked: list[list[str]]) -> None:
    seen = talk("w5 w8", "w5 w9", "/undo", "w5 w10", "/undo", "/undo", "w5 w11")
    assert asked[2:] == [["w5 w8", "w6 w7", "w5 w10"], ["w5 w11"]]
    assert "taken back: w5 w9" in seen.err


def test_edit_sends_something_else_instead(talk: Talk, asked: list[list[str]]) -> None:
    seen = talk("w5 w8", "w30", "/edit w5 w9", "/edit", "w5 w10")
    assert asked[2] == ["w5 w8", "w6 w7", "w5 w9"]
    assert "without a terminal /edit needs the new text" in seen.err
    assert len(asked[3]) == 5  # what could not be edited is still there


def test_an_edit_replaces_the_question_and_nothing_else(talk: Talk, asked: list[list[str]], tmp_path: Path) -> None:
    said = [("user", "w5 w8"), ("system", "w20"), ("assistant", "w6")]
    file = write_rows(
        tmp_path / "kept.jsonl", [{"messages": [{"role": role, "content": content} for role, content in said]}]
    )
    seen = talk(f"/load {file}", "/edit w5 w9", "/undo")
    assert asked == [["w5 w9", "w20"]]
    assert "last asked: w5 w8\n" in seen.err
    assert "taken back: w5 w9\n" in seen.err


@pytest.mark.parametrize("hidden", ["\x9b31m", "\u202e", "\u2028", "\x1b]0;T\x07"])
def test_nothing_hidden_is_put_on_the_line(hidden: str, folder: str) -> None:
    dialogue = Dialogue([Talker(folder, GREEDY)], GREEDY, Screen())
    dialogue.interactive = True
    turn = Turn(1, (Message("user", f"w5{hidden}w8\n\tw9"),), Message("assistant", "w6"))
    dialogue.renew([Conversation("", [turn])])
    with pytest.raises(UserError, match="characters that would move or mislead the terminal"):
        obey(dialogue, "/edit")
    assert dialogue.last() == turn
    two = Turn(1, (Message("user", "w5"), Message("system", "w20")), Message("assistant", "w6"))
    dialogue.renew([Conversation("", [two])])
    with pytest.raises(UserError, match="the last question is 2 messages"):
        obey(dialogue, "/edit")
    dialogue.renew([Conversation("", [Turn(1, (Message("user", "w5 👩\u200d🚀"),), Message("assistant", "w6"))])])
    assert obey(dialogue, "/edit").edit == "w5 👩\u200d🚀"


def test_new_forgets_all_but_the_system_message(talk: Talk, asked: list[list[str]]) -> None:
    cfg = ChatConfig(temperature=0.0, max_new_tokens=6, system="w20")
    talk("w5 w8", "/new", "w5 w9", "/system w21", "/new", "w5 w9", '/system ""', "/new", "w5 w9", "/quit", cfg=cfg)
    assert asked == [["w20", "w5 w8"], ["w20", "w5 w9"], ["w21", "w5 w9"], ["w5 w9"]]


def test_quit_leaves_the_rest_unread(talk: Talk, asked: list[list[str]]) -> None:
    talk("/quit", "w5 w8")
    assert not asked


def test_two_slashes_begin_a_message(talk: Talk, asked: list[list[str]]) -> None:
    talk("//help w5")
    assert asked == [["/help w5"]]


def test_tokens_counts_what_the_template_makes_of_it(talk: Talk, folder: str) -> None:
    seen = talk("w5 w8", "w5 w9", "/tokens")
    turns = ["w5 w8", seen.answers[0], "w5 w9", seen.answers[1]]
    count = template_tokens(folder, *turns)
    assert f"{count} tokens in 4 messages, {count / 64:.0%} of the context of 64" in seen.err


def test_tokens_of_a_system_message_alone(talk: Talk) -> None:
    one, two = (
        int(re.search(r"(\d+) tokens in 1 message, \d+% of", talk(f"/system {text}", "/tokens").err)[1])  # type: ignore[index]
        for text in ("w20", "w20 w20")
    )
    assert two > one > 0


def test_a_saved_conversation_is_a_record_and_comes_back(talk: Talk, asked: list[list[str]], tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    cfg = ChatConfig(temperature=0.0, max_new_tokens=6, system="w20")
    seen = talk("w5 w8", "/max_new_tokens 1", "w5 w9", f"/save {file}", cfg=cfg)
    assert f"saved in {file}\n" in seen.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    kept = read_chats(str(file)).rows[0].messages
    one, two = seen.answers
    assert kept == (
        Message("system", "w20"),
        Message("user", "w5 w8"),
        Message("assistant", one),
        Message("user", "w5 w9"),
        Message("assistant", two, ended=False),  # cut off: nothing may learn that it ends there
    )
    back = talk(f"/load {file}", "w5 w10")
    assert "loaded 2 turns; system message: w20\nlast asked: w5 w9\n" in back.err
    assert asked[-1] == ["w20", "w5 w8", one, "w5 w9", two, "w5 w10"]


def test_sft_learns_from_a_saved_conversation(talk: Talk, tmp_path: Path, small: Small) -> None:
    talk("w5 w8", "w5 w9", f"/save {tmp_path / 'kept.jsonl'}")
    rows = small.run("sft", tmp_path / "run", data=str(tmp_path / "kept.jsonl"), batch_size=1)
    assert rows[-1]["step"] == 1


def test_no_file_of_somebody_else_is_replaced(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    file.write_text("mine\n")
    seen = talk("w5 w8", f"/save {file}")
    assert f"{file} is there already" in seen.err
    assert file.read_text() == "mine\n"
    other = tmp_path / "other.jsonl"
    talk("w5 w8", f"/save {other}", "w5 w9", f"/save {other}")  # its own it replaces
    assert len(json.loads(other.read_text())["messages"]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.jsonl", "other.jsonl"]


def test_a_place_that_cannot_be_written(talk: Talk, tmp_path: Path, asked: list[list[str]]) -> None:
    seen = talk("w5 w8", f"/save {tmp_path}/no/such.jsonl", "w5 w9")
    assert "could not be written" in seen.err
    assert len(asked[-1]) == 3


def test_empty_answers_are_left_out_of_a_file_and_that_is_said(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    cfg = ChatConfig(temperature=0.0, max_new_tokens=6, stop=("w6",))
    seen = talk("w5 w8", f"/save {file}", "/stop w7", "w5 w9", f"/save {file}", cfg=cfg)
    assert "nothing has been answered yet" in seen.err
    assert f"saved in {file}; left out: 1 empty answer\n" in seen.err
    assert [message.role for message in read_chats(str(file)).rows[0].messages] == ["user", "assistant"]


def test_one_of_several_conversations(talk: Talk, asked: list[list[str]], tmp_path: Path) -> None:
    rows = [{"instruction": f"w{i}", "output": f"w{i + 10}"} for i in (30, 31, 32)]
    file = write_rows(tmp_path / "many.jsonl", rows)
    seen = talk(f"/load {file}", "w5", f"/load {file} 1", "w5", f"/load {file} 4", cfg=GREEDY)
    assert asked == [["w32", "w42", "w5"], ["w30", "w40", "w5"]]
    assert "loaded 1 turn, number 3 of 3" in seen.err
    assert "holds 3 conversations" in seen.err


def test_texts_are_no_conversation(talk: Talk, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "texts.jsonl", [{"text": "w5 w6"}])
    assert "holds texts, not conversations" in talk(f"/load {file}").err
