"""Hostile folders of benchmarks.artefacts are refused by a sentence, and their payloads stay where they are."""

import shutil
from pathlib import Path

import pytest
from benchmarks.artefacts.making import Target
from benchmarks.artefacts.models import IGNORED, MODELS, TOKENIZERS
from benchmarks.hostile import TEMPLATE

from kinkajou.data.chat import ChatFormat
from kinkajou.data.tokenizer import load_tokenizer
from kinkajou.errors import UserError
from kinkajou.models.load import load_language_model
from small import Small
from tiny import tiny_tokenizer


def target(small: Small, tmp_path: Path) -> Target:
    shutil.copytree(small.policy, tmp_path / "evil")
    return Target(tmp_path / "evil", tmp_path / "canary", Path(small.policy))


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, small: Small, tmp_path: Path) -> None:
    evil = target(small, tmp_path)
    MODELS[name](evil)
    with pytest.raises(UserError):
        load_language_model(str(evil.folder), tiny_tokenizer())
    assert not evil.canary.exists()


@pytest.mark.parametrize("name", IGNORED)
def test_what_nobody_looks_at(name: str, small: Small, tmp_path: Path) -> None:
    evil = target(small, tmp_path)
    IGNORED[name](evil)
    load_language_model(str(evil.folder), tiny_tokenizer())
    assert not evil.canary.exists()


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "token 1e400"])
def test_tokenizers(name: str, small: Small, tmp_path: Path) -> None:
    evil = target(small, tmp_path)
    (evil.folder / "chat_template.jinja").write_text(TEMPLATE)
    load_tokenizer(str(evil.folder), template="tokenizer")
    TOKENIZERS[name](evil)
    with pytest.raises(UserError):
        ChatFormat(load_tokenizer(str(evil.folder), template="tokenizer")[0])
    assert not evil.canary.exists()
