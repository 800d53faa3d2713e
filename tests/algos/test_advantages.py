"""Rewards and advantages against float64 loops."""

import pytest
import torch
from torch import Tensor

from kinkajou.algos.advantages import (
    bandit,
    extended,
    first_target,
    gae,
    last_target,
    only_first,
    rewards_to_go,
    token_rewards,
)


def random_mask(b: int, t: int, seed: int) -> Tensor:
    """Prompt, answer with holes, padding: every row has at least one True."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, t, generator=generator) < 0.6
    for row in mask:
        start = int(torch.randint(0, t, (), generator=generator))
        row[:start] = False
        row[start] = True
    return mask


PLACES = torch.tensor(
    [
        [0, 1, 1, 0, 0],
        [1, 0, 1, 0, 1],
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0],
    ],
    dtype=torch.bool,
)


def test_first_and_last_target() -> None:
    assert last_target(PLACES).tolist() == [2, 4, 0, 0, 3]
    assert first_target(PLACES).tolist() == [1, 0, 0, 0, 3]
    assert only_first(PLACES).int().tolist() == [
        [0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0],
    ]


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_extended_adds_the_state_after_the_answer_where_there_is_room(longest: int) -> None:
    """TRL: the score at L + 1 if L + 1 < T, else at L; T is the longest answer."""
    mask = torch.cat([PLACES, torch.zeros(5, 1, dtype=torch.bool)], 1)
    got = extended(mask, longest)
    for row, wide in zip(mask.tolist(), got.tolist(), strict=True):
        want = row[:]
        own = [j for j, counts in enumerate(row) if counts]
        if 0 < len(own) < longest:
            want[own[-1] + 1] = True
        assert wide == want
    assert torch.equal(mask[:, :5], PLACES)  # the input is left alone


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("after", [False, True])
def test_token_rewards(seed: int, after: bool) -> None:
    b, t = 5, 9
    generator = torch.Generator().manual_seed(seed)
    scores, kl = torch.randn(b, generator=generator), torch.randn(b, t, generator=generator)
    mask = random_mask(b, t, seed)
    at = torch.tensor([min(t - 1, max(j for j in range(t) if row[j]) + 1) for row in mask])
    got = token_rewards(scores, kl, mask, kl_coef=0.3, at=at if after else None)
    for i in range(b):
        last = int(at[i]) if after else max(j for j in range(t) if mask[i, j])
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


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("seed", range(3))
def test_rewards_to_go(gamma: float, seed: int) -> None:
    """REINFORCE++: for each token, its own and all later rewards, discounted by sampled tokens."""
    mask = random_mask(5, 9, seed)
    mask[2] = False
    rewards = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed))
    got = rewards_to_go(rewards, mask, gamma=gamma)
    for i in range(5):
        steps = [j for j in range(9) if mask[i, j]]
        for j in range(9):
            ahead = [k for k in steps if k >= j] if mask[i, j] else []
            want = sum(gamma**n * float(rewards[i, k]) for n, k in enumerate(ahead))
            assert float(got[i, j]) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_bandit(seed: int) -> None:
    """One action an answer: score less the mean KL, less the value before the first token."""
    generator = torch.Generator().manual_seed(seed)
    b, t = 5, 9
    mask = random_mask(b, t, seed)
    mask[1] = False
    scores = torch.randn(b, generator=generator)
    kl, values = torch.randn(b, t, generator=generator), torch.randn(b, t, generator=generator)
    advantages, returns = bandit(scores, kl, values, mask, kl_coef=0.4)
    assert not advantages[1].any()
    assert not returns[1].any()
    for i in (0, 2, 3, 4):
        own = [j for j in range(t) if mask[i, j]]
        reward = float(scores[i]) - 0.4 * sum(float(kl[i, j]) for j in own) / len(own)
        for j in range(t):
            want = reward - float(values[i, own[0]]) if j in own else 0.0
            assert float(advantages[i, j]) == pytest.approx(want, abs=1e-5)
            assert float(returns[i, j]) == pytest.approx(reward if j == own[0] else 0.0, abs=1e-5)


@pytest.mark.parametrize("lengths", [[3, 5, 1, 5]])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8)])
def test_the_whole_chain_of_trl(lengths: list[int], gamma: float, lam: float) -> None:
    """TRL 1.12's loop over all T columns, L the index of an answer's last token: values and rewards are zero from L + 2
    on, and the score sits at L + 1 where that is inside T = 5."""
    b, t = len(lengths), 5
    generator = torch.Generator().manual_seed(3)
    values, kl = torch.randn(b, t + 1, generator=generator), torch.randn(b, t + 1, generator=generator)
    scores = torch.randn(b, generator=generator)
    mask = torch.arange(t + 1) < torch.tensor(lengths)[:, None]  # one free column, as `extended` asks for
    where = extended(mask, t)
    rewards = token_rewards(scores, kl, mask, kl_coef=0.1, at=last_target(where))
    advantages, returns = gae(rewards, values, where, gamma=gamma, lam=lam)
    for i, length in enumerate(lengths):
        last = length - 1
        v = [float(values[i, j]) if j <= last + 1 else 0.0 for j in range(t)]
        r = [-0.1 * float(kl[i, j]) if j <= last else 0.0 for j in range(t)]
        r[last + 1 if last + 1 < t else last] += float(scores[i])
        carry = 0.0
        for j in reversed(range(t)):
            carry = r[j] + gamma * (v[j + 1] if j + 1 < t else 0.0) - v[j] + gamma * lam * carry
            if j <= last:
                assert float(advantages[i, j]) == pytest.approx(carry, abs=1e-5)
            if j <= last + 1:
                assert float(returns[i, j]) == pytest.approx(carry + v[j], abs=1e-5)
