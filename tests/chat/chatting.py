"""Models that say something one can expect, and conversations held with them through standard input."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kinkajou import chat
from kinkajou.chat.talker import Answer, Talker
from kinkajou.config import ChatConfig
from kinkajou.data.records import Message
from kinkajou.data.tokenizer import train_tokenizer
from kinkajou.errors import UserError
from small import Small, write_rows
from tiny import save_source, tiny_tokenizer

GREEDY = ChatConfig(temperature=0.0, max_new_tokens=6)
BELL = "\x1b]52;c;QQ==\x07"
"""What writes the clipboard of some terminals."""
SAYINGS = {"a": "é👋中", "b": f"{BELL}\r\x1b[2J"}


@pytest.fixture(scope="session")
def folder(small: Small, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run whose model says, after w5, w6 w7 and ends; and copies nothing else well."""
    run = tmp_path_factory.mktemp("chat")
    rows = [{"instruction": f"w5 {word}", "output": "w6 w7"} for word in ("w8", "w9", "w10", "w11")] * 2
    data = write_rows(run / "data.jsonl", rows)
    small.run("sft", run / "run", data=data, epochs=30, lr=1e-2, template="alpaca")
    return str(run / "run")


@pytest.fixture(scope="session")
def rival(small: Small, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another family, vocabulary and template; it says w9 w10 w11."""
    run = tmp_path_factory.mktemp("rival")
    save_source(run / "source", AutoModelForCausalLM, "gpt2", tiny_tokenizer(words=40), seed=3)
    rows = [{"instruction": f"w5 {word}", "output": "w9 w10 w11"} for word in ("w8", "w9", "w10", "w11")] * 2
    data = write_rows(run / "data.jsonl", rows)
    settings = {"epochs": 30, "lr": 1e-2, "template": "human_assistant", "model": str(run / "source")}
    small.run("sft", run / "run", data=data, **settings)
    return str(run / "run")


@pytest.fixture(scope="session")
def speaker(small: Small, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of bytes that says what SAYINGS has for a letter."""
    run = tmp_path_factory.mktemp("speaker")
    tokenizer = train_tokenizer([], 258)
    save_source(run / "source", AutoModelForCausalLM, "llama", tokenizer, vocab_size=258)
    rows = [{"instruction": letter, "output": said} for letter, said in SAYINGS.items()] * 4
    data = write_rows(run / "data.jsonl", rows)
    settings = {"epochs": 60, "lr": 1e-2, "template": "plain", "model": str(run / "source")}
    small.run("sft", run / "run", data=data, **settings)
    return str(run / "run")


class Seen(NamedTuple):
    out: str
    err: str
    code: int
    """The exit code that the command would have."""
    last: str
    """What the command would say last, on standard error."""

    @property
    def answers(self) -> list[str]:
        return self.out.splitlines()


Talk = Callable[..., Seen]


@pytest.fixture
def talk(folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Holds a conversation of the given lines through a pipe; returns what was printed."""

    def hold(*lines: str, cfg: ChatConfig = GREEDY, model: str = folder) -> Seen:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        code, last = 0, ""
        try:
            chat.talk(model, cfg)
        except UserError as fault:
            code, last = fault.exit_code, str(fault).split("\n")[0]
        return Seen(*capsys.readouterr(), code, last)

    return hold


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the models were asked, a list of contents for each answer."""
    seen: list[list[str]] = []
    answer = Talker.answer

    def spy(self: Talker, messages: list[Message]) -> Answer:
        seen.append([message.content for message in messages])
        return answer(self, messages)

    monkeypatch.setattr(Talker, "answer", spy)
    return seen


def by_transformers(folder: str, *contents: str, max_new_tokens: int = 6) -> str:
    """The greedy answer of the newest checkpoint, by transformers alone and the template in it."""
    newest = max((Path(folder) / "checkpoints").iterdir())
    tokenizer = AutoTokenizer.from_pretrained(newest)
    module = AutoModelForCausalLM.from_pretrained(newest).eval()
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    out = module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def template_tokens(folder: str, *contents: str) -> int:
    """Tokens of a chat that ends with an answer, by transformers alone."""
    newest = max((Path(folder) / "checkpoints").iterdir())
    tokenizer = AutoTokenizer.from_pretrained(newest)
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return len(tokenizer(text, add_special_tokens=False).input_ids)
