"""The second layout of linear weights: the same numbers, only while it is in place, and only for plain layers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kinkajou.models import packing
from kinkajou.models.attention import Packed
from kinkajou.models.forward import LanguageModel
from kinkajou.models.packing import Repacked, siblings
from tiny import FOUR, ours, peer, tiny_config

IDS, POSITIONS = torch.tensor([[5, 6, 7, 8, 9, 11, 12]]), torch.tensor([[0, 1, 2, 3, 4, 0, 1]])


def model_of(name: str) -> LanguageModel:
    return LanguageModel(ours(AutoModelForCausalLM, tiny_config(name), peer(AutoModelForCausalLM, tiny_config(name))))


def replaced(model: LanguageModel) -> list[str]:
    """Modules whose forward pass is not their class's."""
    return [name for name, layer in model.named_modules() if "forward" in vars(layer)]


@pytest.mark.parametrize("name", FOUR)
def test_logits_are_the_same_and_the_module_is_left_as_it_was(name: str) -> None:
    model = model_of(name)
    layers = Repacked(model.module, rows=4)
    assert layers.layers
    before = replaced(model)  # BLOOM's shim

    def logits() -> torch.Tensor:
        return model.logits(model.hidden(IDS, POSITIONS, Packed((0, 5, 7))))

    with torch.no_grad():
        want = logits()
        with layers.in_place():
            got = logits()
            assert len(replaced(model)) > len(before)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert replaced(model) == before
        # It is a copy: weights that change afterwards do not reach it.
        for param in model.parameters():
            param.mul_(1.5)
        with layers.in_place():
            assert not torch.allclose(logits(), want, atol=1e-3)


def test_it_is_left_again_when_something_breaks() -> None:
    model = model_of("llama")
    with pytest.raises(KeyError), Repacked(model.module, rows=4).in_place():
        raise KeyError
    assert replaced(model) == []


def test_siblings_share_a_product_only_for_the_same_input() -> None:
    model = model_of("llama")
    assert sorted(len(group) for group in siblings(model.module)) == [2, 2, 3, 3]
    block = model.inner.model.layers[0].self_attn
    q, k, v = block.q_proj, block.k_proj, block.v_proj
    one, other = torch.randn(3, q.in_features), torch.randn(3, q.in_features)
    with torch.no_grad():
        want = [q(one), k(one), v(other), q(other), v(other), k(one)]
        with Repacked(model.module, rows=4).in_place():
            got = [q(one), k(one), v(other), q(other), v(other), k(one)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_large_model_is_left_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BUDGET", 1000)
    assert Repacked(model_of("llama").module, rows=4).layers == []
