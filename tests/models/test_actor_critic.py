"""Policy and critic over one trunk: each equals the two models that would do the same apart."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kinkajou.batch import Sampling
from kinkajou.models.forward import ActorCritic, LanguageModel
from kinkajou.models.heads import scalar_head
from tiny import FOUR, ours, peer, ragged, tiny_config


def made(family: str) -> tuple[Any, ActorCritic]:
    reference = peer(AutoModelForCausalLM, tiny_config(family))
    language = LanguageModel(ours(AutoModelForCausalLM, tiny_config(family), reference))
    head = scalar_head(language.width, seed=3)
    with torch.no_grad():
        head.weight.mul_(30.0)
    return reference, ActorCritic(language, head)


def masks(real: Tensor) -> tuple[Tensor, Tensor]:
    """Answers after three tokens, and value targets that reach one further."""
    mask = real[:, 1:].clone()
    mask[:, :2] = False
    asked = mask | torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    asked[:, 2] = False  # and not the first, so that neither holds the other
    return mask, asked


@pytest.mark.parametrize("family", FOUR)
def test_values_and_log_probabilities_are_transformers(family: str) -> None:
    """A value is read where its target was chosen: before it, never seeing it."""
    reference, model = made(family)
    tokens, real = ragged([9, 5, 12], width=13)
    mask, asked = masks(real)
    out = model(tokens, mask, asked, Sampling(0.7), entropy=True)
    head = model.head.weight.detach()[0]
    for i in range(3):
        with torch.no_grad():
            found = reference(tokens[i : i + 1], output_hidden_states=True)
        hidden, logp = found.hidden_states[-1][0], (found.logits[0] / 0.7).log_softmax(-1)
        for j in range(12):
            said = float(logp[j, tokens[i, j + 1]]) if mask[i, j] else 0.0
            assert float(out.logp[i, j].detach()) == pytest.approx(said, abs=2e-5)
            value = float(hidden[j] @ head) if asked[i, j] else 0.0
            assert float(out.values[i, j].detach()) == pytest.approx(value, abs=1e-4)
    alone = model.language(tokens, mask, Sampling(0.7), entropy=True)
    torch.testing.assert_close(out.logp, alone.logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.entropy, alone.entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FOUR)
def test_both_losses_reach_trunk_and_head(family: str) -> None:
    """The gradient of a sum is the sum of gradients, and neither part is cut off from the trunk."""
    _, model = made(family)
    tokens, real = ragged([9, 5, 12], width=13)
    mask, asked = masks(real)

    def gradient(policy: float, critic: float) -> dict[str, Tensor]:
        model.zero_grad()
        out = model(tokens, mask, asked)
        (policy * out.logp.sum() + critic * (out.values**2).sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    both, actor, critic = gradient(1.0, 0.5), gradient(1.0, 0.0), gradient(0.0, 0.5)
    assert float(actor["head.weight"].abs().max()) == 0
    assert float(critic["head.weight"].abs().max()) > 0
    trunk = [name for name in both if name != "head.weight" and both[name].ndim == 2]
    assert any(float(actor[name].abs().max()) > 0 for name in trunk)
    assert sum(float(critic[name].abs().max()) > 0 for name in trunk) > 4
    for name, grad in both.items():
        torch.testing.assert_close(grad, actor[name] + critic[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FOUR)
def test_rows_do_not_see_each_other(family: str) -> None:
    _, model = made(family)
    tokens, real = ragged([9, 5, 12], width=13)
    mask, asked = masks(real)
    with torch.no_grad():
        whole = model(tokens, mask, asked)
        for i in range(3):
            one = model(tokens[i : i + 1], mask[i : i + 1], asked[i : i + 1])
            torch.testing.assert_close(whole.values[i], one.values[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(whole.logp[i], one.logp[0], atol=1e-5, rtol=0)
        changed = torch.where(real, tokens, 7)
        assert torch.equal(model(changed, mask, asked).values, whole.values)  # padding is never read


def test_without_value_targets_it_is_a_language_model() -> None:
    """Chats of the ptx mix come in this form: the head takes part with a gradient of 0, as other ranks expect."""
    _, model = made("llama")
    tokens, real = ragged([9, 5, 12], width=13)
    mask, _ = masks(real)
    out = model(tokens, mask)
    torch.testing.assert_close(out.logp, model.language(tokens, mask).logp, atol=1e-6, rtol=0)
    out.logp.sum().backward()
    grad = model.head.weight.grad
    assert grad is not None
    assert float(grad.abs().max()) == 0


@pytest.mark.parametrize("family", FOUR)
def test_rows_without_any_target(family: str) -> None:
    """A rank whose answers were all masked still runs its model: zeros, and a gradient of 0 for every weight."""
    _, model = made(family)
    tokens, real = ragged([9, 5], width=13)
    none, half = torch.zeros(2, 12, dtype=torch.bool), real[:, 1:].clone()
    half[0] = False
    for policy in (model, model.language):
        out = policy(tokens, none)
        assert not out.logp.any()
        policy.zero_grad()
        out.logp.sum().backward()
        grads = [p.grad for p in model.language.parameters()]
        assert all(grad is not None and not grad.any() for grad in grads)
        alone = policy(tokens[1:], half[1:])
        torch.testing.assert_close(policy(tokens, half).logp[1], alone.logp[0], atol=1e-5, rtol=0)
        assert not policy(tokens, half).logp[0].any()
    assert not model(tokens, none, half).values[0].any()
    assert model(tokens, none, half).values[1].abs().max() > 0


def test_the_head_starts_near_nothing() -> None:
    """N(0, 1 / (d + 1)) as a reward model's, by its seed alone (Stiennon 2020)."""
    one, same, other = (scalar_head(400, seed=seed).weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert float(one.std().detach()) == pytest.approx(1 / 401, rel=0.2)
