"""The figures of a reward model, against cases worked out by hand and the slow definitions."""

import math

import numpy as np
import pytest

from oriole.train.rewardfigures import accuracy, auc, calibration_error, correlation, figures

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


def f64(*values: float) -> Floats:
    return np.array(values, dtype=np.float64)


def test_accuracy_counts_a_tie_as_wrong() -> None:
    assert accuracy(f64(2, 1, 0, 3), f64(1, 1, 1, -1)) == 0.5


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ((3, 4), (1, 2), 1.0),
        ((1, 2), (3, 4), 0.0),
        ((1, 1), (1, 1), 0.5),
        ((2, 0), (1, 1), 0.5),  # 2 beats both, 0 neither
        ((0.8, 0.4), (0.6, 0.4), 0.625),  # 0.8 beats both; 0.4 loses once and ties once: (2 + 0.5) / 4
    ],
)
def test_auc_of_cases_by_hand(chosen: tuple[float, ...], rejected: tuple[float, ...], expected: float) -> None:
    assert auc(f64(*chosen), f64(*rejected)) == expected


def test_auc_equals_all_comparisons_with_many_ties() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = rng.integers(0, 6, 80) / 2.0, rng.integers(-2, 5, 80) / 2.0
    gap = chosen[:, None] - rejected[None, :]
    assert auc(chosen, rejected) == pytest.approx(((gap > 0) + 0.5 * (gap == 0)).mean(), abs=1e-12)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_calibration_of_cases_by_hand() -> None:
    zero = np.zeros(4)
    # Four verdicts with 0.8 each, three right: |0.75 - 0.8|.
    a = logit(0.8)
    assert calibration_error(f64(a, a, a, -a), zero) == pytest.approx(0.05)
    # Two bins: 0.52 sure and half right (0.02), 0.92 sure and all right (0.08), two pairs each.
    low, high = logit(0.52), logit(0.92)
    assert calibration_error(f64(low, -low, high, high), zero) == pytest.approx(0.05)
    # Ties are half sure and half right; what is certain and right costs nothing, certain and wrong everything.
    assert calibration_error(zero, zero) == 0
    assert calibration_error(f64(800.0), f64(0)) == 0
    assert calibration_error(f64(-800.0), f64(0)) == 1


def test_calibration_of_scores_that_mean_what_they_say_tends_to_zero() -> None:
    rng = np.random.default_rng(1)
    gap = rng.normal(0, 2, 200_000)
    gap *= np.where(rng.random(gap.size) < 1 / (1 + np.exp(-np.abs(gap))), np.sign(gap), -np.sign(gap))
    assert calibration_error(gap, np.zeros_like(gap)) < 0.01
    assert calibration_error(3 * gap, np.zeros_like(gap)) > 0.1, "overconfident"


def test_correlation() -> None:
    assert correlation(f64(1, 2, 3), f64(2, 4, 6)) == pytest.approx(1)
    assert correlation(f64(1, 2, 3), f64(3, 2, 1)) == pytest.approx(-1)
    assert correlation(f64(1, 1, 1), f64(3, 2, 1)) == 0
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=50), rng.normal(size=50)
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)


def test_all_figures_of_two_pairs_by_hand() -> None:
    found = figures(f64(2, -1), f64(1, 0), f64(0.5, 0), f64(10, 4), f64(4, 4), centre=0.1)
    loss = [math.log(1 + math.exp(0.5 - 1)) + 0.1 * 9, math.log(1 + math.exp(1)) + 0.1 * 1]
    assert found.pop("loss") == pytest.approx(sum(loss) / 2)
    assert found.pop("ece") == pytest.approx(abs(0.5 - 1 / (1 + math.exp(-1))))
    scores, lengths = [2, -1, 1, 0], [10, 4, 4, 4]
    assert found.pop("length_correlation") == pytest.approx(np.corrcoef(scores, lengths)[0, 1])
    assert found == {
        "accuracy": 0.5, "auc": 0.5, "margin": 0, "min_reward": -1, "mean_reward": 0.5, "max_reward": 2,
        "longer_chosen": 0.75,
    }  # fmt: skip
