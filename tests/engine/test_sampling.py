"""Seeds, uniform numbers, and drawing by inverse transform."""

import math

import numpy as np
import pytest
import torch

from kinkajou.batch import Sampling
from kinkajou.engine.sampling import derive_seed, draw, pick, uniforms

LAST = 1 - 2.0**-53
"""The largest double below 1: the most that a uniform number can be."""


def test_uniforms_depend_on_their_own_seed_only() -> None:
    seeds = [7, 2**64 - 1, 0, 7]
    rows = uniforms(seeds, 6)
    assert rows.dtype == torch.float64
    assert torch.equal(rows[0], rows[3])
    assert not torch.equal(rows[0], rows[1])
    for i, seed in enumerate(seeds):
        assert torch.equal(uniforms([seed], 6)[0], rows[i])
        assert torch.equal(uniforms([seed], 3)[0], rows[i, :3])  # nor on how many are asked for
    assert torch.equal(uniforms(seeds[::-1], 6), rows.flip(0))


def test_uniforms_are_uniform() -> None:
    x = uniforms(range(200), 100).flatten()
    assert float(x.min()) >= 0
    assert float(x.max()) < 1
    counts = torch.histc(x.float(), bins=20, min=0, max=1).double()
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001
    # Neighbouring seeds are as unrelated as any.
    columns = uniforms(range(2000), 1)[:, 0].numpy()
    assert abs(float(np.corrcoef(columns[:-1], columns[1:])[0, 1])) < 4 / math.sqrt(2000)


def test_seeds_are_64_bit_and_know_every_part_of_their_path() -> None:
    paths = [(1, 2, 3), (1, 23), (12, 3), (1, "2", 3), ("1/2", 3), (1, 2, 3, 0), (3, 2, 1), ()]
    seeds = [derive_seed(*path) for path in paths]
    assert len(set(seeds)) == len(paths)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derive_seed(1, 2, 3) == seeds[0]
    # The same on every machine and in every process (a salted hash would not be): recorded once.
    assert derive_seed(42, "prompt", 0) == int.from_bytes(
        __import__("hashlib").blake2b(b"(42, 'prompt', 0)", digest_size=8).digest(), "big"
    )


def test_frequencies_match_probabilities() -> None:
    chances = [0.5, 0.0, 0.25, 0.125, 0.0, 0.0625, 0.0624, 0.0001]
    logits = torch.tensor(chances).log()
    n = 40_000
    tokens, _ = draw(logits.expand(n, -1), uniforms(range(40), n // 40).flatten())
    counts = torch.bincount(tokens, minlength=len(chances)).tolist()
    chi_square = 0.0
    for count, chance in zip(counts, chances, strict=True):
        if chance == 0:
            assert count == 0
        else:
            chi_square += (count - n * chance) ** 2 / (n * chance)
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, LAST])
def test_a_cut_token_is_never_drawn(uniform: float) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = 5 * torch.randn(500, 40, generator=generator)
    cut = torch.rand(500, 40, generator=generator) < 0.6
    cut[:, [0, 1, 38, 39]] = True  # at both ends, where rounding would reach first
    cut[:, 20] = False
    logits = logits.masked_fill(cut, -torch.inf)
    tokens, _ = draw(logits, torch.full((500,), uniform, dtype=torch.float64))
    assert torch.isfinite(logits.gather(1, tokens[:, None])).all()
    kept = [row.nonzero().flatten().tolist() for row in ~cut]
    if uniform == 0.0:
        assert all(token in keep for token, keep in zip(tokens.tolist(), kept, strict=True))


def test_the_ends_of_the_interval_are_the_first_and_the_last_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, 0.0, -torch.inf]] * 4)
    points = torch.tensor([0.0, 1 / 3 - 1e-7, 1 / 3 + 1e-7, LAST], dtype=torch.float64)
    assert draw(logits, points)[0].tolist() == [1, 1, 2, 3]


def test_the_tail_of_a_large_vocabulary_is_reached() -> None:
    """One likely token and 150,000 of 1e-8 each, 0.15 % together: a float32 sum stops growing at the first."""
    small, tail = 1e-8, 150_000
    logits = torch.full((1, tail + 1), math.log(small))
    logits[0, 0] = 0.0
    assert draw(logits, torch.tensor([LAST], dtype=torch.float64))[0].tolist() == [tail]
    for token in (1_000, 77_777, 149_000):
        point = torch.tensor([(1 + small * token) / (1 + small * tail)], dtype=torch.float64)
        assert int(draw(logits, point)[0]) == pytest.approx(token, rel=1e-3)


def test_inverse_transform_by_loops() -> None:
    generator = torch.Generator().manual_seed(6)
    logits = 3 * torch.randn(50, 17, generator=generator)
    points = torch.rand(50, generator=generator, dtype=torch.float64)
    tokens, logps = draw(logits, points)
    drawn = zip(logits.tolist(), points.tolist(), tokens.tolist(), logps.tolist(), strict=True)
    for row, point, token, logp in drawn:
        mass = [math.exp(x) for x in row]
        assert logp == pytest.approx(math.log(mass[token] / math.fsum(mass)), abs=1e-6)
        before = math.fsum(mass[:token]) / math.fsum(mass)
        after = math.fsum(mass[: token + 1]) / math.fsum(mass)
        assert before - 1e-6 <= point <= after + 1e-6


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=5e-324), Sampling(temperature=1e-40), Sampling(top_p=5e-324), Sampling(min_p=1.0)],
)
def test_settings_near_their_limit_take_the_likeliest_token(sampling: Sampling) -> None:
    """Of temperature and top-p at 0 the limit is greedy; dividing by such numbers would overflow."""
    logits = torch.tensor([[-80.0, 90.0, 3.0, 89.0]])
    token, logp = pick(logits, sampling, torch.tensor([0.999999], dtype=torch.float64))
    assert token.tolist() == [1]
    assert bool(logp.isfinite().all())
