"""The tiled head against its definition, written out here in float64 with every logit in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from kinkajou.batch import Sampling, TokenBatch
from kinkajou.models import linear_logp as tiled
from kinkajou.models.forward import LanguageModel
from kinkajou.models.linear_logp import Head, linear_logp
from kinkajou.train.sft import token_loss
from tiny import PAD, ragged, tiny_config

K, C, V = 13, 7, 61
TILES = [1, 4, 5, 13, 100]


@pytest.fixture(params=TILES)
def rows(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    set_rows(monkeypatch, request.param)
    return int(request.param)


def set_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(tiled, "ROWS", rows)
    monkeypatch.setitem(tiled.TILE, "cpu", 0)


@pytest.fixture(params=["kept", "made again"])
def kept(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled.KEPT, "cpu", K * V if request.param == "kept" else K * V - 1)


def tensors(*, bias: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(2)
    given = {"hidden": torch.randn(K, C, generator=made), "weight": 2 * torch.randn(V, C, generator=made)}
    if bias:
        given["bias"] = torch.randn(V, generator=made)
    return {name: x.to(dtype).float().requires_grad_() for name, x in given.items()}  # what the compute type can hold


TARGETS = torch.arange(K) * 17 % V
SLOPE = torch.linspace(-2, 1, K)


def defined(given: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """log-probabilities, entropies, and the gradients of sum(slope x log-probability)."""
    own = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    logp, entropy = [], []
    for h, y in zip(own["hidden"], TARGETS.tolist(), strict=True):
        x = own["weight"] @ h
        if "bias" in own:
            x = x + own["bias"]
        e = (x / temperature).exp()
        p = e / e.sum()
        logp.append(p[y].log())
        entropy.append(-(p * p.log()).sum().detach())
    (torch.stack(logp) * SLOPE.double()).sum().backward()
    return (
        torch.stack(logp).detach(),
        torch.stack(entropy),
        {name: x.grad for name, x in own.items() if x.grad is not None},
    )


def head_of(given: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Head:
    used = {name: x.detach().to(dtype) for name, x in given.items() if name != "hidden"}
    return Head(given["weight"], given.get("bias"), used["weight"], used.get("bias"))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], rel: float) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert float((got[name].double() - x).norm()) <= rel * float(x.norm()), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_it_is_its_definition(rows: int, kept: None, temperature: float, bias: bool) -> None:
    given = tensors(bias=bias)
    want_logp, want_entropy, want = defined(given, temperature)
    logp, entropy = linear_logp(given["hidden"], head_of(given), TARGETS, temperature=temperature, entropy=True)
    assert entropy is not None
    (logp * SLOPE).sum().backward()
    torch.testing.assert_close(logp.detach().double(), want_logp, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), want_entropy, atol=1e-5, rtol=1e-6)
    assert not entropy.requires_grad
    assert_close({name: x.grad for name, x in given.items() if x.grad is not None}, want, 1e-6)
    with torch.no_grad():
        again, none = linear_logp(given["hidden"], head_of(given), TARGETS, temperature=temperature)
    assert none is None
    torch.testing.assert_close(again, logp.detach(), atol=0, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_a_known_slope_gives_the_same(rows: int, weight: float, bias: bool) -> None:
    """Gradients made in the forward pass, scaled by what the loss is multiplied with."""
    given = tensors(bias=bias)
    want_logp, _, want = defined(given, 0.6)
    logp, _ = linear_logp(given["hidden"], head_of(given), TARGETS, temperature=0.6, slope=SLOPE)
    torch.testing.assert_close(logp.detach().double(), want_logp, atol=1e-5, rtol=1e-6)
    (weight * (logp * SLOPE).sum()).backward()
    scaled = {name: weight * x for name, x in want.items()}
    assert_close({name: x.grad for name, x in given.items() if x.grad is not None}, scaled, 1e-6)


@pytest.mark.parametrize("slope", [None, SLOPE])
def test_bfloat16_is_near(rows: int, slope: Tensor | None) -> None:
    """float32 softmax and sums: what is left is the rounding of logits and of the products' factors."""
    given = tensors(bias=True, dtype=torch.bfloat16)
    want_logp, want_entropy, want = defined(given, 1.0)
    hidden = given["hidden"].bfloat16()
    logp, entropy = linear_logp(hidden, head_of(given, torch.bfloat16), TARGETS, entropy=True, slope=slope)
    assert entropy is not None
    (logp * SLOPE).sum().backward()
    torch.testing.assert_close(logp.detach().double(), want_logp, atol=0.1, rtol=0)  # logits of up to 16
    torch.testing.assert_close(entropy.double(), want_entropy, atol=0.1, rtol=0)
    assert given["weight"].grad is not None
    assert given["weight"].grad.dtype == torch.float32
    assert_close({name: x.grad for name, x in given.items() if x.grad is not None}, want, 0.02)


