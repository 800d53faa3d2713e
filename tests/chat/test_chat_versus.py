"""Two models side by side: each with its own tokenizer, template and history, until somebody picks."""

import json
import re
from pathlib import Path

import pytest
from chatting import GREEDY, Talk, by_transformers

from kinkajou.chat.conversation import aligned, load
from kinkajou.cli import main
from kinkajou.config import ChatConfig
from small import write_rows


@pytest.fixture
def both(rival: str) -> ChatConfig:
    return ChatConfig(temperature=0.0, max_new_tokens=6, versus=rival)


def test_one_after_the_other_in_a_pipe(folder: str, rival: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--message", "w5 w8", "--temperature", "0", "--max-new-tokens", "6"]
    assert main(["chat", folder, "--versus", rival, *flags]) == 0
    seen = capsys.readouterr()
    one, two = by_transformers(folder, "w5 w8"), by_transformers(rival, "w5 w8")
    assert (one, two) == ("w6 w7", "w9 w10 w11")
    assert seen.out == f"── 1: {folder} ──\n{one}\n── 2: {rival} ──\n{two}\n"
    models, numbers = seen.err.splitlines()[:2], seen.err.splitlines()[2:]
    assert [line.split(": ")[1].split(",")[0] for line in models] == ["llama", "gpt2"]
    assert [line.split(" · ")[0] for line in numbers] == ["1: 2 tokens", "2: 3 tokens"]


def test_each_remembers_its_own_answers(talk: Talk, asked: list[list[str]], both: ChatConfig) -> None:
    talk("w5 w8", "w5 w9", cfg=both)
    assert asked[2:] == [["w5 w8", "w6 w7", "w5 w9"], ["w5 w8", "w9 w10 w11", "w5 w9"]]


@pytest.mark.parametrize(("number", "said"), [(1, "w6 w7"), (2, "w9 w10 w11")])
def test_a_pick_counts_for_both(number: int, said: str, talk: Talk, asked: list[list[str]], both: ChatConfig) -> None:
    seen = talk("w5 w8", f"/pick {number}", "w5 w9", cfg=both)
    assert asked[2:] == [["w5 w8", said, "w5 w9"]] * 2
    assert f"both go on from the answer of {number}: " in seen.err


def test_only_a_model_that_is_there_can_be_picked(talk: Talk, both: ChatConfig) -> None:
    seen = talk("/pick 1", "w5 w8", "/pick 3", "/pick", cfg=both)
    assert seen.err.count("there is no answer of that model to pick") == 1
    assert seen.err.count("/pick 1 or /pick 2") == 2


def test_undo_and_retry_are_for_both(talk: Talk, asked: list[list[str]], both: ChatConfig) -> None:
    talk("w5 w8", "/undo", "w5 w9", "/retry", cfg=both)
    assert asked[2:] == [["w5 w9"]] * 4


def test_the_same_model_twice_says_the_same(talk: Talk, folder: str) -> None:
    """Settings and seeds are the same for both."""
    seen = talk("w30", "/temperature 2", "w30", cfg=ChatConfig(temperature=3.0, max_new_tokens=12, versus=folder))
    lines = seen.answers
    assert lines[1] == lines[3]
    assert lines[5] == lines[7]


def test_both_are_saved_and_come_back(
    talk: Talk, asked: list[list[str]], both: ChatConfig, tmp_path: Path, folder: str, rival: str
) -> None:
    file = tmp_path / "both.jsonl"
    talk("w5 w8", f"/save {file}", cfg=both)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["model"] for row in rows] == [folder, rival]
    talk(f"/load {file}", "w5 w9", cfg=both)
    assert asked[2:] == [["w5 w8", "w6 w7", "w5 w9"], ["w5 w8", "w9 w10 w11", "w5 w9"]]
    talk(f"/load {file} 2", "w5 w9", cfg=GREEDY)
    assert asked[4] == ["w5 w8", "w9 w10 w11", "w5 w9"]


