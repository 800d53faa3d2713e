"""Our side of the comparison: the trainers' own loss functions, handed prepared tensors in place of a model's."""

from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.cases import GROUP, PAIRS, SAMPLES, Case, Tensors
from kinkajou.algos.kto import reference_point
from kinkajou.algos.preferences import RANKING
from kinkajou.algos.tensors import token_logps
from kinkajou.batch import GRPOBatch, JudgedBatch, PreferenceBatch
from kinkajou.config import (
    GRPOConfig,
    PreferenceLossConfig,
    RLConfig,
)
from kinkajou.models.forward import TokenScores
from kinkajou.parallel.strategy import Single
from kinkajou.train.policy import policy_loss
from kinkajou.train.preference_tasks import JudgedTask, PairTask

C = TypeVar("C", bound=RLConfig)


def settings(kind: type[C], dialect: str, *, longest: int, samples: int, **flags: Any) -> C:
    """The stage's settings with these flags; what they leave open comes from the dialect."""
    flags |= {"dialect": dialect, "max_new_tokens": longest, "minibatch_size": samples, "prompts_per_step": samples}
    flags |= {"model": "x", "prompts": "x", "output": "x", "reward": ("rule:ended",)}
    known = {item.name: item.default_factory for item in fields(kind)}
    groups, used = {}, set()
    for name, make in known.items():
        own = {item.name for item in fields(make)} & flags.keys()
        groups[name] = make(**{key: flags[key] for key in own})
        used |= own
    assert used == flags.keys(), f"unknown flags {flags.keys() - used}"
    return kind(**groups)


class Given(nn.Module):
    """Stands where the policy does: log-probabilities that lie ready, 0 off the mask."""

    def __init__(self, logp: Tensor, alignment: Tensor | None = None) -> None:
        super().__init__()
        self.logp, self.given = logp, alignment

    def forward(self, tokens: Tensor, mask: Tensor, sampling: Any = None) -> TokenScores:
        logp = self.logp.view(mask.shape) * mask
        return TokenScores(logp, torch.zeros_like(logp))

    def alignment(self, tokens: Tensor, mask: Tensor) -> Tensor:
        assert self.given is not None
        return self.given.detach().view(mask.shape) * mask


def differentiated(case: Case, x: Tensors) -> tuple[Tensor, Tensor]:
    """Our loss of the case and its gradient."""
    leaf = x[case.leaf].clone().requires_grad_()
    loss = LOSSES[case.kind](case, x, leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def ranking(case: Case, x: Tensors, leaf: Tensor) -> Tensor:
    chosen, rejected = leaf.chunk(2)
    return RANKING[case.ours["loss"]](chosen, rejected, torch.tensor(float(len(chosen)))).value


def paired(x: Tensor) -> Tensor:
    """Chosen rows and then rejected rows, (2b, ...), as pairs, (b, 2, ...)."""
    return torch.stack(x.chunk(2), 1)


def pairs(case: Case, x: Tensors, leaf: Tensor) -> Tensor:
    logp = leaf
    if case.leaf == "logits":
        logp = token_logps(leaf[:, :-1].flatten(0, 1), x["tokens"][:, 1:].flatten()).view(x["mask"].shape)
    method = PreferenceLossConfig(**{"loss": ("sigmoid",), **case.ours})
    answer = paired(x["mask"])
    scored = torch.stack([paired(x["real"])[:, 0, 1:], answer[:, 1]], 1) if "orpo" in method.names else answer
    ref_logp = paired(x["ref_logp"]) * answer
    if method.ld_alpha != 1:
        within = answer.cumsum(-1) <= answer.sum(-1).amin(1)[:, None, None]
        ref_logp = torch.where(within, ref_logp, method.ld_alpha * ref_logp)
    ones, none = torch.ones(PAIRS), torch.zeros(PAIRS, 3)
    batch = PreferenceBatch(paired(x["tokens"]), scored, answer, ref_logp.sum(-1), ones, none)
    policy = Given(paired(logp), paired(logp - x["log_sum_sq"]))
    task = PairTask(method, (), 0)
    batch = task.prepare(policy, batch, range(PAIRS), Single(), 8192)  # type: ignore[arg-type]
    return task.loss(policy, batch, batch.count).value


def judged(case: Case, x: Tensors, leaf: Tensor) -> Tensor:
    def whole(key: str) -> Tensor:
        return (x[key] * x["mask"]).sum(1)

    point = reference_point(whole("mixed_logp") - whole("mixed_ref_logp"))
    batch = JudgedBatch(x["tokens"], x["mask"], x["good"], whole("ref_logp"), point.expand(2 * PAIRS))
    return JudgedTask(PreferenceLossConfig(**case.ours), (), 0, 64).loss(Given(leaf), batch, batch.count).value


def policy(case: Case, x: Tensors, leaf: Tensor, dialect: str = "trl-1.12") -> Tensor:
    cfg = settings(GRPOConfig, dialect, longest=x["mask"].shape[1], samples=SAMPLES, group_size=GROUP, **case.ours)
    mask, ones = x["mask"], torch.ones_like(leaf)
    tokens = torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.long)
    advantages = x["advantages"][:, None].expand_as(leaf)
    batch = GRPOBatch(tokens, mask, x["old_logp"], x["ref_logp"], advantages, ones)
    new = TokenScores(leaf, torch.zeros_like(leaf))
    return policy_loss(cfg, new, batch, batch.count, kl_coef=cfg.kl.kl_coef).value


LOSSES = {
    "reward": ranking,
    "dpo": pairs,
    "kto": judged,
    "orpo": pairs,
    "cpo": pairs,
    "grpo": policy,
    "rloo": policy,
}
