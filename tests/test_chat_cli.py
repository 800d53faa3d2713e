"""Talking to a model in the terminal: one message, a conversation, its commands, its end."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kinkajou import chat
from kinkajou.cli import main
from kinkajou.config import ChatConfig
from small import Small, write_rows

GREEDY = ChatConfig(temperature=0.0, max_new_tokens=6)
Talk = Callable[..., str]


@pytest.fixture(scope="module")
def folder(small: Small, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run whose model says, after w5, w6 w7 and ends; and copies nothing else well."""
    run = tmp_path_factory.mktemp("chat")
    rows = [{"instruction": f"w5 {word}", "output": "w6 w7"} for word in ("w8", "w9", "w10", "w11")] * 2
    data = write_rows(run / "data.jsonl", rows)
    small.run("sft", run / "run", data=data, epochs=30, lr=1e-2, template="alpaca")
    return str(run / "run")


@pytest.fixture
def talk(folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Holds a conversation of the given lines, then EOF; returns what was printed.  `talk.seen` has the messages."""

    def hold(*lines: str | type[BaseException], cfg: ChatConfig = GREEDY) -> str:
        left: Iterator[str | type[BaseException]] = iter(lines)

        def read(prompt: str) -> str:
            line = next(left, EOFError)
            if isinstance(line, str):
                return line
            raise line

        capsys.readouterr()
        chat.talk(folder, cfg, read=read)
        assert next(left, None) is None  # every line was asked for
        return capsys.readouterr().out

    return hold


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the model was asked, a list of contents for each answer."""
    seen: list[list[str]] = []
    answer = chat.Talker.answer

    def spy(self: chat.Talker, messages: list[chat.Message]) -> Iterator[str]:
        seen.append([message.content for message in messages])
        return answer(self, messages)

    monkeypatch.setattr(chat.Talker, "answer", spy)
    return seen


def by_transformers(folder: str, message: str) -> str:
    """The greedy answer of the newest checkpoint, by transformers alone and the template in it."""
    newest = max((Path(folder) / "checkpoints").iterdir())
    tokenizer = AutoTokenizer.from_pretrained(newest)
    module = AutoModelForCausalLM.from_pretrained(newest).eval()
    turns = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_one_message(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", folder, "--message", "w5 w8", "--temperature", "0", "--max-new-tokens", "6"]) == 0
    said = capsys.readouterr().out.strip()
    assert said == by_transformers(folder, "w5 w8") == "w6 w7"


def test_a_checkpoint_is_a_model_too(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    newest = max((Path(folder) / "checkpoints").iterdir())
    assert main(["chat", str(newest), "--message", "w5 w9", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip() == "w6 w7"


def test_a_conversation_remembers(talk: Talk, asked: list[list[str]]) -> None:
    said = talk("w5 w8", "  ", "w5 w9")
    assert said.count("w6 w7") == 2
    assert asked == [["w5 w8"], ["w5 w8", "w6 w7", "w5 w9"]]


def test_new_forgets_all_but_the_system_message(talk: Talk, asked: list[list[str]]) -> None:
    talk("w5 w8", "/new", "w5 w9", "/quit", cfg=ChatConfig(temperature=0.0, max_new_tokens=6, system="w20"))
    assert asked == [["w20", "w5 w8"], ["w20", "w5 w9"]]


def test_an_unknown_command_shows_help(talk: Talk, asked: list[list[str]]) -> None:
    assert talk("/nwe", "/quit").count(chat.HELP) == 2
    assert not asked


@pytest.mark.parametrize("end", ["/quit", EOFError, KeyboardInterrupt])
def test_ways_to_leave(end: str | type[BaseException], talk: Talk, asked: list[list[str]]) -> None:
    talk("w5 w8", end)
    assert len(asked) == 1


def test_ctrl_c_stops_an_answer_and_not_the_conversation(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said so far stays in the history."""
    seen: list[list[str]] = []

    def interrupted(self: chat.Talker, messages: list[chat.Message]) -> Iterator[str]:
        seen.append([message.content for message in messages])
        yield "w6"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.Talker, "answer", interrupted)
    assert talk("w5", "w8").count("w6 [stopped]") == 2
    assert seen == [["w5"], ["w5", "w6", "w8"]]


def test_the_same_seed_says_the_same_and_turns_differ(talk: Talk) -> None:
    warm = ChatConfig(temperature=3.0, max_new_tokens=12)
    one, two = talk("w30", "/new", "w30", cfg=warm), talk("w30", "/new", "w30", cfg=warm)
    assert one == two
    first, second = one.removeprefix(chat.HELP).split("\n")[1:3]
    assert first != second
    assert talk("w30", cfg=ChatConfig(temperature=3.0, max_new_tokens=12, seed=1)) not in one


def test_the_context_bounds_an_answer_and_a_conversation(
    folder: str, capsys: pytest.CaptureFixture[str], asked: list[list[str]]
) -> None:
    """64 positions: a conversation beyond them gets the sentence and goes on without what was too long."""
    lines = iter(["w5 w8", " ".join(["w5"] * 80), "w5 w9", "/quit"])
    chat.talk(folder, GREEDY, read=lambda prompt: next(lines))
    seen = capsys.readouterr()
    assert "longer than the model's context" in seen.err
    assert "positions for 64" in seen.err
    assert "/new" in seen.err
    assert seen.out.count("w6 w7") == 2
    assert asked[2] == ["w5 w8", "w6 w7", "w5 w9"]


def test_an_answer_ends_where_the_context_does(talk: Talk) -> None:
    said = talk(" ".join(["w5"] * 50), cfg=ChatConfig(temperature=5.0, max_new_tokens=500))
    assert 0 < len(said.removeprefix(chat.HELP).split()) < 20


def test_one_message_that_is_too_long_is_an_error(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", folder, "--message", " ".join(["w5"] * 80)]) == 2
    assert "longer than the model's context" in capsys.readouterr().err


def test_what_is_no_model(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, words in ((str(tmp_path / "nowhere"), "nowhere"), (small.judge, "reward model")):
        assert main(["chat", wrong, "--message", "w5"]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert "Traceback" not in said