def test_one_that_has_no_room_does_not_silence_the_other(
    talk: Talk, rival: str, speaker: str, asked: list[list[str]]
) -> None:
    """The model of bytes needs more than its 64 positions for what the other reads as 15 words."""
    cfg = ChatConfig(temperature=0.0, max_new_tokens=6, versus=rival)
    question = " ".join(["w5"] * 25)
    seen = talk(question, "w5 w8", cfg=cfg, model=speaker)
    assert seen.answers[1] == "the message is longer than the model's context"
    assert seen.answers[3] == by_transformers(rival, question)
    assert asked[2] == ["w5 w8"]
    assert asked[3] == [question, seen.answers[3], "w5 w8"]


def records(file: Path, *chats: tuple[str, str]) -> str:
    """A record for each system message and the questions to it, a letter each."""
    rows = []
    for system, questions in chats:
        said = [[{"role": "user", "content": q}, {"role": "assistant", "content": "w6"}] for q in questions]
        opening = [{"role": "system", "content": system}] if system else []
        rows.append({"messages": [*opening, *(message for turn in said for message in turn)]})
    return write_rows(file, rows)


@pytest.mark.parametrize(
    ("one", "two", "numbers"),
    [
        ("abc", "ac", ([1, 2, 3], [1, 3])),
        ("ac", "abc", ([1, 3], [1, 2, 3])),
        ("ab", "ab", ([1, 2], [1, 2])),
        ("ab", "cd", ([1, 2], [3, 4])),
        ("abx", "aby", ([1, 2, 3], [1, 2, 4])),
        ("aab", "ab", ([1, 2, 3], [2, 3])),
    ],
)
def test_turns_of_two_are_numbered_by_their_questions(
    one: str, two: str, numbers: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    found = aligned(*load(records(tmp_path / "two.jsonl", ("", one), ("", two))))
    assert tuple([turn.number for turn in x.turns] for x in found) == numbers
    assert ["".join(turn.asked[0].content for turn in x.turns) for x in found] == [one, two]


def test_two_that_drifted_apart_take_the_same_question_back(
    talk: Talk, asked: list[list[str]], both: ChatConfig, tmp_path: Path
) -> None:
    file = records(tmp_path / "two.jsonl", ("", "abc"), ("", "ac"))
    seen = talk(f"/load {file}", "/undo", "/undo", "w5", cfg=both)
    assert "taken back: c\ntaken back: b\n" in seen.err
    assert "loaded 3 turns for 1, 2 turns for 2\n" in seen.err
    assert asked == [["a", "w6", "w5"]] * 2


def test_each_keeps_its_own_system_message(
    talk: Talk, asked: list[list[str]], both: ChatConfig, tmp_path: Path
) -> None:
    """Until one is set for both."""
    file = records(tmp_path / "two.jsonl", ("w20", "a"), ("w21", "a"))
    lines = [f"/load {file}", "/temperature 0", "/system", "/settings", "w5", "/new", "w5", "/system w22", "/new", "w5"]
    seen = talk(*lines, cfg=both)
    assert "; system message of 1: w20; of 2: w21\n" in seen.err
    assert "\nsystem message of 1: w20; of 2: w21\n" in seen.err
    assert re.search(r"\nsystem +1: w20; 2: w21\n", seen.err)
    assert "\nsystem message: w22\n" in seen.err
    assert [messages[0] for messages in asked] == ["w20", "w21"] * 2 + ["w22"] * 2


def test_help_and_a_note_tell_that_two_are_taken(talk: Talk, both: ChatConfig, tmp_path: Path) -> None:
    file = records(tmp_path / "two.jsonl", ("", "a"), ("", "ab"))
    assert "with --versus both of two" in talk("/help", cfg=both).err
    assert "loaded 2 turns, number 2 of 2\n" in talk(f"/load {file}", cfg=GREEDY).err
