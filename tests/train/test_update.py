"""One optimiser step: the same for any micro-batch size and order, and equal to a plain padded torch step."""

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kinkajou.algos.losses import Loss, cross_entropy
from kinkajou.algos.preferences import log_sigmoid_ranking
from kinkajou.batch import PairBatch, TokenBatch, pad_pairs
from kinkajou.errors import UserError
from kinkajou.models.forward import LanguageModel, ScalarModel
from kinkajou.parallel.strategy import Single
from kinkajou.train.optim import adamw
from kinkajou.train.update import Objective, in_parts, update
from tiny import PAD, ours, peer, ragged, tiny_config

LENGTHS = (9, 3, 7, 2, 8, 5)
LR = 0.01


class Here(Single):
    """One process on the CPU, whatever the machine has."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")


def language_model() -> tuple[nn.Module, LanguageModel]:
    reference = peer(AutoModelForCausalLM, tiny_config("llama"))
    return reference, LanguageModel(ours(AutoModelForCausalLM, tiny_config("llama"), reference))


def chats(seed: int = 0) -> TokenBatch:
    """Rows of very different lengths, of which different shares count."""
    tokens, real = ragged(LENGTHS, width=9, seed=seed)
    mask = real[:, 1:].clone()
    mask[0, :6] = False
    mask[4, 2] = False
    return TokenBatch(tokens, mask)


def sft(model: nn.Module, batch: TokenBatch, count: Tensor) -> Loss:
    return cross_entropy(model(batch.tokens, batch.mask).logp, batch.mask, count)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # A large eps: Adam would otherwise blow the rounding of a vanishing gradient up to a whole step.
    optimizer = adamw(model, lr=LR, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["eps"] = 1e-3
    return optimizer


def assert_same_weights(model: nn.Module, other: nn.Module, *, atol: float) -> None:
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def one_step(batch: TokenBatch, *, budget: int, max_norm: float = 1.0) -> tuple[dict[str, float], LanguageModel]:
    _, model = language_model()
    out = update(
        Here(), model, optimizer_of(model), [Objective(batch, sft)], tokens_per_microbatch=budget, max_norm=max_norm
    )
    return out, model


def test_micro_batches_and_order_change_nothing() -> None:
    want, model = one_step(chats(), budget=10_000)
    shuffled = list(range(len(LENGTHS)))
    for budget in (1, 9, 16, 25, 10_000):
        random.Random(budget).shuffle(shuffled)
        for rows in (list(range(len(LENGTHS))), shuffled):
            got, other = one_step(chats().select(torch.tensor(rows)), budget=budget)
            assert got == pytest.approx(want, abs=1e-6, rel=1e-6)
            assert_same_weights(other, model, atol=1e-6)
    _, untouched = language_model()
    assert not torch.equal(untouched.module.lm_head.weight, model.module.lm_head.weight)


@pytest.mark.parametrize("max_norm", [0.05, 1e9])
def test_equals_a_plain_padded_step(max_norm: float) -> None:
    """Mean over all counting tokens of the batch, clipped by hand, one AdamW step; transformers' own forward."""
    reference, _ = language_model()
    batch = chats()
    optimizer = optimizer_of(reference)
    real = batch.tokens != PAD
    logits = reference(input_ids=batch.tokens, attention_mask=real.long()).logits[:, :-1]
    labels = batch.tokens[:, 1:].masked_fill(~batch.mask, -100)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    grads = [p.grad for p in reference.parameters() if p.grad is not None]
    norm = float(sum(float((g.double() ** 2).sum()) for g in grads)) ** 0.5
    assert 0.05 < norm < 1e9
    for grad in grads:
        grad.mul_(min(1.0, max_norm / norm))
    optimizer.step()
    got, model = one_step(batch, budget=11, max_norm=max_norm)
    assert got["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert got["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert_same_weights(model.module, reference, atol=2e-6)


def test_objectives_are_weighted_and_each_has_its_own_count() -> None:
    reference, model = language_model()
    first, second = chats(), chats(seed=7).select(torch.tensor([1, 2]))
    out = update(
        Here(),
        model,
        optimizer_of(model),
        [Objective(first, sft, 0.1, "policy"), Objective(second, sft, 0.9, "ptx")],
        tokens_per_microbatch=12,
        max_norm=1e9,
    )
    optimizer = optimizer_of(reference)
    means = []
    for batch in (first, second):
        real = batch.tokens != PAD
        logits = reference(input_ids=batch.tokens, attention_mask=real.long()).logits[:, :-1]
        logp = logits.log_softmax(-1).gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)
        means.append(-logp[batch.mask].mean())
    (0.1 * means[0] + 0.9 * means[1]).backward()
    optimizer.step()
    assert out["policy"] == pytest.approx(float(means[0].detach()), rel=1e-5)
    assert out["ptx"] == pytest.approx(float(means[1].detach()), rel=1e-5)
    assert_same_weights(model.module, reference, atol=2e-6)


