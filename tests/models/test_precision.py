"""bf16 compute: float32 weights stay the truth, the bfloat16 copies follow every change of them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
)

from kinkajou.models import adapters, attention, bloom
from kinkajou.models.forward import ActorCritic, LanguageModel, ScalarModel
from kinkajou.models.heads import scalar_head
from kinkajou.models.load import LoadOptions, finish

VOCAB = 97
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": VOCAB}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, intermediate_size=64, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=64, dropout=0.0, attention_dropout=0.0, word_embed_proj_dim=32),
    "bloom": lambda: BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
    ),
}
TOKENS = (torch.arange(36).view(3, 12) * 7 + 1) % VOCAB
MASK = torch.ones(3, 11, dtype=torch.bool)


def module_of(family: str, *, scalar: bool = False) -> nn.Module:
    torch.manual_seed(3)
    config = CONFIGS[family]()
    config.num_labels, config.pad_token_id = 1, 0
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    module: nn.Module = kind.from_config(config, attn_implementation="eager" if family == "bloom" else attention.NAME)
    if family == "bloom":
        bloom.install(module)
    return module


def language(family: str = "llama", **options: object) -> LanguageModel:
    model = LanguageModel(module_of(family), dtype="bf16")
    finish(model, LoadOptions(**options), scalar=False)  # type: ignore[arg-type]
    for name, param in model.named_parameters():
        if "lora_B" in name:  # else the adapters do nothing
            nn.init.normal_(param, std=0.1, generator=torch.Generator().manual_seed(5))
    return model


def logps(model: nn.Module) -> torch.Tensor:
    out: torch.Tensor = model(TOKENS, MASK).logp
    return out


def in_bfloat16(model: LanguageModel) -> LanguageModel:
    """The same model with its weights themselves cast."""
    cast = copy.deepcopy(model).to(torch.bfloat16)
    cast.dtype = "fp32"  # nothing is bound
    return cast


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    logps(model).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("lora", [0, 4])
def test_it_computes_what_cast_weights_compute_and_trains_float32(family: str, lora: int) -> None:
    model = language(family, lora_rank=lora)
    want = in_bfloat16(model)
    with torch.no_grad():
        torch.testing.assert_close(logps(model), logps(want), atol=2e-2, rtol=0)  # PEFT adds adapters in float32
    held = dict(model.named_parameters())
    got, cast = gradients(model), gradients(want)
    assert dict(model.named_parameters()).keys() == held.keys()
    for name, param in model.named_parameters():  # what LoRA freezes is bf16 for good
        assert param is held[name]
        assert param.dtype == (torch.float32 if param.requires_grad else torch.bfloat16)
    assert got.keys() == cast.keys()
    for name, grad in got.items():
        assert grad.dtype == torch.float32
        if "k_proj" not in name:  # OPT's key bias has no gradient but rounding
            assert float((grad - cast[name].float()).norm()) < 0.05 * float(cast[name].float().norm()), name


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("lora", [0, 4])
def test_a_checkpointed_layer_is_computed_again_with_the_same_weights(family: str, lora: int) -> None:
    want = gradients(language(family, lora_rank=lora))
    got = gradients(language(family, lora_rank=lora, gradient_checkpointing=True))
    assert got.keys() == want.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], atol=0, rtol=0)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "fused": lambda params: AdamW(params, lr=0.1, fused=True),
    "foreach": lambda params: AdamW(params, lr=0.1, foreach=True),
    "sgd": lambda params: SGD(params, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_copies_follow_a_step(name: str) -> None:
    model = language()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    before = logps(model)
    before.sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = logps(model)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, logps(in_bfloat16(model)), atol=2e-2, rtol=0)


def test_the_copies_follow_loaded_and_averaged_weights() -> None:
    model, other = language(), language()
    with torch.no_grad():
        logps(model)
        for param in other.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
        model.load_state_dict(other.state_dict())
        assert torch.equal(logps(model), logps(other))
        model.get_parameter("module.model.embed_tokens.weight").data = torch.ones(VOCAB, 32)
        assert not torch.equal(logps(model), logps(other))


def test_a_weight_is_cast_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language()
    with torch.no_grad():
        logps(model)
    casts = []
    monkeypatch.setattr(torch, "_foreach_copy_", lambda copies, params: casts.append(len(params)))
    for _ in range(3):
        logps(model).sum().backward()
        with torch.no_grad():
            logps(model)
    assert not casts
    SGD(model.parameters(), lr=0.1).step()
    logps(model)
    logps(model)
    assert casts == [len(list(model.parameters()))]


def test_weights_are_restored_after_a_fault() -> None:
    model = language()
    head, embedding = model.inner.get_output_embeddings(), model.inner.get_input_embeddings()
    kept = embedding.weight

    def fail() -> None:
        assert head.weight.dtype == torch.bfloat16
        assert embedding(TOKENS).dtype == torch.bfloat16
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), model.computing():
        fail()
    assert all(layer.weight is kept for layer in (head, embedding))
    assert embedding(TOKENS).dtype == torch.float32


def test_a_bound_model_may_be_bound_again() -> None:
    model = language()
    weight = model.inner.get_output_embeddings()
    with torch.no_grad(), model.computing():
        outer = weight.weight
        with torch.enable_grad(), model.computing():
            assert weight.weight.requires_grad
        assert weight.weight is outer
    assert weight.weight.dtype == torch.float32


def test_scalar_heads_stay_float32() -> None:
    model = ScalarModel(module_of("llama", scalar=True), dtype="bf16")
    seen = []
    model.inner.score.register_forward_hook(lambda head, args, out: seen.append((head.weight.dtype, args[0].dtype)))
    out = model(TOKENS, MASK, at="targets")
    model.freeze()
    assert model.inner.score.weight.dtype == torch.float32
    torch.testing.assert_close(model(TOKENS, MASK, at="targets"), out.detach(), atol=0, rtol=0)
    assert seen == [(torch.float32, torch.float32)] * 2

    actor = ActorCritic(language(), scalar_head(32, seed=0))
    actor.head.register_forward_hook(lambda head, args, out: seen.append((head.weight.dtype, args[0].dtype)))
    actor(TOKENS, MASK)
    assert seen[-1] == (torch.float32, torch.float32)


def test_a_frozen_model_holds_bfloat16_and_says_the_same() -> None:
    model = language()
    with torch.no_grad():
        want = logps(model)
        assert torch.equal(logps(model.freeze()), want)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())

    plain = LanguageModel(module_of("llama")).freeze()
    assert {p.dtype for p in plain.parameters()} == {torch.float32}


def test_adapters_added_later_are_found() -> None:
    model = language()
    with torch.no_grad():
        logps(model)
    model.module = adapters.add_lora(model.module, rank=2, alpha=None, scalar=False)
    with model.computing():
        assert {p.dtype for name, p in model.module.named_parameters() if "embed" not in name} == {torch.bfloat16}
