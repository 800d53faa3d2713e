"""Wrong inputs drawn by Hypothesis, a few of each batch of benchmarks/bad_inputs.py; models that are not there."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.bad_inputs import BATCHES, campaign
from benchmarks.wrong import cases
from benchmarks.wrong.cases import Answer, Case, Good, tried
from safetensors.torch import load_file, save_file

from kinkajou import hub
from kinkajou.cli import main
from kinkajou.errors import UserError
from kinkajou.models.load import load_language_model, load_scalar_model
from small import Small
from tiny import save_source, tiny_tokenizer

COUNTS = {
    "rows": 20,
    "tables": 8,
    "files": 20,
    "places": 10,
    "damage": 15,
    "settings": 25,
    "combinations": 8,
    "models": 15,
}


@pytest.mark.parametrize("batch", COUNTS)
def test_every_wrong_input_is_answered(batch: str, small: Small, tmp_path: Path) -> None:
    good = Good(small.policy, small.judge, small.chats, small.pairs, small.pairs, small.prompts)
    answers = campaign(BATCHES[batch][1], COUNTS[batch], seed=1, good=good, folder=tmp_path)
    assert len(answers) >= COUNTS[batch] // 2
    assert [(a.case.kind, a.faults, a.case.arguments, a.said) for a in answers if not only_slow(a)] == []


def only_slow(answer: Answer) -> bool:
    """Right but for the seconds it took, which other work on the machine decides here; a hang is not."""
    return all(re.fullmatch(r"\d+\.\d s", fault) for fault in answer.faults)


def test_a_hang_is_not_taken_for_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(words: list[str]) -> int:
        time.sleep(60)
        return 2

    monkeypatch.setattr(cases, "HANGS_AFTER_S", 0.1)
    answer = tried(Case("", ["sft"]), hangs, tmp_path)
    assert answer.faults == ("still at work after 0.1 s",)
    assert not only_slow(answer)
    assert only_slow(replace(answer, faults=("2.1 s",)))
    assert not only_slow(replace(answer, faults=("2.1 s", "exit code 0")))


def test_the_judge_of_cases_sees_what_is_wrong(tmp_path: Path) -> None:
    def raises(words: list[str]) -> int:
        raise KeyError("text")

    said = tried(Case("", ["sft"], ["data.jsonl"]), raises, tmp_path).faults
    assert "traceback: KeyError" in said[0]
    assert tried(Case("", ["sft"]), lambda words: 0, tmp_path).faults == ("exit code 0",)
    assert tried(Case("", ["sft"], ["a.jsonl:3"]), lambda words: main(["sft"]), tmp_path).faults == (
        "not named: a.jsonl:3",
    )


def test_a_bad_record_inside_data_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kinkajou.data.sources import read_prompts

    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text('{"v": NaN, "data": [{"prompt": "a"}, {"prompt": "b", "n": NaN}, {"prompt": "c"}]}')
    found = read_prompts("a.json", bad_rows="skip")
    assert [prompt.messages[0].content for prompt in found.rows] == ["a", "c"]
    assert [bad.place for bad in found.skipped] == ["a.json:record 2"]


@pytest.mark.parametrize("name", ["./gone", "/no/such/model", "~/gone", "a/b/c", "there/gone"])
def test_a_path_is_never_asked_for_at_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(hub, "answers", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match="there is no folder"):
        hub.from_disk(name)


def test_a_hub_that_does_not_answer_costs_no_minute(monkeypatch: pytest.MonkeyPatch, small: Small) -> None:
    for name in (*hub.PROXIES, "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.monotonic()
    assert hub.from_disk("some/body")
    assert main(["sft", "--model", "some/body", "--data", small.chats, "--output", "run"]) == 2
    assert time.monotonic() - start < 5


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_source(tmp_path, AutoModelForCausalLM, "llama", tiny_tokenizer())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinity") as fault:
        load_language_model(str(tmp_path), tiny_tokenizer())
    assert "model.norm.weight" in str(fault.value)


@pytest.mark.parametrize("load", [load_language_model, load_scalar_model])
@pytest.mark.parametrize(
    ("layers", "named"), [(1, "model.layers.1."), (True, "num_hidden_layers is true"), (3, "model.layers.2.")]
)
def test_other_layers_than_the_weights_have(load: Any, layers: int, named: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_source(tmp_path, AutoModelForCausalLM, "llama", tiny_tokenizer())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": layers}))
    with pytest.raises(UserError) as fault:
        load(str(tmp_path), tiny_tokenizer())
    assert named in str(fault.value)
    assert str(tmp_path) in str(fault.value)