def test_a_broken_promise_is_a_fault() -> None:
    given = tensors(bias=False)
    logp, _ = linear_logp(given["hidden"], head_of(given), TARGETS, slope=SLOPE)
    with pytest.raises(RuntimeError, match="slope"):
        (logp * SLOPE.abs()).sum().backward()


def test_gradients_of_the_forward_pass_are_used_once() -> None:
    given = tensors(bias=False)
    logp, _ = linear_logp(given["hidden"], head_of(given), TARGETS, slope=SLOPE)
    loss = (logp * SLOPE).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_a_weight_that_changed_before_the_backward_pass_is_a_fault() -> None:
    given = tensors(bias=False)
    logp, _ = linear_logp(given["hidden"], Head(given["weight"], None, given["weight"], None), TARGETS)
    with torch.no_grad():
        given["weight"] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


@pytest.mark.parametrize("slope", [None, SLOPE])
def test_only_what_is_trained_gets_a_gradient(slope: Tensor | None) -> None:
    for trained in ("hidden", "weight", "bias"):
        given = tensors(bias=True)
        _, _, want = defined(given, 1.0)
        for name, x in given.items():
            x.requires_grad_(name == trained)
        logp, _ = linear_logp(given["hidden"], head_of(given), TARGETS, slope=slope)
        (logp * SLOPE).sum().backward()
        assert_close({k: x.grad for k, x in given.items() if x.grad is not None}, {trained: want[trained]}, 1e-6)


def model_and_batch(family: str = "llama", dtype: Any = "fp32") -> tuple[LanguageModel, TokenBatch]:
    torch.manual_seed(1)
    module = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation="kinkajou")
    tokens, real = ragged((9, 5, 7, 2), width=9)
    return LanguageModel(module, dtype=dtype), TokenBatch(tokens, real[:, 1:])


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_sft_with_its_slope_is_plain_autograd(dtype: str, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied head: its weight gets gradients as the head and as the embedding."""
    model, batch = model_and_batch("gpt2", dtype)
    assert model.inner.get_output_embeddings().weight is model.inner.get_input_embeddings().weight
    count = batch.count + 3  # other micro-batches and ranks count too
    (weight * -(model(batch.tokens, batch.mask).logp.sum() / count)).backward()
    want = grads(model)
    model.zero_grad()
    set_rows(monkeypatch, 4)
    (weight * token_loss(model, batch, count).value).backward()
    assert_close(grads(model), {name: x.double() for name, x in want.items()}, 1e-5 if dtype == "fp32" else 0.01)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.size = max(self.size, x.numel())
        return out


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> tuple[LanguageModel, TokenBatch]:
    """The logits of its 4 x 63 positions are far more than the largest weight."""
    set_rows(monkeypatch, 4)
    monkeypatch.setitem(tiled.KEPT, "cpu", 0)
    config = tiny_config("llama", vocab_size=2000)
    torch.manual_seed(1)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="kinkajou")
    tokens = torch.arange(4 * 64).view(4, 64) % PAD
    return LanguageModel(module), TokenBatch(tokens, torch.ones(4, 63, dtype=torch.bool))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 5)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_logits_of_all_positions_never_lie_in_memory(long: Any, dtype: Any, sampling: Sampling) -> None:
    model, batch = long
    model.dtype = dtype
    vocabulary = model.inner.config.vocab_size
    heaviest = max(p.numel() for p in model.parameters())
    everything = int(batch.mask.sum()) * vocabulary
    with Largest() as found:
        model(batch.tokens, batch.mask, sampling, entropy=True).logp.sum().backward()
        token_loss(model, batch, batch.count).value.backward()
        with torch.no_grad():
            model(batch.tokens, batch.mask, sampling)
        model.alignment(batch.tokens, batch.mask)
    assert everything > 7 * heaviest
    assert found.size <= heaviest
