"""What `kinkajou quantize` reads and says: how much of a text, faults of reading, names with brackets, far models."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from kinkajou.config import QuantizeConfig
from kinkajou.data.chat import ChatFormat
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.errors import UserError
from kinkajou.quant import command, gptq
from kinkajou.quant.gate import distance
from kinkajou.quant.text import read_rows
from tiny import save_source, tiny_tokenizer

WORDS = [f"w{3 + i * i % 90}" for i in range(60_000)]
SIZE = {"hidden_size": 64, "intermediate_size": 64}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_source(tmp_path / "model", AutoModelForCausalLM, "llama", tiny_tokenizer(words=94), **SIZE)
    (tmp_path / "text.txt").write_text(" ".join(WORDS[:300]))
    return tmp_path / "model"


def form_of(model: Path) -> ChatFormat:
    return ChatFormat(load_tokenizer(str(model))[0])


def quantized(model: Path, **settings: Any) -> Path:
    given = {"data": str(model.parent / "text.txt"), "output": str(model.parent / "out"), "max_kl": 10.0}
    cfg = QuantizeConfig(**{**given, **settings})
    command.quantize(str(model), cfg)
    return Path(cfg.output)


def unread(*args: object, **settings: object) -> None:
    raise AssertionError("the slow work began")


def test_of_a_large_text_no_more_is_read_than_is_used(model: Path, tmp_path: Path) -> None:
    path, form = tmp_path / "large.txt", form_of(model)
    path.write_text(" ".join(WORDS))
    whole = form.tokenizer(" ".join(WORDS)).input_ids
    seen: list[int] = []
    cut = form.tokenizer._encode_plus

    def counted(text: Any, *args: Any, **settings: Any) -> Any:
        seen.append(len(text))
        return cut(text, *args, **settings)

    form.tokenizer._encode_plus = counted
    found = read_rows(str(path), form, 64, 512)
    assert sum(map(len, found.rows)) == 512
    assert [i for row in found.rows for i in row] == whole[:512]
    assert found.cut
    assert seen
    assert sum(seen) < 40_000


@pytest.mark.parametrize("text", ["w5 " * 40, "w5 \u00e9\u4e2d " * 200])
def test_a_small_text_is_read_whole(text: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text(text, encoding="utf-8")
    form = form_of(model)
    found = read_rows(str(tmp_path / "small.txt"), form, 16, 1000)
    assert [i for row in found.rows for i in row] == form.tokenizer(text).input_ids[: sum(map(len, found.rows))]
    assert not found.cut


def test_how_much_was_read_is_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "large.txt").write_text(" ".join(WORDS))
    large, text = str(tmp_path / "large.txt"), str(tmp_path / "text.txt")
    told = json.loads((quantized(model, data=large, calibrate=text, gate_tokens=96) / "gate.json").read_text())["text"]
    assert told == "the first 96 tokens of large.txt"
    said = " ".join(capsys.readouterr().out.split())
    assert told in said
    assert "fitted to 300 tokens of text.txt" in said


@pytest.mark.parametrize("flag", ["data", "calibrate"])
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_text_that_cannot_be_read_is_told_by_its_own_name(
    flag: str, ending: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"memory.{ending}"
    path.symlink_to("/proc/self/mem")
    monkeypatch.setattr(command, "quantised_module", unread)
    with pytest.raises(UserError, match=f"{path.name}: cannot be read") as caught:
        quantized(model, **{flag: str(path)})
    assert "Input/output error" in caught.value.evidence
    assert not (tmp_path / "out").exists()


def test_faults_of_the_calibration_text_are_told_before_the_slow_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "quantised_module", unread)
    monkeypatch.setattr("kinkajou.quant.text.own_text", unread)
    for calibrate, told in (("absent.txt", "no such file"), ("absent.jsonl", "no such file")):
        with pytest.raises(UserError, match=told):
            quantized(model, data="", calibrate=str(tmp_path / calibrate))
    monkeypatch.setattr(command, "load_language_model", unread)
    with pytest.raises(UserError, match="must not read the text"):
        quantized(model, calibrate=str(tmp_path / "text.txt"))


def found(**changes: Any) -> dict[str, Any]:
    near = {"kl": 0.0, "agreement": 1.0, "perplexity": 2.0, "perplexity_after": math.inf}
    rates = {"before": 1.0, "after": 2.0, "answers": 3}
    sizes = {"fp32_bytes": 4, "bytes": 1, "size_ratio": 0.25}
    told = {"not_quantised": ["a[/x]", "b[bold]", "c", "d", "e"], "tokens_per_s": rates}
    return {"kinkajou": near, "transformers": near, **sizes, **told, **changes}


@pytest.mark.parametrize("name", ["sft[bold]v2", "a[/x]"])
def test_names_with_brackets_are_shown_as_they_are(name: str) -> None:
    class Shown:
        source, scalar, limit = name, False, 0.01
        cfg = QuantizeConfig(output="x")

        class text:
            told = "9 tokens of [/y].txt"

    console = Console(width=140, file=io.StringIO())
    console.print(command.page(found(), Shown()))  # type: ignore[arg-type]
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{name} with 8-bit weights, on 9 tokens of [/y].txt" in said
    assert "a[/x], b[bold], c, d and 1 more" in said
    assert "3 answers at once" in said


def test_logits_beyond_all_measure_are_infinitely_far() -> None:
    def flat(row: Any) -> torch.Tensor:
        return torch.zeros(len(row), 5)

    def far(row: Any) -> torch.Tensor:
        return flat(row) + torch.tensor([0.0, 1e4, 0, 0, 0])

    near = distance(flat, far, [[0, 0, 2, 3]])
    assert near.perplexity_after == math.inf
    assert near.perplexity == pytest.approx(5)
    assert near.kl == pytest.approx(1e4 * 4 / 5 - math.log(5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bits", [8, 4])
def test_activations_that_are_no_numbers_are_told_of(bits: int, bad: float) -> None:
    moment = torch.eye(64)
    moment[3, 5] = moment[5, 3] = bad
    with pytest.raises(UserError, match="calibration text") as caught:
        gptq.fitted(torch.nn.Linear(64, 8), moment, bits, name="layers.0.up")
    assert "layers.0.up" in caught.value.evidence
