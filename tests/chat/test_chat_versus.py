"""Two models side by side: each with its own tokenizer, template and history, until somebody picks."""

import json
from pathlib import Path

import pytest
from chatting import GREEDY, Talk, by_transformers

from kinkajou.cli import main
from kinkajou.config import ChatConfig


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
