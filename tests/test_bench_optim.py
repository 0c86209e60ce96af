"""How bench.optim reads curves: where one crosses a goal, and the interval over seeds."""

import math

import pytest

from bench.optim import crossing, interval


def test_a_crossing_lies_on_the_straight_line_in_log_tokens() -> None:
    curve = [(100.0, 3.0), (200.0, 2.0), (400.0, 1.5), (800.0, 1.4)]
    assert crossing(curve, 2.0) == pytest.approx(200)
    assert crossing(curve, 1.75) == pytest.approx(200 * 2**0.5)
    assert crossing(curve, 3.5) == 100  # reached before the first point: at most that
    assert crossing(curve, 1.3) == math.inf


def test_the_interval_is_students_over_the_logarithms() -> None:
    ratios = [0.7, 0.8, 0.9]
    logs = [math.log(r) for r in ratios]
    mean = sum(logs) / 3
    half = 4.30 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2) / math.sqrt(3)
    assert interval(ratios) == f"{math.exp(mean):.2f} ({math.exp(mean - half):.2f} … {math.exp(mean + half):.2f})"
    assert interval([0.7, math.inf]) == "not reached with 1 of 2 seeds"
    assert interval([0.7]) == "0.70 (one seed)"
