"""One seed per sample: what a sample says does not depend on its batch, its rank or when it arrives."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kinkajou.algos import tensors
from kinkajou.batch import Sampling


def derive_seed(*parts: int | str) -> int:
    """A 64-bit seed from (run seed, step, prompt id, sample id) or any such path."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Row i holds `count` uniform numbers of [0, 1) that depend on seeds[i] alone (Philox, Salmon 2011).

    -> (len(seeds), count) float64.
    """
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(count) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse transform sampling: the first token whose cumulated probability exceeds `uniform`, and its logp.

    (b, v) float32 with -inf for cut tokens, (b,) in [0, 1) -> (b,) int64, (b,) float32.  A cut token has no mass of
    its own and so is never the first to exceed.  Summed in float64: in float32 the tail of a large vocabulary
    vanishes.  The same sum normalises the log-probability.
    """
    top = logits.amax(-1, keepdim=True)
    mass = (logits - top).exp().cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    tokens = torch.searchsorted(mass, uniform.to(mass)[:, None] * total, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens.squeeze(-1), (logits.gather(-1, tokens) - top - total.log().float()).squeeze(-1)


def pick(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability in the distribution it was drawn from (greedy: the model's).

    (b, v), (b,) -> (b,), (b,) float32.
    """
    cut = tensors.sampling_logits(
        logits,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
    if sampling.temperature > 0:
        return draw(cut, uniform)
    tokens = cut.argmax(-1)
    return tokens, tensors.token_logps(cut, tokens)


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """One row's logits, those of seen tokens divided by the penalty if positive, else multiplied (Keskar 2019, 4.1).

    (v,), (m,) ids -> (v,) float32.
    """
    logits = logits.float()
    at = logits[seen]
    return logits.scatter(0, seen, torch.where(at > 0, at / penalty, at * penalty))
