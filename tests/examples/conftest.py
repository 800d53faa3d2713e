"""The example scripts as modules: they import `coati_flags` from their own folder, as when they are run."""

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tiny import save_source, tiny_tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A llama base model whose words are w3 ... w94."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    save_source(folder, AutoModelForCausalLM, "llama", tiny_tokenizer(), max_position_embeddings=256)
    return str(folder)


@pytest.fixture(scope="session")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A llama reward model with the base model's vocabulary."""
    folder = tmp_path_factory.mktemp("scorer") / "llama"
    save_source(folder, AutoModelForSequenceClassification, "llama", tiny_tokenizer(), max_position_embeddings=256)
    return str(folder)
