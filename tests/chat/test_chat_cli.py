"""Talking to a model through pipes: one message, a conversation, its context, its end."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from chatting import GREEDY, SAYINGS, Talk, by_transformers

from kinkajou.chat.dialogue import Dialogue
from kinkajou.chat.screen import Screen
from kinkajou.chat.talker import Talker
from kinkajou.cli import main
from kinkajou.config import ChatConfig
from kinkajou.data.records import Message
from kinkajou.engine.session import Said, Session
from small import Small


def test_one_message(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer alone on standard output; model and numbers on standard error."""
    assert main(["chat", folder, "--message", "w5 w8", "--temperature", "0", "--max-new-tokens", "6"]) == 0
    seen = capsys.readouterr()
    assert seen.out == by_transformers(folder, "w5 w8") + "\n" == "w6 w7\n"
    model, numbers = seen.err.splitlines()
    assert model.startswith(folder)
    assert "llama, 21.7 k parameters, float32, cpu, context 64 tokens" in model
    assert numbers.startswith("2 tokens · ")
    assert "tokens/s" in numbers
    assert "\x1b" not in seen.out + seen.err


def test_a_checkpoint_is_a_model_too(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    newest = max((Path(folder) / "checkpoints").iterdir())
    assert main(["chat", str(newest), "--message", "w5 w9", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip() == "w6 w7"


def test_weights_of_eight_bits(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--message", "w5 w8", "--temperature", "0", "--max-new-tokens", "6", "--bits", "8"]
    assert main(["chat", folder, *flags]) == 0
    seen = capsys.readouterr()
    assert seen.out == "w6 w7\n"
    assert "llama, 21.7 k parameters, int8, cpu" in seen.err


@pytest.mark.parametrize("message", ["", "  \n", "\udcff"])
def test_a_message_that_is_none(message: str, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", folder, "--message", message]) == 2
    assert "the message is empty, or not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "words"), [("--system", "system message"), ("--stop", "stop text")])
def test_settings_that_are_no_text(flag: str, words: str, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", folder, "--message", "w5", flag, "a\udcff"]) == 2
    assert f"a {words} is not UTF-8" in capsys.readouterr().err


def test_a_conversation_remembers(talk: Talk, asked: list[list[str]], folder: str) -> None:
    seen = talk("w5 w8", "  ", "w5 w9")
    assert asked == [["w5 w8"], ["w5 w8", "w6 w7", "w5 w9"]]
    assert seen.answers == ["w6 w7", by_transformers(folder, *asked[1])]


def test_lines_that_go_on(talk: Talk, asked: list[list[str]]) -> None:
    talk("w5\\", "w8", "/new", '"""', " w5", "", 'w9"""', "/new", '"""w5"""', "/new", '""" w5', "w9")
    assert asked == [["w5\nw8"], ["w5\n\nw9"], ["w5"], ["w5\nw9"]]


def test_the_end_of_input_ends_a_line_that_goes_on(talk: Talk, asked: list[list[str]]) -> None:
    talk("w5 w8", "/new", "w5 w9\\")
    assert asked == [["w5 w8"], ["w5 w9"]]


def test_the_same_seed_says_the_same_and_turns_differ(talk: Talk) -> None:
    warm = ChatConfig(temperature=3.0, max_new_tokens=12)
    one, two = talk("w30", "/new", "w30", cfg=warm), talk("w30", "/new", "w30", cfg=warm)
    assert one.out == two.out
    first, second = one.answers
    assert first != second
    assert talk("w30", cfg=ChatConfig(temperature=3.0, max_new_tokens=12, seed=1)).out not in one.out


def test_stop_texts_end_an_answer_and_are_not_said(talk: Talk) -> None:
    """Also one that is two tokens, whose beginning comes before it is known."""
    for stop, said in (("w7", "w6"), ("6 w", "w"), ("w6", ""), ("w7 w", "w6 w7")):
        seen = talk("w5 w8", cfg=ChatConfig(temperature=0.0, max_new_tokens=6, stop=(stop,)))
        assert seen.out.strip() == said
    assert "\n1 token · " in talk("w5 w8", cfg=ChatConfig(temperature=0.0, max_new_tokens=6, stop=("w6",))).err


@pytest.mark.parametrize(("system", "left"), [("", 0), ("w20", 1)])
def test_the_oldest_turns_make_room(system: str, left: int, talk: Talk, asked: list[list[str]], folder: str) -> None:
    """64 positions: what has no room is left out of the prompt, and that is said; the system message stays."""
    lines = [f"w5 {' '.join(['w8'] * 9)}"] * 6
    seen = talk(*lines, cfg=ChatConfig(temperature=0.0, max_new_tokens=4, system=system))
    notes = re.findall(r" · (\d) messages from the beginning left out: the context is full\n", seen.err)
    missing = []
    talker = Talker(folder, ChatConfig(max_new_tokens=4))
    for messages in asked:  # the same by trying every number of messages
        roles = ["system"] * left + ["user", "assistant"] * len(messages)
        whole = [Message(role, text) for role, text in zip(roles, messages, strict=False)]  # type: ignore[arg-type]
        options = [whole[:left] + whole[left + 2 * k :] for k in range(len(whole) // 2 + 1)]
        fitting = [turns for turns in options if len(talker.form.prompt(turns)) <= 64 - 4]
        prompt, gone = talker.fitting(whole)
        assert prompt == talker.form.prompt(fitting[0])
        assert gone == len(whole) - len(fitting[0])
        missing += [gone] if gone else []
    assert missing == list(map(int, notes))
    assert len(missing) >= 3


def test_a_question_longer_than_the_context_is_not_kept(talk: Talk, asked: list[list[str]]) -> None:
    seen = talk("w5 w8", " ".join(["w5"] * 80), "w5 w9")
    assert "longer than the model's context" in seen.err
    assert "positions for 64" in seen.err
    assert len(seen.answers) == 2
    assert asked[2] == ["w5 w8", "w6 w7", "w5 w9"]


@pytest.mark.parametrize(
    ("system", "message", "words"),
    [
        (70, 3, "the system message is longer than the model's context"),
        (3, 80, "the message is longer than the model's context"),
        (40, 40, "the system message and the message are together longer than the model's context"),
    ],
)
def test_what_is_too_long_is_named(system: int, message: int, words: str, talk: Talk) -> None:
    cfg = ChatConfig(temperature=0.0, max_new_tokens=6, system=" ".join(["w20"] * system))
    seen = talk(" ".join(["w5"] * message), cfg=cfg)
    assert f"error: {words}\n" in seen.err
    assert ("/system" in seen.err) is (system > 3)


def test_an_answer_ends_where_the_context_does(talk: Talk) -> None:
    seen = talk(" ".join(["w5"] * 50), cfg=ChatConfig(temperature=5.0, max_new_tokens=500))
    assert 0 < len(seen.out.split()) < 20
    assert "cut: the context is full" in seen.err


def test_an_answer_that_is_cut_says_so(talk: Talk) -> None:
    seen = talk("w5 w8", cfg=ChatConfig(temperature=0.0, max_new_tokens=1))
    assert seen.out == "w6\n"
    assert "1 token · " in seen.err
    assert "cut: /max_new_tokens 2 allows more" in seen.err


def test_one_message_that_is_too_long_is_an_error(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", folder, "--message", " ".join(["w5"] * 80)]) == 2
    assert "longer than the model's context" in capsys.readouterr().err


def test_what_is_no_model(small: Small, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, words in ((str(tmp_path / "nowhere"), "nowhere"), (small.judge, "reward model")):
        for arguments in ([wrong], [folder, "--versus", wrong]):
            assert main(["chat", *arguments, "--message", "w5"]) == 2
            said = capsys.readouterr().err
            assert words in said
            assert "Traceback" not in said


def test_pieces_are_whole_characters(speaker: str) -> None:
    talker = Talker(speaker, ChatConfig(temperature=0.0, max_new_tokens=20))
    pieces = list(talker.answer([Message("user", "a")]))
    said = SAYINGS["a"]
    assert by_transformers(speaker, "a", max_new_tokens=20) == said
    assert [piece for piece in pieces if piece] == list(said)
    assert len(pieces) == len(said.encode()) + 1  # a byte a step, and the end token


def test_what_a_model_says_never_moves_the_terminal(speaker: str, talk: Talk) -> None:
    assert by_transformers(speaker, "b", max_new_tokens=20) == SAYINGS["b"]
    seen = talk("b", cfg=ChatConfig(temperature=0.0, max_new_tokens=20), model=speaker)
    assert seen.out == "␛]52;c;QQ==␇␍␛[2J\n"


def test_what_is_said_is_kept_as_it_was(speaker: str, talk: Talk, tmp_path: Path) -> None:
    """The stand-ins are the terminal's alone: the conversation has what the model said."""
    file = tmp_path / "kept.jsonl"
    talk("b", f"/save {file}", cfg=ChatConfig(temperature=0.0, max_new_tokens=20), model=speaker)
    assert json.loads(file.read_text())["messages"][1]["content"] == SAYINGS["b"]


def test_an_interrupted_step_does_not_spoil_the_next_answer(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dialogue = Dialogue([Talker(folder, GREEDY)], GREEDY, Screen())
    monkeypatch.setattr(Session, "_taken", interrupted(Session._taken))
    with pytest.raises(KeyboardInterrupt):
        dialogue.ask([Message("user", "w5 w9")])
    kept = dialogue.conversations[0].turns
    assert [(turn.answer.content, turn.answer.ended) for turn in kept] == [("w6", False)]
    monkeypatch.undo()
    dialogue.take_back()
    dialogue.ask([Message("user", "w5 w8")])
    assert kept[-1].answer == Message("assistant", "w6 w7")


def interrupted(method: Callable[..., list[Said]]) -> Callable[..., list[Said]]:
    """The second call is cut short, and leaves a session whose answers have no end."""
    calls = []

    def cut(self: Session, *arguments: object) -> list[Said]:
        calls.append(1)
        if len(calls) == 2:
            self.ends = set()
            raise KeyboardInterrupt
        return method(self, *arguments)

    return cut
