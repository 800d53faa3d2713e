"""What the benchmark of folders makes and says; the programs that open them are no part of the tests."""

from pathlib import Path

import pytest
import torch
from benchmarks.folders import CONFIGS, TOKENS, gap, make, show
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


@pytest.mark.parametrize("family", ["gpt2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_numbers_of_the_folders_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    made = make(family, tmp_path)
    assert set(made) == {"policy", "lora", "adapter", "shards", "reward", "policy/critic", "shards/critic"}
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name, job in made.items():
        auto = AutoModelForCausalLM if job["kind"] == "policy" else AutoModelForSequenceClassification
        module = auto.from_pretrained(str(tmp_path / name)).eval()
        theirs = []
        for row in TOKENS:
            with torch.no_grad():
                out = module(input_ids=torch.tensor([row])).logits[0]
            if job["kind"] == "policy":
                out = out[:-1].log_softmax(-1)[range(len(row) - 1), row[1:]]
            theirs.append(out.tolist())
        assert gap(job["numbers"], theirs) < 1e-4, name
    assert gap(made["policy"]["numbers"], made["lora"]["numbers"]) > 0.01


def test_the_page_has_a_row_for_each_family_and_program() -> None:
    rows = {"policy": {"gap": 1e-7, "said": []}, "reward": {"gap": 3e-6, "said": ["a warning"]}}
    page = show({"families": {"llama": {"trl": rows, "vllm": {"policy": {"gap": 2e-6}}}}})
    assert "| llama | trl | policy, reward | 1 | 3e-06 |" in page
    assert "| llama | vllm | policy | 0 | 2e-06 |" in page
    assert set(CONFIGS) == {"llama", "gpt2", "opt", "bloom", "mistral", "qwen3", "gemma3"}
