"""One seed per sample: what a sample says does not depend on its batch, its rank or when it arrives."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse transform sampling: the first token whose cumulated probability exceeds `uniform`.

    (b, v) float32 with -inf for cut tokens, (b,) in [0, 1) -> (b,) int64.  A cut token has no mass of its own
    and so is never the first to exceed.  Summed in float64: in float32 the tail of a large vocabulary vanishes.
    """
    mass = (logits - logits.amax(-1, keepdim=True)).exp().double().cumsum(-1)
    point = uniform.to(mass)[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, point, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
