"""The reference of `kinkajou prefer`: which model it is, and that what is kept of it is used only where it fits."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kinkajou.errors import UserError
from small import Small, nearly
from tiny import save_source, tiny_tokenizer

ANY = {"warmup": 0.0, "eval_share": 0.1, "batch_size": 6}


def kept(run: Path) -> tuple[str, Tensor]:
    with safe_open(run / "reference.safetensors", framework="pt") as file:
        return file.metadata()["key"], file.get_tensor("logp")


def test_the_kept_reference_is_used_again(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    want = small.run("prefer", run, **ANY)
    key, logp = kept(run)
    capsys.readouterr()
    assert small.run("prefer", run, **ANY, overwrite=True) == want
    assert "log-probabilities of 80 answers from" in capsys.readouterr().out
    # What is in the file is what counts: with other numbers under the same key, the loss is another.
    save_file({"logp": logp - torch.arange(80.0) % 2}, run / "reference.safetensors", metadata={"key": key})
    assert small.run("prefer", run, **ANY, overwrite=True)[0]["margin"] == pytest.approx(-0.1, rel=1e-3)


@pytest.mark.parametrize("change", ["data", "reference", "settings", "broken"])
def test_a_kept_reference_that_does_not_fit_is_computed_again(
    change: str, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    small.run("prefer", run, **ANY)
    key, _ = kept(run)
    pairs = Path(small.pairs).read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(pairs).replace("w3", "w4"))
    changes: dict[str, dict[str, Any]] = {
        "data": {"data": str(tmp_path / "pairs.jsonl")},
        "reference": {"model": "llama-nano", "tokenizer": small.policy},
        "settings": {"ld_alpha": 0.5},
        "broken": {},
    }
    if change == "broken":
        (run / "reference.safetensors").write_bytes(b"torn")
    capsys.readouterr()
    small.run("prefer", run, **ANY, overwrite=True, **changes[change])
    assert "computed again" in capsys.readouterr().out
    assert (kept(run)[0] == key) == (change == "broken")


def test_lora_without_its_adapters_is_the_reference(small: Small, tmp_path: Path) -> None:
    """The same key, the same numbers as the model that it started from, named as the reference."""
    own = {**ANY, "lora_rank": 2, "lr": 1e-2}
    want = small.run("prefer", tmp_path / "one", **own)
    got = small.run("prefer", tmp_path / "two", **own, reference=small.policy)
    assert got == nearly(want)
    assert kept(tmp_path / "one")[0] == kept(tmp_path / "two")[0]
    assert want[-1]["margin"] != 0


def test_a_reference_that_is_not_there(small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model"):
        small.run("prefer", tmp_path / "run", reference=str(tmp_path))
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_reference_of_another_vocabulary(small: Small, tmp_path: Path) -> None:
    """As many entries, and not the same: nothing else would show it."""
    other = tmp_path / "other"
    save_source(other, AutoModelForCausalLM, "llama", tiny_tokenizer())
    words = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(words.replace('"w3"', '"w3000"'))
    with pytest.raises(UserError, match="policy and reference have different vocabularies") as refused:
        small.run("prefer", tmp_path / "run", reference=str(other))
    assert str(other) in refused.value.evidence
    assert not (tmp_path / "run" / "config.toml").exists()


def test_the_reference_weighs_long_answers_as_the_policy_does(small: Small, tmp_path: Path) -> None:
    """LD-DPO at the reference: every margin is 0 again, whatever the lengths."""
    row = small.run("prefer", tmp_path / "run", ld_alpha=0.3)[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["margin"] == pytest.approx(0, abs=1e-6)
    whole = small.run("prefer", tmp_path / "whole")[0]
    assert whole["logp_chosen"] < row["logp_chosen"] - 1
