"""Every advantage and loss equals a slow one, written out token by token in fp64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from oriole.train import advantages as A

N, T = 7, 9


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(seed: int) -> Tensor:
    lengths = torch.randint(1, T + 1, (N,), generator=torch.Generator().manual_seed(seed))
    lengths[0], lengths[1] = 1, T
    return torch.arange(T) < lengths[:, None]


def near(ours: Tensor, slow: Any, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours.double(), torch.as_tensor(slow, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert ours.dtype == dtype


def test_kl_estimates(dtype: torch.dtype) -> None:
    p, q = 0.3 * drawn(1, N, T), 0.3 * drawn(2, N, T)
    near(A.kl_estimate(p.to(dtype), q.to(dtype), "k1"), p - q, dtype)
    slow = [[math.exp(b - a) - 1 - (b - a) for a, b in zip(x, y, strict=True)] for x, y in zip(p, q, strict=True)]
    near(A.kl_estimate(p.to(dtype), q.to(dtype), "k3"), slow, dtype)


def test_both_estimates_have_the_divergence_as_their_mean() -> None:
    p, q = drawn(3, 50).log_softmax(0), drawn(4, 50).log_softmax(0)
    exact = float((p.exp() * (p - q)).sum())
    for kind in ("k1", "k3"):
        assert float((p.exp() * A.kl_estimate(p, q, kind)).sum()) == pytest.approx(exact, rel=1e-9)  # type: ignore[arg-type]
    assert (A.kl_estimate(p, q, "k3") >= 0).all() and (A.kl_estimate(p, q, "k1") < 0).any()


def test_the_coefficient_follows_the_divergence_by_a_fifth_at_most() -> None:
    assert A.adapted(0.1, kl=6.6, target=6, horizon=1000, answers=50) == pytest.approx(0.1 * (1 + 0.1 * 50 / 1000))
    assert A.adapted(0.1, kl=100, target=6, horizon=1000, answers=50) == pytest.approx(0.1 * (1 + 0.2 * 50 / 1000))
    assert A.adapted(0.1, kl=0, target=6, horizon=1000, answers=50) == pytest.approx(0.1 * (1 - 0.2 * 50 / 1000))


def test_the_score_comes_with_the_last_token(dtype: torch.dtype) -> None:
    scores, kl, mask = drawn(5, N), drawn(6, N, T), mask_of(7)
    slow = torch.zeros(N, T, dtype=torch.float64)
    for i in range(N):
        n = int(mask[i].sum())
        for t in range(n):
            slow[i, t] = -0.3 * kl[i, t] + (scores[i] if t == n - 1 else 0.0)
    near(A.token_rewards(scores.to(dtype), kl.to(dtype), mask, 0.3), slow, dtype)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0)])
def test_gae(dtype: torch.dtype, gamma: float, lam: float) -> None:
    rewards, values, mask = drawn(8, N, T), drawn(9, N, T), mask_of(10)
    slow = torch.zeros(N, T, dtype=torch.float64)
    for i in range(N):
        n = int(mask[i].sum())
        delta = [
            float(rewards[i, t]) + gamma * (float(values[i, t + 1]) if t + 1 < n else 0.0) - float(values[i, t])
            for t in range(n)
        ]
        for t in range(n):  # equation 16, the sum written out
            slow[i, t] = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
    # What stands beyond an answer is never read.
    filled = [torch.where(mask, x, math.nan).to(dtype) for x in (rewards, values)]
    advantages, returns = A.gae(*filled, mask, gamma=gamma, lam=lam)
    near(advantages, slow, dtype)
    near(returns, torch.where(mask, slow + values, 0.0), dtype)


def test_gae_with_lambda_1_is_what_follows_less_what_was_expected() -> None:
    rewards, values, mask = drawn(8, N, T), drawn(9, N, T), mask_of(10)
    advantages, returns = A.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    rewards = torch.where(mask, rewards, 0.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0.0))
    torch.testing.assert_close(advantages, torch.where(mask, to_go - values, 0.0))


@pytest.mark.parametrize("shift", [True, False])
def test_whitening(dtype: torch.dtype, shift: bool) -> None:
    x, mask = 3 + 2 * drawn(11, N, T), mask_of(12)
    kept = [float(v) for v, m in zip(x.flatten(), mask.flatten(), strict=True) if m]
    mean = sum(kept) / len(kept)
    variance = sum((v - mean) ** 2 for v in kept) / (len(kept) - 1)
    slow = torch.where(mask, (x - mean) / math.sqrt(variance + 1e-8) + (0 if shift else mean), 0.0)
    near(A.whiten(torch.where(mask, x, math.nan).to(dtype), mask, shift_mean=shift), slow, dtype)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("gap", [False, True])
def test_group_advantages(dtype: torch.dtype, scale: A.Scale, gap: bool) -> None:
    rewards = drawn(13, 5, 4)
    if gap:
        rewards[1, 2] = rewards[3, 0] = math.nan
    groups = [[float(r) for r in row if not math.isnan(r)] for row in rewards]
    means = [sum(g) / len(g) for g in groups]
    centred = [[r - m for r in g] for g, m in zip(groups, means, strict=True)]
    every = [r for g in groups for r in g]
    total = sum(every) / len(every)
    spread = {
        "group": [math.sqrt(sum(c * c for c in g) / (len(g) - 1)) for g in centred],
        "batch": [math.sqrt(sum((r - total) ** 2 for r in every) / (len(every) - 1))] * 5,
        "none": [1 - 1e-4] * 5,
    }[scale]
    slow = [
        [0.0 if math.isnan(r) else (float(r) - m) / (s + 1e-4) for r in row]
        for row, m, s in zip(rewards, means, spread, strict=True)
    ]
    near(A.group_advantages(rewards.to(dtype), scale), slow, dtype)


@pytest.mark.parametrize("gap", [False, True])
def test_leave_one_out(dtype: torch.dtype, gap: bool) -> None:
    rewards = drawn(14, 5, 4)
    if gap:
        rewards[1, 2] = math.nan
        rewards[2, 1:] = math.nan
    slow = torch.zeros(5, 4, dtype=torch.float64)
    for i in range(5):
        for j in range(4):
            others = [float(rewards[i, k]) for k in range(4) if k != j and not math.isnan(rewards[i, k])]
            if others and not math.isnan(rewards[i, j]):
                slow[i, j] = rewards[i, j] - sum(others) / len(others)
    near(A.leave_one_out(rewards.to(dtype)), slow, dtype)


def test_group_deviations_are_zero_where_all_are_alike() -> None:
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.5], [2.0, math.nan, math.nan]], dtype=torch.float64)
    assert A.group_deviations(rewards).tolist() == [0.0, 0.5, 0.0]


def test_clipped_policy_loss(dtype: torch.dtype) -> None:
    log_ratio, gain = 0.4 * drawn(15, 200), drawn(16, 200)
    made = A.clipped_policy_loss(log_ratio.to(dtype), gain.to(dtype), clip=0.2, clip_high=0.3)
    slow, low, high = [], [], []
    for x, a in zip(log_ratio.tolist(), gain.tolist(), strict=True):
        r = math.exp(x)
        slow.append(-min(r * a, min(max(r, 0.8), 1.3) * a))
        low.append(r < 0.8 and a < 0)
        high.append(r > 1.3 and a > 0)
    near(made.loss, slow, dtype)
    assert made.low.tolist() == low and made.high.tolist() == high and any(low) and any(high)


def test_clipped_ratios_have_no_gradient() -> None:
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    gain = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    A.clipped_policy_loss(log_ratio, gain, clip=0.2, clip_high=0.2).loss.sum().backward()
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad[[0, 2]], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(log_ratio.grad[[1, 3, 4]], -(gain * log_ratio.detach().exp())[[1, 3, 4]])


def test_clipped_value_loss(dtype: torch.dtype) -> None:
    values, old, returns = drawn(17, 200), drawn(18, 200), drawn(19, 200)
    made, held = A.clipped_value_loss(values.to(dtype), old.to(dtype), returns.to(dtype), 0.2)
    slow, decides = [], []
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        clamped = min(max(v, o - 0.2), o + 0.2)
        slow.append(0.5 * max((v - r) ** 2, (clamped - r) ** 2))
        decides.append((clamped - r) ** 2 > (v - r) ** 2)
    near(made, slow, dtype)
    assert held.tolist() == decides and any(decides) and not all(decides)


def test_the_interval_of_a_mean() -> None:
    mean, low, high = A.confidence(torch.tensor([0.0, 1.0, 1.0, 2.0], dtype=torch.float64))
    assert mean == 1.0 and high - mean == pytest.approx(1.96 * math.sqrt(2 / 3) / 2) == pytest.approx(mean - low)