def ranking(model: nn.Module, batch: PairBatch, count: Tensor) -> Loss:
    both = batch.stacked()
    chosen, rejected = model(both.tokens, both.mask, at="end").view(-1, 2).unbind(1)
    return log_sigmoid_ranking(chosen, rejected, count)


def test_pairs_are_divided_by_their_number() -> None:
    generator = random.Random(0)
    chosen = [[generator.randrange(3, 90) for _ in range(n)] for n in (4, 9, 2)]
    rejected = [[generator.randrange(3, 90) for _ in range(n)] for n in (6, 3, 8)]
    batch = pad_pairs(chosen, rejected, pad_id=PAD)
    reference = peer(AutoModelForSequenceClassification, tiny_config("llama"))
    margins = []
    for good, bad in zip(chosen, rejected, strict=True):
        score_good, score_bad = (reference(input_ids=torch.tensor([row])).logits[0, 0] for row in (good, bad))
        margins.append(score_good - score_bad)
    want = sum(torch.log1p(torch.exp(-margin)) for margin in margins) / 3
    want.backward()
    optimizer = optimizer_of(reference)
    start = copy.deepcopy(reference.state_dict())
    optimizer.step()
    for budget in (1, 12, 1000):
        model = ScalarModel(ours(AutoModelForSequenceClassification, tiny_config("llama"), reference))
        model.module.load_state_dict(start)
        out = update(
            Here(),
            model,
            optimizer_of(model),
            [Objective(batch, ranking)],
            tokens_per_microbatch=budget,
            max_norm=1e9,
        )
        assert out["loss"] == pytest.approx(float(want.detach()), rel=1e-5)
        assert out["accuracy"] == pytest.approx(sum(float(m.detach()) > 0 for m in margins) / 3)
        assert_same_weights(model.module, reference, atol=4e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(bad: float) -> None:
    _, model = language_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = optimizer_of(model)

    def broken(model: nn.Module, batch: TokenBatch, count: Tensor) -> Loss:
        good = sft(model, batch, count)
        return Loss(good.value * bad if len(batch) and int(batch.tokens[0, 0]) == marked else good.value, {})

    marked = int(chats().tokens[3, 0])
    with pytest.raises(UserError, match="not finite") as fault:
        update(Here(), model, optimizer, [Objective(chats(), broken)], tokens_per_microbatch=1, max_norm=1.0)
    assert fault.value.exit_code == 3
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not optimizer.state


def test_gradients_do_not_leak_into_the_next_step() -> None:
    _, model = language_model()
    optimizer = optimizer_of(model)
    set_by = {"tokens_per_microbatch": 10, "max_norm": 1.0}
    update(Here(), model, optimizer, [Objective(chats(), sft)], **set_by)
    fresh = LanguageModel(copy.deepcopy(model.module))
    fresh.zero_grad()
    grown = update(Here(), model, optimizer, [Objective(chats(1), sft)], **set_by)
    alone = update(Here(), fresh, optimizer_of(fresh), [Objective(chats(1), sft)], **set_by)
    assert grown["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-6)


def test_in_parts_joins_rows_in_order() -> None:
    batch = chats()
    sizes: list[int] = []

    def first_tokens(part: TokenBatch) -> Tensor:
        sizes.append(len(part))
        assert not torch.is_grad_enabled()
        return part.tokens[:, 0]

    assert torch.equal(in_parts(batch, 12, first_tokens), batch.tokens[:, 0])
    assert len(sizes) > 1
