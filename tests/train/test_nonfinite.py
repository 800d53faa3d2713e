"""A step that is not finite: the first tensor that had it is named, whatever it was, and nothing is changed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kinkajou.algos.losses import Loss, cross_entropy
from kinkajou.batch import TokenBatch
from kinkajou.models.forward import LanguageModel
from kinkajou.parallel.strategy import Single
from kinkajou.train.nonfinite import NotFinite
from kinkajou.train.optim import adamw
from kinkajou.train.update import Objective, update
from tiny import ours, peer, ragged, tiny_config

LENGTHS = (9, 3, 7, 2, 8, 5)
MARK = 50  # a token of row 2 alone
NAN = float("nan")


class Here(Single):
    """One process on the CPU, whatever the machine has."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")


@dataclass(frozen=True)
class Weighed(TokenBatch):
    advantages: Tensor  # (b, t)


def language_model() -> LanguageModel:
    return LanguageModel(
        ours(AutoModelForCausalLM, tiny_config("llama"), peer(AutoModelForCausalLM, tiny_config("llama")))
    )


def rows() -> Weighed:
    tokens, real = ragged(LENGTHS, width=9)
    tokens[tokens == MARK] = MARK + 1
    tokens[2, 3] = MARK
    return Weighed(tokens, real[:, 1:], torch.ones(len(LENGTHS), 8))


def plain(model: nn.Module, batch: Weighed, count: Tensor) -> Loss:
    return cross_entropy(model(batch.tokens, batch.mask).logp * batch.advantages, batch.mask, count)


def layer(model: LanguageModel, name: str) -> nn.Module:
    return model.module.get_submodule(name)


def set_weight(name: str, value: float, at: object = (0, 0)) -> Callable[[LanguageModel], None]:
    def change(model: LanguageModel) -> None:
        layer(model, name).weight.data[at] = value

    return change


def refuse(
    change: Callable[[LanguageModel], object] = lambda model: None,
    loss: Callable[[nn.Module, Weighed, Tensor], Loss] = plain,
    batch: Weighed | None = None,
    *,
    budget: int = 9,
) -> NotFinite:
    """The error of one step; the weights, the gradients and the hooks are as they were."""
    model = language_model()
    change(model)
    before, optimizer = copy.deepcopy(model.state_dict()), adamw(model, lr=0.1, weight_decay=0.1)
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    objective = Objective(batch or rows(), loss, name="policy_loss")
    with pytest.raises(NotFinite) as fault:
        update(Here(), model, optimizer, [objective], tokens_per_microbatch=budget, max_norm=1.0)
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0, equal_nan=True)
    assert not optimizer.state
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    assert fault.value.exit_code == 3
    return fault.value


def test_a_weight_that_is_not_a_number() -> None:
    fault = refuse(set_weight("model.layers.1.mlp.down_proj", NAN))
    assert fault.place == "the weight model.layers.1.mlp.down_proj.weight"
    assert "load another checkpoint" in fault.fix
    assert "gradient norm nan" in fault.evidence


def test_a_module_whose_output_overflows() -> None:
    fault = refuse(set_weight("model.layers.0.self_attn.o_proj", 3e38, at=...))
    assert fault.place == "model.layers.0.self_attn.o_proj (its output; its input is finite)"
    assert " infinite of " in fault.evidence


def test_what_arises_between_modules_names_the_last_clean_one() -> None:
    def spoil(model: LanguageModel) -> object:
        norm = layer(model, "model.layers.1.input_layernorm")
        return norm.register_forward_pre_hook(lambda module, args: (args[0] * NAN,))

    fault = refuse(spoil)
    assert fault.place == "model.layers.1.input_layernorm (its input)"
    assert "after model.layers.0, the last module that was clean" in fault.fix


def test_a_column_of_the_batch_and_its_row() -> None:
    batch = rows()
    batch.advantages[4, 2] = float("inf")
    fault = refuse(batch=batch)
    assert fault.place == "the batch's advantages"
    assert "row 4 of the step's batch" in fault.evidence
    assert "0 NaN and 1 infinite of 8 entries" in fault.evidence


def test_the_record_that_brings_it() -> None:
    for budget in (9, 10_000):
        fault = refuse(set_weight("model.embed_tokens", NAN, at=MARK), budget=budget)
        assert fault.place == "the weight model.embed_tokens.weight"
        assert "row 2 of the step's batch" in fault.evidence
    assert "micro-batch 1 of 1" in fault.evidence


def test_the_loss_itself() -> None:
    def broken(model: nn.Module, batch: Weighed, count: Tensor) -> Loss:
        return Loss(plain(model, batch, count).value * NAN, {})

    fault = refuse(loss=broken)
    assert fault.place == "the loss 'policy_loss'"
    assert "every module's output is finite" in fault.evidence


def test_a_gradient_under_a_finite_loss() -> None:
    """The root of 0 has no derivative; two parameters are behind it, the later one comes first in the backward pass."""

    def steep(model: nn.Module, batch: Weighed, count: Tensor) -> Loss:
        inner = model.module.model.layers
        zero = sum((inner[i].mlp.up_proj.weight * 0).sum() for i in (0, 1))
        return Loss(plain(model, batch, count).value + zero.sqrt(), {})

    fault = refuse(loss=steep)
    assert fault.place in {f"the gradient of model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)}
    assert "micro-batch 1 of" in fault.evidence


def test_only_the_norm_overflows() -> None:
    def huge(model: nn.Module, batch: Weighed, count: Tensor) -> Loss:
        return Loss(plain(model, batch, count).value * 1e30, {})

    assert refuse(loss=huge).place == "the sum of the gradients"
