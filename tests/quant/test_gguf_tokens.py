"""What GGUF files say of a tokenizer beyond its entries: end tokens, several templates, and how long it takes."""

import time
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoModelForCausalLM

from kinkajou.config import ExportConfig
from kinkajou.data.tokenizer import train_tokenizer
from kinkajou.errors import UserError
from kinkajou.quant.export import export
from tiny import save_source

TEXTS = ["the cat sat on the mat and the dog sat on the log"] * 20
DEFAULT = "{% for m in messages %}{{ m['role'] }}: {% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"


def written(tmp_path: Path, template: Any = None, ends: list[int] | None = None) -> gguf.GGUFReader:
    tokenizer: Any = train_tokenizer(TEXTS, 300)
    tokenizer.chat_template = template
    module: Any = save_source(
        tmp_path / "model", AutoModelForCausalLM, "gpt2", tokenizer, vocab_size=len(tokenizer) + 2
    )
    if ends:
        module.generation_config.eos_token_id = ends
        module.save_pretrained(str(tmp_path / "model"))
    export(str(tmp_path / "model"), ExportConfig(to="gguf", output=str(tmp_path / "x.gguf")))
    return gguf.GGUFReader(str(tmp_path / "x.gguf"))


def field(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def test_three_end_tokens_have_keys(tmp_path: Path) -> None:
    reader = written(tmp_path, ends=[1, 5, 7])
    assert [field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")] == [1, 5, 7]


def test_a_fourth_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="end tokens") as caught:
        written(tmp_path, ends=[1, 5, 7, 9])
    assert "[1, 5, 7, 9]" in caught.value.evidence
    assert not (tmp_path / "x.gguf").exists()


def test_several_templates_come_along(tmp_path: Path) -> None:
    reader = written(tmp_path, {"default": DEFAULT, "tool use": "b", "rag": "{%- generation -%}"})
    assert field(reader, "tokenizer.chat_template") == DEFAULT.replace("{% generation %}", "{% if true %}").replace(
        "endgeneration", "endif"
    )
    assert field(reader, "tokenizer.chat_templates") == ["rag", "tool_use"]
    assert field(reader, "tokenizer.chat_template.tool_use") == "b"
    assert field(reader, "tokenizer.chat_template.rag") == "{%- if true -%}"


@pytest.mark.parametrize("names", [("rag", "tool_use"), ("default", "tool use", "tool_use")])
def test_templates_that_have_no_key_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="chat templates"):
        written(tmp_path, dict.fromkeys(names, "a"))
    assert not (tmp_path / "x.gguf").exists()


def test_rows_without_a_token_are_counted_in_one_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk over all entries for each row takes 22 minutes with GPT-2's 50,257."""
    from transformers import PreTrainedTokenizerFast

    walks, inside = [], PreTrainedTokenizerFast.get_vocab

    def counted(self: Any) -> dict[str, int]:
        walks.append(time.perf_counter())
        return inside(self)

    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab", counted)
    written(tmp_path)
    assert len(walks) < 20
