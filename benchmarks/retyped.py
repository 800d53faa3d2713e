"""OpenRLHF's and verl's formulas retyped by their conventions, as plain loops over float64 numbers.

A sample is a list of its counting tokens' numbers.  Numbers are 0-d float64 tensors, so that autograd gives gradients.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Sample = list[Tensor]
Rows = list[Sample]


def rows(x: Tensor, mask: Tensor) -> Rows:
    """The counting numbers of each row, in float64."""
    return [[x[i, j].double() for j in range(x.shape[1]) if mask[i, j]] for i in range(len(x))]


def wide(found: Sequence[Sequence[Tensor | float]], mask: Tensor) -> Tensor:
    """Numbers back at their places, 0 elsewhere."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for i, sample in enumerate(found):
        for number, j in zip(sample, mask[i].nonzero().flatten().tolist(), strict=True):
            out[i, j] = float(number)
    return out


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    return torch.clamp(x, low, high)


def openrlhf_kl(logp: Tensor, ref: Tensor, kind: str) -> Tensor:
    d = logp - ref
    value = {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}[kind]
    return clamp(value, -10, 10)


def verl_kl(logp: Tensor, ref: Tensor, kind: str) -> Tensor:
    d = logp - ref
    if kind == "k3":
        inner = clamp(ref - logp, -20, 20)
        return clamp(torch.exp(inner) - inner - 1, -10, 10)
    return {"k1": d, "abs": abs(d), "k2": d * d / 2}[kind]


def straight_through(value: Tensor, logp: Tensor, ref: Tensor) -> Tensor:
    """verl's "+": the value of one estimator, the gradient of k2."""
    under = (logp - ref) ** 2 / 2
    return under - under.detach() + value.detach()


def gae(rewards: Sample, values: Sample, gamma: float, lam: float) -> tuple[Sample, Sample]:
    """Over a sample's counting tokens, backwards; what lies between them (tool output) is skipped."""
    advantages: Sample = []
    carry = after = torch.tensor(0.0, dtype=torch.float64)
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        carry = reward + gamma * after - value + gamma * lam * carry
        after = value
        advantages.append(carry)
    advantages.reverse()
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def to_go(rewards: Sample, gamma: float) -> Sample:
    found: Sample = []
    total = torch.tensor(0.0, dtype=torch.float64)
    for reward in reversed(rewards):
        total = reward + gamma * total
        found.append(total)
    return found[::-1]


def openrlhf_normalised(advantages: Rows) -> Rows:
    """Biased variance, floored at 1e-8."""
    flat = [a for sample in advantages for a in sample]
    mean = sum(flat) / len(flat)
    variance = sum((a - mean) ** 2 for a in flat) / len(flat)
    return [[(a - mean) / math.sqrt(max(float(variance), 1e-8)) for a in sample] for sample in advantages]


def verl_whitened(advantages: Rows) -> Rows:
    """Unbiased variance, 1e-8 under the root and in the means' denominators."""
    flat = [a for sample in advantages for a in sample]
    n = len(flat)
    mean = sum(flat) / (n + 1e-8)
    variance = sum((a - mean) ** 2 for a in flat) / (n + 1e-8) * n / (n - 1)
    return [[(a - mean) / math.sqrt(float(variance) + 1e-8) for a in sample] for sample in advantages]


def grouped(scores: Sequence[float], size: int, kind: str) -> list[float]:
    """rloo, group mean (reinforce_baseline, dr_grpo), group mean over deviation (OpenRLHF 1e-9, verl 1e-6)."""
    found: list[float] = []
    for start in range(0, len(scores), size):
        group = scores[start : start + size]
        mean = sum(group) / size
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / (size - 1))
        for r in group:
            if kind == "rloo":
                found.append(r - (sum(group) - r) / (size - 1))
            else:
                found.append((r - mean) / {"mean": 1.0, "openrlhf": deviation + 1e-9, "verl": deviation + 1e-6}[kind])
    return found


def surrogate(ratio: Tensor, advantage: Tensor, *, low: float = 0.2, high: float = 0.2, dual: float = 0.0) -> Tensor:
    plain, clipped = -ratio * advantage, -clamp(ratio, 1 - low, 1 + high) * advantage
    loss = torch.maximum(plain, clipped)
    if dual and advantage < 0:
        loss = torch.minimum(loss, -dual * advantage)
    return loss


def token_ratio(logp: Tensor, old: Tensor) -> Tensor:
    return torch.exp(clamp(logp - old, -20, 20))


def sequence_ratio(logp: Sample, old: Sample) -> Tensor:
    """GSPO: geometric mean of an answer's ratios."""
    return torch.exp(sum((a - b for a, b in zip(logp, old, strict=True)), torch.tensor(0.0)) / len(logp))


def policy_terms(logp: Rows, old: Rows, advantages: Rows, *, level: str = "token", **clips: float) -> Rows:
    found: Rows = []
    for new, before, gains in zip(logp, old, advantages, strict=True):
        whole = sequence_ratio(new, before) if level == "sequence" else None
        ratios = [token_ratio(a, b) if whole is None else whole for a, b in zip(new, before, strict=True)]
        found.append([surrogate(r, a, **clips) for r, a in zip(ratios, gains, strict=True)])
    return found


def aggregate(terms: Rows, how: str, width: int = 1) -> Tensor:
    sums = [sum(sample, torch.tensor(0.0, dtype=torch.float64)) for sample in terms]
    if how == "token-mean":
        return sum(sums, torch.tensor(0.0)) / sum(len(sample) for sample in terms)
    parts = {
        "seq-mean-token-sum": sums,
        "seq-mean-token-mean": [total / len(sample) for total, sample in zip(sums, terms, strict=True)],
        "seq-mean-token-sum-norm": [total / width for total in sums],
    }[how]
    return sum(parts, torch.tensor(0.0)) / len(parts)


def value_terms(values: Rows, old: Rows, returns: Rows, clip: float) -> Rows:
    def one(v: Tensor, before: Tensor, target: Tensor) -> Tensor:
        near = clamp(v, float(before) - clip, float(before) + clip)
        return 0.5 * torch.maximum((v - target) ** 2, (near - target) ** 2)

    return [[one(*x) for x in zip(*sample, strict=True)] for sample in zip(values, old, returns, strict=True)]


def truncated(old: Tensor, rollout: Tensor, high: float) -> float:
    """Truncated importance sampling."""
    return min(math.exp(float(old - rollout)), high)


def icepop(old: Tensor, rollout: Tensor, high: float) -> float:
    ratio = math.exp(float(old - rollout))
    return ratio if 1 / high <= ratio <= high else 0.0


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x))


def pair_mean(chosen: Sequence[Tensor], rejected: Sequence[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    terms = [loss(c - r) for c, r in zip(chosen, rejected, strict=True)]
    return sum(terms, torch.tensor(0.0)) / len(terms)


def next_coefficient(coefficient: float, kl: float, target: float, horizon: float, samples: int) -> float:
    """The adaptive controller."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * samples / horizon)
