"""Learning-rate schedules over a whole run, and one AdamW step in float64 loops."""

import itertools
import math

import pytest
import torch
from torch import nn

from kinkajou.train.optim import adamw, lr_at, set_lr


@pytest.mark.parametrize("total", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.1, 0.5])
def test_cosine_rises_once_and_never_again(total: int, warmup: float) -> None:
    """Contract: the old rate rose again in epoch 2.  `total` is the whole run, all epochs."""
    rates = [lr_at(i, total, peak=2e-3, warmup=warmup, schedule="cosine") for i in range(total)]
    rise = math.ceil(warmup * total)
    assert all(a < b for a, b in itertools.pairwise(rates[: rise + 1]))
    assert all(a > b for a, b in itertools.pairwise(rates[rise:]))
    assert max(rates) == (2e-3 if rise < total else rates[-1])
    assert min(rates) > 0
    if total >= 100:
        assert rates[-1] < 0.01 * 2e-3


def test_cosine_follows_its_formula() -> None:
    for i in range(20, 100):
        want = 3.0 * (1 + math.cos(math.pi * (i - 20) / 80)) / 2
        assert lr_at(i, 100, peak=3.0, warmup=0.2, schedule="cosine") == pytest.approx(want)


def test_warm_up_is_a_straight_line_to_the_peak() -> None:
    rates = [lr_at(i, 40, peak=1.0, warmup=0.1, schedule="constant") for i in range(40)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(rates[5:]) == {1.0}


def test_set_lr_reaches_every_group() -> None:
    optimizer = adamw(nn.Linear(3, 2), lr=1.0, weight_decay=0.1)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.frozen = nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3)
        self.frozen.requires_grad_(False)


def test_only_trainable_matrices_decay() -> None:
    model = Small()
    optimizer = adamw(model, lr=0.1, weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {
        id(model.linear.weight): 0.3,
        id(model.linear.bias): 0.0,
        id(model.norm.weight): 0.0,
        id(model.norm.bias): 0.0,
    }


def test_a_model_without_vectors_or_without_matrices() -> None:
    assert len(adamw(nn.Linear(3, 2, bias=False), lr=0.1, weight_decay=0.1).param_groups) == 1
    assert len(adamw(nn.LayerNorm(3), lr=0.1, weight_decay=0.1).param_groups) == 1


def test_steps_equal_the_formula() -> None:
    """Loshchilov 2019, algorithm 2: decay apart from the gradient, both moments corrected for their start."""
    lr, decay, beta1, beta2, eps = 0.02, 0.3, 0.9, 0.95, 1e-8
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = adamw(model, lr=lr, weight_decay=decay)
    want = {name: p.detach().double().flatten().tolist() for name, p in model.named_parameters()}
    first = {name: [0.0] * len(x) for name, x in want.items()}
    second = {name: [0.0] * len(x) for name, x in want.items()}
    for step in (1, 2, 3):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape)
            rate = decay if name == "weight" else 0.0
            for i, g in enumerate(p.grad.double().flatten().tolist()):
                first[name][i] = beta1 * first[name][i] + (1 - beta1) * g
                second[name][i] = beta2 * second[name][i] + (1 - beta2) * g * g
                m, v = first[name][i] / (1 - beta1**step), second[name][i] / (1 - beta2**step)
                want[name][i] -= lr * rate * want[name][i] + lr * m / (math.sqrt(v) + eps)
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.flatten().tolist() == pytest.approx(want[name], rel=1e-5, abs=1e-6)
