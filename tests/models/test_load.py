"""Models from folders: what is saved loads as a plain Hugging Face folder, and what does not fit is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel, ScalarModel
from kinkajou.models.load import LoadOptions, load_language_model, load_scalar_model, save_model
from tiny import FOUR, VOCAB, ragged, save_source, tiny_tokenizer

SHAPES = [*FOUR, "opt-350m", "bloom-6-heads"]
CAUSAL, SCORING = AutoModelForCausalLM, AutoModelForSequenceClassification
LENGTHS = (9, 4, 7)


def batch(pad: int) -> tuple[Tensor, Tensor]:
    tokens, real = ragged(LENGTHS, width=9)
    return tokens.masked_fill(~real, pad), real


def plain_logps(folder: Path, tokens: Tensor, real: Tensor) -> Tensor:
    module = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        logits = module(input_ids=tokens, attention_mask=real.long()).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1) * real[:, 1:]


def plain_scores(folder: Path, tokens: Tensor, real: Tensor) -> Tensor:
    module = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        return module(input_ids=tokens, attention_mask=real.long()).logits.squeeze(-1)


@torch.no_grad()
def our_logps(model: LanguageModel, tokens: Tensor, real: Tensor) -> Tensor:
    return model(tokens, real[:, 1:]).logp


@torch.no_grad()
def our_scores(model: ScalarModel, tokens: Tensor, real: Tensor) -> Tensor:
    return model(tokens, real[:, 1:], at="end")


@torch.no_grad()
def train_a_little(model: LanguageModel | ScalarModel) -> None:
    """Moves every trainable weight, LoRA's zero matrices included."""
    generator = torch.Generator().manual_seed(5)
    for param in model.parameters():
        if param.requires_grad:
            param.add_(0.1 * torch.randn(param.shape, generator=generator))


