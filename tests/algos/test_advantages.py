"""Rewards and advantages against float64 loops."""

import pytest
import torch
from torch import Tensor

from kinkajou.algos.advantages import gae, last_target, token_rewards


def random_mask(b: int, t: int, seed: int) -> Tensor:
    """Prompt, answer with holes, padding: every row has at least one True."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, t, generator=generator) < 0.6
    for row in mask:
        start = int(torch.randint(0, t, (), generator=generator))
        row[:start] = False
        row[start] = True
    return mask


def test_last_target() -> None:
    mask = torch.tensor(
        [
            [0, 1, 1, 0, 0],
            [1, 0, 1, 0, 1],
            [1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0],
            [0, 0, 0, 1, 0],
        ],
        dtype=torch.bool,
    )
    assert last_target(mask).tolist() == [2, 4, 0, 0, 3]


@pytest.mark.parametrize("seed", range(4))
def test_token_rewards(seed: int) -> None:
    b, t = 5, 9
    generator = torch.Generator().manual_seed(seed)
    scores, kl, mask = torch.randn(b, generator=generator), torch.randn(b, t, generator=generator), None
    mask = random_mask(b, t, seed)
    got = token_rewards(scores, kl, mask, kl_coef=0.3)
    for i in range(b):
        last = max(j for j in range(t) if mask[i, j])
        for j in range(t):
            want = -0.3 * float(kl[i, j]) if mask[i, j] else 0.0
            want += float(scores[i]) if j == last else 0.0
            assert float(got[i, j]) == pytest.approx(want, abs=1e-6)


def gae_loops(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Schulman 2016, eq. 16 as the double sum over the row's own steps, holes left out."""
    b, t = values.shape
    advantages, returns = [[0.0] * t for _ in range(b)], [[0.0] * t for _ in range(b)]
    for i in range(b):
        steps = [j for j in range(t) if mask[i, j]]
        r = [float(rewards[i, j]) for j in steps]
        v = [float(values[i, j]) for j in steps] + [0.0]
        deltas = [r[n] + gamma * v[n + 1] - v[n] for n in range(len(steps))]
        for n, j in enumerate(steps):
            total = sum((gamma * lam) ** m * deltas[n + m] for m in range(len(steps) - n))
            advantages[i][j], returns[i][j] = total, total + v[n]
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.0), (0.97, 0.8), (0.0, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("t", [1, 2, 13])
def test_gae(gamma: float, lam: float, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    mask = random_mask(6, t, seed=t)
    rewards = torch.randn(6, t, generator=generator) * mask
    values = torch.randn(6, t, generator=generator)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    want_advantages, want_returns = gae_loops(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, torch.tensor(want_advantages), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns, torch.tensor(want_returns), atol=1e-5, rtol=1e-5)


def test_gae_with_lambda_one_is_the_discounted_return() -> None:
    """Monte Carlo: with gamma 0.5 a reward of 8 three steps ahead is worth 1 now, whatever the critic says."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 8.0]])
    values = torch.tensor([[5.0, -3.0, 2.0, 9.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    _, returns = gae(rewards, values, mask, gamma=0.5, lam=1.0)
    assert returns.tolist() == [[1.0, 2.0, 4.0, 8.0]]


def test_what_stands_off_the_mask_does_not_count() -> None:
    """Contract, item 4: the critic averaged over the prompt.  Values of prompt, holes and padding are stepped over."""
    generator = torch.Generator().manual_seed(8)
    mask = torch.tensor([[False, False, True, True, False, True, False]])
    rewards, values = torch.randn(1, 7, generator=generator) * mask, torch.randn(1, 7, generator=generator)
    other = torch.where(mask, values, 1e3)
    for a, b in zip(
        gae(rewards, values, mask, gamma=0.9, lam=0.9), gae(rewards, other, mask, gamma=0.9, lam=0.9), strict=True
    ):
        assert torch.equal(a, b)
        assert not a[~mask].any()
    # The same episode without the hole has the same advantages.
    dense = gae(rewards[:, [2, 3, 5]], values[:, [2, 3, 5]], mask[:, [2, 3, 5]], gamma=0.9, lam=0.9)
    torch.testing.assert_close(gae(rewards, values, mask, gamma=0.9, lam=0.9)[0][mask], dense[0][0])
