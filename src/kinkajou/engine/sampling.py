"""One seed per sample: what a sample says does not depend on its batch, its rank or when it arrives."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kinkajou.algos import tensors
from kinkajou.batch import Sampling

COLDEST, LEAST_MASS = 1e-3, 1e-6
"""Below that temperature the likeliest token is taken, and top-p holds that mass: less overflows float32."""
BLOCK = 64
"""Tokens whose probabilities are summed at once before one of them is looked for."""


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
    its own and so is never the first to exceed.  The block of tokens is found first, then the token in it: summing
    a whole vocabulary one by one would take longer than its softmax.  Summed in float64: in float32 the tail of a
    large vocabulary vanishes.
    """
    probs = logits.softmax(-1)
    blocks = pad(probs, (0, -probs.shape[-1] % BLOCK)).view(len(probs), -1, BLOCK)
    block, rest = first_beyond(blocks.sum(-1).cumsum(-1, dtype=torch.float64), uniform.double()[:, None])
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    token, _ = first_beyond(inside, rest, scaled=False)
    tokens = block * BLOCK + token
    return tokens.squeeze(-1), probs.gather(-1, tokens).squeeze(-1).log()


def first_beyond(sums: Tensor, point: Tensor, *, scaled: bool = True) -> tuple[Tensor, Tensor]:
    """Index of the first sum above the point, and what of the point is left there.  (b, m), (b, 1) -> (b, 1) twice.

    `scaled`: the point is a share of the last sum.  It is held below that one, which rounding might reach.
    """
    last = sums[:, -1:]
    point = torch.minimum(point * last if scaled else point, torch.nextafter(last, torch.zeros_like(last)))
    index = torch.searchsorted(sums, point, right=True)
    before = torch.where(index > 0, sums.gather(-1, (index - 1).clamp(min=0)), 0.0)
    return index, point - before


def pick(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability in the distribution it was drawn from (greedy: the model's).

    (b, v), (b,) -> (b,), (b,) float32.
    """
    temperature = sampling.temperature if sampling.temperature >= COLDEST else 0.0
    cut = tensors.sampling_logits(
        logits,
        temperature=temperature,
        top_k=sampling.top_k,
        top_p=max(sampling.top_p, LEAST_MASS),
        min_p=sampling.min_p,
    )
    if temperature > 0:
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
