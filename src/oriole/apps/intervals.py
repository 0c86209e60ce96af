"""Exact intervals for shares and for paired comparisons: who wins, how often, and how sure that is."""

from typing import NamedTuple

import numpy as np

__all__ = ["Interval", "binomial", "difference", "win_rate"]

CONFIDENCE = 0.95
"""Of every interval, unless it is said otherwise."""

OF_WINS = 0.8
"""The part of a win rate's error that is spent on who wins; the rest goes to how often anybody does."""


class Interval(NamedTuple):
    """An estimate with the limits of its interval."""

    value: float
    low: float
    high: float


def binomial(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """The share of successes with its exact interval (Clopper and Pearson 1934); all of 0 to 1 without a trial.

    Whatever the true share, the interval misses it in at most `1 - confidence` of all samples, half of that on either
    side.
    """
    if not trials:
        return Interval(0.5, 0.0, 1.0)
    tail = (1 - confidence) / 2
    low = _lower(successes, trials, tail)
    return Interval(successes / trials, low, 1 - _lower(trials - successes, trials, tail))


def _lower(successes: int, trials: int, tail: float) -> float:
    """The share at which so many successes or more have the probability `tail`; 0 for none."""
    if not successes:
        return 0.0
    n = np.arange(1, trials + 1)
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(n))))
    k = np.arange(successes, trials + 1)
    log_ways = log_factorial[trials] - log_factorial[k] - log_factorial[trials - k]
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        at_least = np.exp(log_ways + k * np.log(p) + (trials - k) * np.log1p(-p)).sum() if p < 1 else 1.0
        low, high = (low, p) if at_least > tail else (p, high)
    return low


def win_rate(wins: int, losses: int, ties: int, confidence: float = CONFIDENCE) -> Interval:
    """Share of wins among paired comparisons, a tie counting half; 1/2 is no difference.

    It is 1/2 + d (s - 1/2), where d is the share of comparisons that are decided and s the share of wins among these.
    Both have exact intervals, which together leave out the truth as often as one of `confidence` may, s four times as
    often as d; so the interval is exact, and lies wholly on one side of 1/2 exactly when the two-sided sign test, at
    four fifths of that error, finds a difference.
    """
    total, decided = wins + losses + ties, wins + losses
    error = 1 - confidence
    share = binomial(wins, decided, 1 - OF_WINS * error)
    often = binomial(decided, total, 1 - (1 - OF_WINS) * error)
    low = 0.5 + (share.low - 0.5) * (often.low if share.low > 0.5 else often.high)
    high = 0.5 + (share.high - 0.5) * (often.high if share.high > 0.5 else often.low)
    return Interval((wins + ties / 2) / total if total else 0.5, low, high)


def difference(gained: int, lost: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Difference of two shares over the same `total` items, of which `gained` have it only afterwards, `lost` before.

    It is twice the win rate, less 1: zero lies outside when McNemar's exact test finds a difference.
    """
    return Interval(*(2 * limit - 1 for limit in win_rate(gained, lost, total - gained - lost, confidence)))
