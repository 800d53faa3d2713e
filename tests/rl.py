"""Reinforcement learning from outside: what a run saw and did, and the same numbers by transformers and plain loops."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from small import Small

Weights = dict[str, Tensor]
Rows = list[list[float]]
"""One list a sample, of its sampled tokens alone."""


@dataclass(frozen=True)
class Step:
    """What an update is made from, and the weights of that moment."""

    sampled: Any
    batch: Any
    coefficient: float
    policy: Weights
    critic: Weights


@dataclass(frozen=True)
class Move:
    """One optimiser step."""

    names: list[str]
    before: Weights
    batch: Any
    gradient: Weights
    found: dict[str, float]


@dataclass
class Watch:
    steps: list[Step] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)

    def of_policy(self) -> list[Move]:
        return [move for move in self.moves if "policy_loss" in move.names]


def watch(monkeypatch: pytest.MonkeyPatch, trainer: ModuleType) -> Watch:
    """Looks on while the trainer's module runs; changes nothing."""
    seen, score, update = Watch(), trainer.score, trainer.update

    def scoring(cfg: Any, parts: Any, *rest: Any) -> Any:
        made = score(cfg, parts, *rest)
        critic = snapshot(rest[0].model) if len(rest) == 3 and rest[0] else {}
        seen.steps.append(Step(rest[-2], made[0], parts.state.kl_coef, snapshot(parts.language), critic))
        return made

    def updating(strategy: Any, model: nn.Module, optimizer: Any, objectives: Any, **how: Any) -> dict[str, float]:
        before, gradient = snapshot(model), {}

        def keep(*_: Any) -> None:
            named = model.named_parameters()
            gradient.update({plain(name): p.grad.clone() for name, p in named if p.grad is not None})

        hook = optimizer.register_step_pre_hook(keep)
        found: dict[str, float] = update(strategy, model, optimizer, objectives, **how)
        hook.remove()
        seen.moves.append(Move([o.name for o in objectives], before, objectives[0].batch, gradient, dict(found)))
        return found

    monkeypatch.setattr(trainer, "score", scoring)
    monkeypatch.setattr(trainer, "update", updating)
    return seen


def plain(name: str) -> str:
    return name.removeprefix("language.").removeprefix("module.")


def snapshot(model: nn.Module) -> Weights:
    return {plain(name): tensor.detach().clone() for name, tensor in model.state_dict().items()}


def ending(small: Small) -> str:
    """A policy that often says <end>: its row of the head points where the hidden states point."""
    folder = small.folder / "ending"
    if not folder.exists():
        module = AutoModelForCausalLM.from_pretrained(small.policy)
        with torch.no_grad():
            out = module(torch.arange(1200).view(200, 6) * 31 % 88 + 3, output_hidden_states=True)
            mean = out.hidden_states[-1][:, -1].mean(0)
            wanted = out.logits[:, -1].logsumexp(-1).mean() - 1.0
            module.get_output_embeddings().weight[2] = wanted * mean / mean.square().sum()
        module.save_pretrained(folder)
        AutoTokenizer.from_pretrained(small.policy).save_pretrained(folder)
    return str(folder)


def causal(folder: str, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """transformers' own model in float64, with other weights if they are given; tensors it does not know are left."""
    module = AutoModelForCausalLM.from_pretrained(folder).eval()
    if weights:
        own = module.state_dict()
        module.load_state_dict({name: weights[name] for name in own})
    return module.double()


def scalar(folder: str, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    module = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    if weights:
        module.load_state_dict(dict(weights))
    return module.double()


def token_logps(
    module: nn.Module, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0, top_k: int = 0
) -> list[Tensor]:
    """Log-probabilities of each row's sampled tokens, row by row without padding; with gradient."""
    found = []
    for row, counts in zip(tokens, mask, strict=True):
        at = counts.nonzero().flatten()
        logits = module(row[None, : int(at[-1]) + 2]).logits[0, at] / temperature
        said = row[at + 1]
        if top_k:
            kept = logits >= logits.sort(descending=True).values[:, top_k - 1 : top_k]
            kept[torch.arange(len(said)), said] = True
            logits = logits.masked_fill(~kept, -torch.inf)
        found.append(logits.log_softmax(-1)[torch.arange(len(said)), said])
    return found


@torch.no_grad()
def token_values(module: Any, tokens: Tensor, mask: Tensor, *, beyond: int = 0) -> Rows:
    """The critic before each sampled token and, of rows with fewer than `beyond` of them, after the last."""
    found = []
    for row, counts in zip(tokens, mask, strict=True):
        at = counts.nonzero().flatten().tolist()
        if len(at) < beyond:
            at.append(at[-1] + 1)
        hidden = module.model(row[None, : at[-1] + 1]).last_hidden_state[0]
        found.append([float(module.score(hidden[i])) for i in at])
    return found


def rows_of(x: Tensor, mask: Tensor) -> Rows:
    return [row[counts].tolist() for row, counts in zip(x, mask, strict=True)]


def naive_kl(logp: float, ref: float, kind: str, *, clamp: float = 0.0, inside: float = 0.0) -> float:
    d = logp - ref
    if kind == "k3":
        d = max(-inside, min(inside, d)) if inside else d
        value = math.exp(-d) - 1 + d
    else:
        value = {"k1": d, "k2": d * d / 2, "abs": abs(d)}[kind]
    return max(-clamp, min(clamp, value)) if clamp else value


def naive_gae(rewards: Sequence[float], values: Sequence[float], *, gamma: float, lam: float) -> list[float]:
    """By the sum over later errors, not by recursion (Schulman 2016, eq. 16)."""
    following = [*values[1:], 0.0]
    errors = [r + gamma * n - v for r, v, n in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** (j - i) * errors[j] for j in range(i, len(errors))) for i in range(len(errors))]


def naive_whiten(rows: Rows, *, unbiased: bool, mean_kept: bool = False) -> Rows:
    flat = [x for row in rows for x in row]
    mean = math.fsum(flat) / len(flat)
    variance = math.fsum((x - mean) ** 2 for x in flat) / (len(flat) - unbiased)
    return [[(x - mean) / math.sqrt(variance + 1e-8) + mean * mean_kept for x in row] for row in rows]


def close(got: Rows, want: Rows, tolerance: float = 1e-4) -> None:
    assert [len(row) for row in got] == [len(row) for row in want]
    for one, other in zip(got, want, strict=True):
        assert one == pytest.approx(other, abs=tolerance, rel=tolerance)


def same_gradient(move: Move, module: nn.Module, loss: Tensor) -> None:
    """The gradient that the optimiser saw is that of the loss through transformers' model."""
    module.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    size = math.sqrt(sum(float((g**2).sum()) for g in move.gradient.values()))
    assert size > 1e-8
    for name, param in module.named_parameters():
        want = torch.zeros_like(param) if param.grad is None else param.grad
        assert float((move.gradient[name] - want).abs().max()) < 2e-4 * size, name


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: Callable[[str], bool] = bool) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before if names(name))
