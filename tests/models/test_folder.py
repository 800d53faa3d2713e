"""Every folder of a model that a run leaves opens in transformers without a warning, whatever the family."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from kinkajou.models.folder import save_shared_critic
from kinkajou.models.forward import ActorCritic, LanguageModel, ScalarModel
from kinkajou.models.heads import scalar_head
from kinkajou.models.load import LoadOptions, load_language_model, load_scalar_model, save_model
from stranger import opened
from tiny import FOUR, ragged, save_source, tiny_tokenizer

FAMILIES = [*FOUR, "opt-350m", "mistral", "qwen3", "gemma3"]
OWN_HEADS = {"tie_word_embeddings": False}
CAUSAL, SCORING = AutoModelForCausalLM, AutoModelForSequenceClassification
LENGTHS = (9, 4, 7)


def loaded(folder: Path, name: str, *, scalar: bool = False, lora: int = 0, **changes: Any) -> Any:
    """A model of ours with every trained weight moved, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    save_source(folder / "source", CAUSAL, name, tokenizer, **changes)
    load = load_scalar_model if scalar else load_language_model
    model = load(str(folder / "source"), tokenizer, LoadOptions(lora_rank=lora))
    move(model)
    return model, tokenizer


@torch.no_grad()
def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for param in model.parameters():
        if param.requires_grad:
            param.add_(0.1 * torch.randn(param.shape, generator=generator))


def batch() -> tuple[Tensor, Tensor]:
    pad = tiny_tokenizer().pad_token_id
    tokens, real = ragged(LENGTHS, width=9)
    return tokens.masked_fill(~real, pad), real


@torch.no_grad()
def logps_of(module: nn.Module) -> Tensor:
    tokens, real = batch()
    logits = module(input_ids=tokens, attention_mask=real.long()).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1) * real[:, 1:]


@torch.no_grad()
def scores_of(module: nn.Module) -> Tensor:
    tokens, real = batch()
    return module(input_ids=tokens, attention_mask=real.long()).logits.squeeze(-1)


@torch.no_grad()
def same_as_ours(module: nn.Module, model: LanguageModel | ScalarModel) -> None:
    tokens, real = batch()
    if isinstance(model, ScalarModel):
        got, want = scores_of(module), model(tokens, real[:, 1:], at="end")
    else:
        got, want = logps_of(module), model(tokens, real[:, 1:]).logp
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_policy_opens_without_a_warning(name: str, lora: int, tied: bool, tmp_path: Path) -> None:
    model, tokenizer = loaded(tmp_path, name, lora=lora, tie_word_embeddings=tied)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    folder = tmp_path / "saved"
    save_model(model, tokenizer, folder, end_ids=[7])
    (folder / "state").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "state" / "optimizer.safetensors")
    (folder / "manifest.json").write_text("{}")
    save_model(model, tokenizer, folder / "ema")
    shutil.rmtree(tmp_path / "source")  # the folder needs nothing beside it
    for place in (folder, folder / "ema"):
        same_as_ours(opened(CAUSAL, place), model)
    kept = AutoTokenizer.from_pretrained(str(folder))
    assert kept.chat_template == tokenizer.chat_template
    ends = GenerationConfig.from_pretrained(str(folder))
    assert ends.eos_token_id == sorted({tokenizer.eos_token_id, 7})
    assert ends.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_reward_model_opens_without_a_warning(name: str, lora: int, tmp_path: Path) -> None:
    model, tokenizer = loaded(tmp_path, name, scalar=True, lora=lora)
    save_model(model, tokenizer, tmp_path / "saved")
    shutil.rmtree(tmp_path / "source")
    same_as_ours(opened(SCORING, tmp_path / "saved"), model)
    assert AutoTokenizer.from_pretrained(str(tmp_path / "saved")).pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_opens_on_its_base(name: str, tmp_path: Path) -> None:
    """Asked for by `--lora_save adapter`: the folder names its base, which has to stay where it is."""
    model, tokenizer = loaded(tmp_path, name, lora=2)
    save_model(model, tokenizer, tmp_path / "saved", lora="adapter")
    assert not list((tmp_path / "saved").glob("model*.safetensors"))
    same_as_ours(opened(CAUSAL, tmp_path / "saved"), model)