@pytest.mark.parametrize("name", SHAPES)
def test_language_model_saved_and_loaded_by_transformers(name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_source(tmp_path / "source", CAUSAL, name, tokenizer)
    tokens, real = batch(tokenizer.pad_token_id)
    model = load_language_model(str(tmp_path / "source"), tokenizer)
    torch.testing.assert_close(our_logps(model, tokens, real), plain_logps(tmp_path / "source", tokens, real))
    train_a_little(model)
    save_model(model, tokenizer, tmp_path / "saved")
    want = our_logps(model, tokens, real)
    torch.testing.assert_close(plain_logps(tmp_path / "saved", tokens, real), want, atol=2e-5, rtol=0)
    assert (want - plain_logps(tmp_path / "source", tokens, real)).abs().max() > 0.01
    again = load_language_model(str(tmp_path / "saved"), tokenizer)
    assert torch.equal(our_logps(again, tokens, real), want)


@pytest.mark.parametrize("name", SHAPES)
def test_reward_model_saved_and_loaded_by_transformers(name: str, tmp_path: Path) -> None:
    """Padded batches too: transformers looks for the last token that is not pad, and must find ours."""
    tokenizer = tiny_tokenizer()
    save_source(tmp_path / "source", CAUSAL, name, tokenizer)
    tokens, real = batch(tokenizer.pad_token_id)
    model = load_scalar_model(str(tmp_path / "source"), tokenizer)
    train_a_little(model)
    save_model(model, tokenizer, tmp_path / "saved")
    want = our_scores(model, tokens, real)
    assert want.std() > 0.01
    torch.testing.assert_close(plain_scores(tmp_path / "saved", tokens, real), want, atol=2e-5, rtol=1e-5)
    again = load_scalar_model(str(tmp_path / "saved"), tokenizer, fresh=False)
    # Weights read from a file lie elsewhere in memory, which may round otherwise on some processors.
    torch.testing.assert_close(our_scores(again, tokens, real), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_lora_trains_more_than_the_head_and_saves_merged(name: str, tmp_path: Path) -> None:
    """Contract, item 7: LoRA on GPT-2 converted nothing but the head, and merged or not was lost at saving."""
    tokenizer = tiny_tokenizer()
    save_source(tmp_path / "source", CAUSAL, name, tokenizer)
    tokens, real = batch(tokenizer.pad_token_id)
    plain = load_language_model(str(tmp_path / "source"), tokenizer)
    model = load_language_model(str(tmp_path / "source"), tokenizer, LoadOptions(lora_rank=2))
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in key for key in trained)
    # Every linear layer of both blocks: as many pairs of matrices as plain has matrices in its blocks.
    matrices = [key for key, p in plain.named_parameters() if p.ndim == 2 and (".0." in key or ".1." in key)]
    assert len([key for key in trained if ".0." in key or ".1." in key]) == 2 * len(matrices)
    torch.testing.assert_close(our_logps(model, tokens, real), our_logps(plain, tokens, real))
    train_a_little(model)
    want = our_logps(model, tokens, real)
    assert (want - our_logps(plain, tokens, real)).abs().max() > 0.01
    save_model(model, tokenizer, tmp_path / "saved")
    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    torch.testing.assert_close(plain_logps(tmp_path / "saved", tokens, real), want, atol=5e-5, rtol=0)
    assert torch.equal(our_logps(model, tokens, real), want)  # saving left the model in training as it was


@pytest.mark.parametrize("name", FOUR)
def test_lora_reward_model_saves_merged(name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_source(tmp_path / "source", CAUSAL, name, tokenizer)
    tokens, real = batch(tokenizer.pad_token_id)
    model = load_scalar_model(str(tmp_path / "source"), tokenizer, LoadOptions(lora_rank=2))
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert any("score" in key for key in trained)
    assert sum("lora_" in key for key in trained) > 10
    train_a_little(model)
    want = our_scores(model, tokens, real)
    save_model(model, tokenizer, tmp_path / "saved")
    torch.testing.assert_close(plain_scores(tmp_path / "saved", tokens, real), want, atol=5e-5, rtol=1e-4)
    again = load_scalar_model(str(tmp_path / "saved"), tokenizer, fresh=False)
    torch.testing.assert_close(our_scores(again, tokens, real), want, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FOUR)
def test_an_adapter_folder_loads_with_its_base(name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_source(tmp_path / "source", CAUSAL, name, tokenizer)
    tokens, real = batch(tokenizer.pad_token_id)
    model = load_language_model(str(tmp_path / "source"), tokenizer, LoadOptions(lora_rank=2))
    train_a_little(model)
    want = our_logps(model, tokens, real)
    save_model(model, tokenizer, tmp_path / "adapter", lora="adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = load_language_model(str(tmp_path / "adapter"), tokenizer)
    torch.testing.assert_close(our_logps(again, tokens, real), want, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("fresh", [True, False])
def test_an_adapter_folder_of_a_reward_model_keeps_its_head(name: str, fresh: bool, tmp_path: Path) -> None:
    """Contract, item 7: LoRA reward models did not load in stage 3."""
    tokenizer = tiny_tokenizer()
    save_source(tmp_path / "source", CAUSAL, name, tokenizer)
    tokens, real = batch(tokenizer.pad_token_id)
    model = load_scalar_model(str(tmp_path / "source"), tokenizer, LoadOptions(lora_rank=2))
    train_a_little(model)
    want = our_scores(model, tokens, real)
    save_model(model, tokenizer, tmp_path / "adapter", lora="adapter")
    again = load_scalar_model(str(tmp_path / "adapter"), tokenizer, fresh=fresh)
    torch.testing.assert_close(our_scores(again, tokens, real), want, atol=5e-5, rtol=1e-4)


def test_gradient_checkpointing_with_lora_reaches_the_adapters(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokens, real = batch(tokenizer.pad_token_id)
    for name in FOUR:
        save_source(tmp_path / name, CAUSAL, name, tokenizer)
        grads = []
        for checkpointing in (False, True):
            options = LoadOptions(lora_rank=2, gradient_checkpointing=checkpointing)
            torch.manual_seed(0)
            model = load_language_model(str(tmp_path / name), tokenizer, options)
            train_a_little(model)
            model(tokens, real[:, 1:]).logp.sum().backward()
            grads.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
        assert len(grads[0]) > 10
        for key, want in grads[0].items():
            torch.testing.assert_close(grads[1][key], want, atol=1e-5, rtol=1e-4)


def test_a_fresh_head_is_small_and_seeded(tmp_path: Path) -> None:
    """N(0, 1 / (d + 1)) as a standard deviation: at d = 2047 within 5 % of it."""
    tokenizer = tiny_tokenizer()
    wide = {"hidden_size": 2048, "intermediate_size": 8, "num_hidden_layers": 1}
    save_source(tmp_path, CAUSAL, "llama", tokenizer, **wide)
    weights = [
        load_scalar_model(str(tmp_path), tokenizer, LoadOptions(seed=seed)).module.score.weight for seed in (0, 0, 1)
    ]
    assert weights[0].shape == (1, 2048)
    assert float(weights[0].detach().std()) == pytest.approx(1 / 2049, rel=0.05)
    assert abs(float(weights[0].detach().mean())) < 4 / 2049 / 2048**0.5
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", FOUR)
def test_dropout_is_off_in_training(name: str, tmp_path: Path) -> None:
    """Contract, item 8: dropout in the update alone made the ratio differ from 1 at step 0."""
    tokenizer = tiny_tokenizer()
    keys = {
        "llama": ["attention_dropout"],
        "gpt2": ["resid_pdrop", "embd_pdrop", "attn_pdrop"],
        "opt": ["dropout", "attention_dropout", "activation_dropout", "layerdrop"],
        "bloom": ["hidden_dropout", "attention_dropout"],
    }
    save_source(tmp_path, CAUSAL, name, tokenizer, **dict.fromkeys(keys[name], 0.5))
    tokens, real = batch(tokenizer.pad_token_id)
    model = load_language_model(str(tmp_path), tokenizer)
    scorer = load_scalar_model(str(tmp_path), tokenizer)
    quiet = our_logps(model, tokens, real)
    model.train(), scorer.train()
    assert torch.equal(our_logps(model, tokens, real), quiet)
    assert torch.equal(our_scores(scorer, tokens, real), our_scores(scorer, tokens, real))


def test_the_pad_token_that_we_add_changes_nothing(tmp_path: Path) -> None:
    """A source without a pad token: the embedding grows by one row, alike at every load and unlikely to be said."""
    source = tiny_tokenizer(pad=None)
    entries = len(source)
    for name in FOUR:
        folder = tmp_path / name
        save_source(folder, CAUSAL, name, source, vocab_size=entries)
        tokenizer = tiny_tokenizer(pad=None)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        assert tokenizer.pad_token_id == entries
        tokens, real = ragged(LENGTHS, width=9)
        tokens = tokens.clamp(max=entries - 1)
        before = plain_logps(folder, tokens, real)
        policy, reference = (load_language_model(str(folder), tokenizer) for _ in range(2))
        assert torch.equal(our_logps(policy, tokens, real), our_logps(reference, tokens, real))  # KL 0 at step 0
        grown = our_logps(policy, tokens, real)
        # Hewitt 2021: with the mean of the others as its row, pad takes at most 1 / (n + 1) of the whole.
        assert float((before - grown).max()) <= torch.log(torch.tensor(1 + 1 / entries)) + 1e-5
        assert float((before - grown).min()) >= -1e-5


@pytest.mark.parametrize("scalar", [False, True])
def test_an_adapter_trained_with_our_pad_token_loads(scalar: bool, tmp_path: Path) -> None:
    source = tiny_tokenizer(pad=None)
    tokenizer = tiny_tokenizer(pad=None)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    save_source(tmp_path / "source", CAUSAL, "llama", source, vocab_size=len(source))
    tokens, real = ragged(LENGTHS, width=9)
    tokens = tokens.clamp(max=len(source) - 1)
    load, score = (load_scalar_model, our_scores) if scalar else (load_language_model, our_logps)
    model = load(str(tmp_path / "source"), tokenizer, LoadOptions(lora_rank=2))
    train_a_little(model)
    save_model(model, tokenizer, tmp_path / "adapter", lora="adapter")
    again = load(str(tmp_path / "adapter"), tokenizer)
    torch.testing.assert_close(score(again, tokens, real), score(model, tokens, real), atol=5e-5, rtol=0)


FAULTS = ["missing", "config", "weights-shape", "weights-lost", "family", "too-many-tokens"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("scalar", [False, True])
def test_what_does_not_fit_is_refused(fault: str, scalar: bool, tmp_path: Path) -> None:
    tokenizer, options, said = tiny_tokenizer(), LoadOptions(), [str(tmp_path)]
    save_source(tmp_path, CAUSAL, "llama", tokenizer)
    if fault == "missing":
        (tmp_path / "model.safetensors").unlink()
    elif fault == "config":
        (tmp_path / "config.json").unlink()
        said.append("config.json")
    elif fault == "weights-shape":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 50}))
    elif fault == "weights-lost":
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        said.append("layers.1.mlp.up_proj")
    elif fault == "family":
        options = LoadOptions(family="gpt2")
        said += ["llama", "gpt2"]
    else:
        tokenizer = tiny_tokenizer(words=VOCAB + 10)
        said += [str(len(tokenizer)), str(VOCAB)]
    load = load_scalar_model if scalar else load_language_model
    with pytest.raises(UserError) as refused:
        load(str(tmp_path), tokenizer, options)
    assert all(word in str(refused.value) for word in said)
    assert refused.value.exit_code == 2


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    module = save_source(tmp_path, CAUSAL, "llama", tokenizer)
    (tmp_path / "model.safetensors").unlink()
    module.save_pretrained(str(tmp_path), max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_language_model(str(tmp_path), tokenizer)
    shards[0].unlink()
    with pytest.raises(UserError):
        load_language_model(str(tmp_path), tokenizer)


def test_a_reward_model_is_no_language_model_nor_the_reverse(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_source(tmp_path / "scoring", SCORING, "llama", tokenizer)
    save_source(tmp_path / "speaking", CAUSAL, "llama", tokenizer)
    with pytest.raises(UserError, match="reward model, not a language model"):
        load_language_model(str(tmp_path / "scoring"), tokenizer)
    with pytest.raises(UserError, match="no scalar head"):
        load_scalar_model(str(tmp_path / "speaking"), tokenizer, fresh=False)
    load_scalar_model(str(tmp_path / "scoring"), tokenizer, fresh=False)


def test_a_name_that_is_nothing_is_refused_with_the_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="llama-tiny"):
        load_language_model("nowhere", tiny_tokenizer())
