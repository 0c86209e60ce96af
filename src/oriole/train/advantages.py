"""From rewards to advantages, and the clipped losses that use them: pure functions, the same in any precision.

N answers of at most A tokens are (N, A) tensors with a boolean `mask` (N, A), True on an answer's tokens, which come
first in their row; what stands beyond an answer is never read.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "KL", "Clipped", "Scale", "adapted", "clipped_policy_loss", "clipped_value_loss", "confidence", "gae",
    "group_advantages", "group_deviations", "kl_estimate", "leave_one_out", "masked_mean", "token_rewards", "whiten",
]  # fmt: skip

KL = Literal["k1", "k3"]
"""How the KL divergence is estimated at a sampled token: k1 is unbiased, k3 too and never negative."""

Scale = Literal["group", "batch", "none"]

STD_EPS = 1e-4
"""Added to a standard deviation of rewards before dividing by it (TRL)."""
VARIANCE_EPS = 1e-8
"""Added to a variance before its root divides (TRL)."""


# --- KL --------------------------------------------------------------------------------------------------------------


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: KL) -> Tensor:
    """Estimates of KL(policy || reference) at tokens that the policy has drawn, of any shape.

    k1 = log p - log q; k3 = q/p - 1 - log(q/p). Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = log_probs - ref_log_probs
    match kind:
        case "k1":
            return log_ratio
        case "k3":
            return torch.expm1(-log_ratio) + log_ratio


def adapted(coefficient: float, kl: float, target: float, horizon: float, answers: int) -> float:
    """The KL coefficient after `answers` answers whose mean KL was `kl`: proportional control of its logarithm.

    Ziegler et al. 2019 (arXiv:1909.08593), section 2.2: the error kl / target - 1 is clipped to 0.2 either way.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return coefficient * (1 + error * answers / horizon)


# --- PPO -------------------------------------------------------------------------------------------------------------


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """The reward (N, A) of each token: minus `coefficient` times its KL, and at an answer's last the score (N,)."""
    ends = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return torch.where(mask, -coefficient * kl, 0.0) + torch.where(ends, scores[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N, A), 0 beyond the answers, from rewards and values (N, A).

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, R_t = A_t + V_t; behind an answer's last
    token the value is 0. Schulman et al. 2016 (arXiv:1506.02438), equations 11, 12 and 16.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        following = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * following
        advantages[:, t] = following
    advantages = torch.where(mask, advantages, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean (0-dim) of x where the mask is True; 0 where it never is."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """x scaled to variance 1 (unbiased) where the mask is True, and with `shift_mean` to mean 0; elsewhere 0."""
    count = mask.sum()
    mean = masked_mean(x, mask)
    variance = torch.where(mask, (x - mean).square(), 0.0).sum() / (count - 1).clamp(min=1)
    out = (x - mean) * torch.rsqrt(variance + VARIANCE_EPS)
    return torch.where(mask, out if shift_mean else out + mean, 0.0)


# --- groups ----------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale: Scale) -> Tensor:
    """Rewards (P, G) of G answers to each of P prompts, less their group's mean, over a standard deviation.

    `group`: the group's (Shao et al. 2024, arXiv:2402.03300, section 4.1.2); `batch`: that of all rewards; `none`:
    undivided (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783). An answer without a reward (nan) counts for nothing in its
    group and has advantage 0.
    """
    known = rewards.isfinite()
    centred = torch.where(known, rewards - _mean(rewards, known), 0.0)
    match scale:
        case "group":
            deviation = _std(centred, known)
        case "batch":
            values = rewards[known]
            deviation = values.std() if len(values) > 1 else torch.zeros_like(rewards[0, 0])
        case "none":
            return centred
    return centred / (deviation + STD_EPS)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards (P, G), each less the mean of the others in its group (RLOO, Ahmadian et al. 2024, arXiv:2402.14740).

    Answers without a reward (nan), or alone in their group, have advantage 0.
    """
    known = rewards.isfinite()
    count = known.sum(1, keepdim=True)
    total = torch.where(known, rewards, 0.0).sum(1, keepdim=True)
    others = (total - rewards) / (count - 1).clamp(min=1)
    return torch.where(known & (count > 1), rewards - others, 0.0)


def group_deviations(rewards: Tensor) -> Tensor:
    """The standard deviation (P,) of each group of rewards (P, G); 0 where fewer than two are known."""
    known = rewards.isfinite()
    return _std(torch.where(known, rewards - _mean(rewards, known), 0.0), known)[:, 0]


def _mean(rewards: Tensor, known: Tensor) -> Tensor:
    return torch.where(known, rewards, 0.0).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)


def _std(centred: Tensor, known: Tensor) -> Tensor:
    return (centred.square().sum(1, keepdim=True) / (known.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()


# --- losses ----------------------------------------------------------------------------------------------------------


class Clipped(NamedTuple):
    """A loss for each unit, and where clipping decides it."""

    loss: Tensor
    low: Tensor
    """True where the ratio fell below 1 - clip and the advantage is negative."""
    high: Tensor
    """True where the ratio rose above 1 + clip and the advantage is positive."""


def clipped_policy_loss(log_ratio: Tensor, advantages: Tensor, *, clip: float, clip_high: float) -> Clipped:
    """-min(r A, clamp(r, 1 - clip, 1 + clip_high) A) for each unit, with r = exp(log_ratio).

    Schulman et al. 2017 (arXiv:1707.06347), equation 7; two bounds: DAPO (Yu et al. 2025, arXiv:2503.14476), eq. 10.
    """
    ratio = log_ratio.exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip_high) * advantages)
    return Clipped(loss, (ratio < 1 - clip) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """0.5 max((V - R)^2, (clamp(V, V_old +- clip) - R)^2) for each unit, and where the clamped one decides.

    As in PPO's first code (Huang et al. 2022, "The 37 implementation details of PPO", detail 9).
    """
    clamped = torch.max(torch.min(values, old_values + clip), old_values - clip)
    plain, held = (values - returns).square(), (clamped - returns).square()
    return 0.5 * torch.max(plain, held), held > plain


def confidence(differences: Tensor) -> tuple[float, float, float]:
    """Mean of paired differences (n,), n > 1, and its 95 % interval, by the normal approximation."""
    mean, spread = float(differences.mean()), 1.96 * float(differences.std()) / math.sqrt(len(differences))
    return mean, mean - spread, mean + spread