def stored(folder: Path) -> dict[str, str]:
    """Each weight's file, as the files themselves say."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                assert key not in found
                found[key] = file.name
    return found


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("lora", [0, 2])
def test_large_weights_are_written_in_shards(lora: int, apart: bool, tmp_path: Path) -> None:
    model, tokenizer = loaded(tmp_path, "llama", lora=lora, **OWN_HEADS)
    save_model(model, tokenizer, tmp_path / "saved", shard="20KB", apart=apart)
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 24_000 for file in files)  # headers come on top
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == stored(tmp_path / "saved")
    assert index["metadata"]["total_size"] == 4 * sum(
        p.numel() for p in opened(CAUSAL, tmp_path / "saved").parameters()
    )
    same_as_ours(opened(CAUSAL, tmp_path / "saved"), model)
    same_as_ours(opened(CAUSAL, tmp_path / "saved"), load_language_model(str(tmp_path / "saved"), tokenizer))


def test_a_file_holds_at_most_five_gigabytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, tokenizer = loaded(tmp_path, "llama")
    asked: list[object] = []
    monkeypatch.setattr(
        type(model.module), "save_pretrained", lambda *_, **given: asked.append(given["max_shard_size"])
    )
    save_model(model, tokenizer, tmp_path / "saved")
    assert asked == ["5GB"]


@torch.no_grad()
def values_at_ends(actor: ActorCritic) -> Tensor:
    """The shared critic's value at each row's last token, from its definition: head times the trunk's last state."""
    tokens, real = batch()
    found = []
    for row, length in zip(tokens, real.sum(1).tolist(), strict=True):
        inner: Any = actor.language.inner
        plain = SCORING.from_config(copy.deepcopy(inner.config), attn_implementation="eager").eval()
        prefix = plain.base_model_prefix
        trunk = getattr(plain, prefix)
        trunk.load_state_dict(getattr(inner, prefix).state_dict())
        hidden = trunk(input_ids=row[None, :length]).last_hidden_state[0, -1]
        found.append(hidden @ actor.head.weight[0])
    return torch.stack(found)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_shared_critic_is_a_folder_without_a_second_trunk(name: str, tied: bool, tmp_path: Path) -> None:
    model, tokenizer = loaded(tmp_path, name, tie_word_embeddings=tied)
    actor = ActorCritic(model, scalar_head(model.width, seed=3))
    with torch.no_grad():
        actor.head.weight.mul_(20)
    policy = tmp_path / "saved"
    save_model(model, tokenizer, policy, apart=True)
    save_shared_critic(model.inner.config, actor.head.weight, tokenizer, policy)
    want = values_at_ends(actor)
    assert want.std() > 0.01
    torch.testing.assert_close(scores_of(opened(SCORING, policy / "critic")), want, atol=5e-5, rtol=1e-4)
    same_as_ours(opened(CAUSAL, policy), model)
    again = load_scalar_model(str(policy / "critic"), tokenizer, fresh=False)
    tokens, real = batch()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens, real[:, 1:], at="end"), want, atol=5e-5, rtol=1e-4)
    own = [file for file in (policy / "critic").glob("*.safetensors") if file.stat().st_nlink == 1]
    assert [file.name for file in own] == ["score.safetensors"]
    assert own[0].stat().st_size < 1000


def test_a_shared_critic_is_copied_where_no_file_has_two_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr("os.link", refuse)
    model, tokenizer = loaded(tmp_path, "llama", **OWN_HEADS)
    save_model(model, tokenizer, tmp_path / "saved", apart=True)
    save_shared_critic(model.inner.config, torch.ones(1, model.width), tokenizer, tmp_path / "saved")
    opened(SCORING, tmp_path / "saved" / "critic")


@pytest.mark.parametrize("name", FOUR)
def test_a_shared_critic_of_lora_merged_and_as_an_adapter(name: str, tmp_path: Path) -> None:
    model, tokenizer = loaded(tmp_path, name, lora=2)
    head = torch.linspace(-1, 1, model.width)[None]
    for form in ("merged", "adapter"):
        save_model(model, tokenizer, tmp_path / form, lora=form, apart=True)
        save_shared_critic(model.inner.config, head, tokenizer, tmp_path / form)
    one = opened(SCORING, tmp_path / "merged" / "critic")
    assert torch.equal(one.score.weight, head)
    other = load_scalar_model(str(tmp_path / "adapter" / "critic"), tokenizer, fresh=False)
    tokens, real = batch()
    with torch.no_grad():
        got = other(tokens, real[:, 1:], at="end")
    torch.testing.assert_close(got, scores_of(one), atol=5e-5, rtol=1e-4)
    plain = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "adapter" / "critic"), num_labels=1)
    torch.testing.assert_close(scores_of(plain.eval()), scores_of(one), atol=5e-5, rtol=1e-4)
