"""Intervals against hand-checked and published cases, and against simulation."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oriole.apps.intervals import Interval, binomial, difference, win_rate


def test_binomial_by_hand() -> None:
    assert binomial(0, 0) == Interval(0.5, 0.0, 1.0)
    # Without a failure the lower limit is the n-th root of 0.025; without a success the upper one mirrors it.
    assert binomial(5, 5) == pytest.approx((1.0, 0.025 ** (1 / 5), 1.0))
    assert binomial(0, 400) == pytest.approx((0.0, 0.0, 1 - 0.025 ** (1 / 400)))
    # R: binom.test(7, 20)$conf.int is 0.1539092 0.5921885; binom.test(682, 925) 0.7076683 0.7654066 (its own example).
    assert binomial(7, 20) == pytest.approx((0.35, 0.1539092, 0.5921885), abs=1e-7)
    assert binomial(682, 925) == pytest.approx((682 / 925, 0.7076683, 0.7654066), abs=1e-7)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_tails_at_the_limits_are_exact(case: tuple[int, int]) -> None:
    k, n = case

    def at_least(successes: int, p: Fraction) -> float:
        return float(sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(successes, n + 1)))

    found = binomial(k, n, 0.9)
    if k:
        assert at_least(k, Fraction(found.low)) == pytest.approx(0.05, rel=1e-6)
    if k < n:
        assert 1 - at_least(k + 1, Fraction(found.high)) == pytest.approx(0.05, rel=1e-6)
    assert found.low <= found.value <= found.high


def test_win_rate_by_hand() -> None:
    assert win_rate(0, 0, 0) == Interval(0.5, 0.0, 1.0)
    assert win_rate(3, 1, 4).value == (3 + 4 / 2) / 8
    # Nothing decided: at most 1 - 0.005 ** (1 / 400) of all comparisons are, and either side may win them all.
    most = 1 - 0.005 ** (1 / 400)
    assert win_rate(0, 0, 400) == pytest.approx((0.5, 0.5 - most / 2, 0.5 + most / 2))
    # 5 to 0 has a two-sided probability of 1/16, 6 to 0 one of 1/32: only the second is below 0.04.
    assert win_rate(5, 0, 395).low < 0.5 < win_rate(6, 0, 394).low
    assert win_rate(0, 6, 394).high < 0.5
    share, often = binomial(80, 100, 0.96), binomial(100, 400, 0.99)
    low, high = 0.5 + often.low * (share.low - 0.5), 0.5 + often.high * (share.high - 0.5)
    assert win_rate(80, 20, 300) == pytest.approx((0.575, low, high))
    assert win_rate(400, 0, 0).low == pytest.approx(0.5 + (0.02 ** (1 / 400) - 0.5) * 0.005 ** (1 / 400))


def test_difference_by_hand() -> None:
    assert difference(0, 0, 0) == Interval(0.0, -1.0, 1.0)
    assert difference(20, 5, 100).value == pytest.approx(0.15)
    assert difference(20, 5, 100).low > 0 > difference(5, 20, 100).high
    rate = win_rate(20, 5, 75)
    assert difference(20, 5, 100) == pytest.approx([2 * x - 1 for x in rate])


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 200))
def test_swapping_the_two_sides_mirrors_the_interval(wins: int, losses: int, ties: int) -> None:
    one, other = win_rate(wins, losses, ties), win_rate(losses, wins, ties)
    assert one == pytest.approx((1 - other.value, 1 - other.high, 1 - other.low))


@pytest.mark.parametrize("rate, ties", [(0.5, 0.0), (0.5, 0.6), (0.51, 0.98), (0.7, 0.3), (0.9, 0.1), (0.99, 0.01)])
def test_intervals_cover_the_truth(rate: float, ties: float) -> None:
    """In at least 95 of 100 simulated comparisons of 400 prompts."""
    rng = np.random.default_rng(3)
    win = rate - ties / 2
    runs = 250
    found = [win_rate(*map(int, counts)) for counts in rng.multinomial(400, [win, 1 - ties - win, ties], size=runs)]
    hits = sum(one.low <= rate <= one.high for one in found)
    assert all(one.low <= one.value <= one.high for one in found)
    assert hits / runs >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / runs)
