"""Expected calibration error, by hand."""

import math

import numpy as np
import pytest

from oriole.infer.calibration import calibration_error


def test_each_part_weighs_as_much_as_falls_into_it() -> None:
    sure = np.array([0.95, 0.95, 0.95, 0.95, 0.15])
    right = np.array([1.0, 1.0, 1.0, 0.0, 0.0])  # 0.95 sure, 0.75 right; 0.15 sure, never right
    assert calibration_error(sure, right) == pytest.approx((4 * 0.20 + 0.15) / 5)
    assert calibration_error(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0
    assert calibration_error(np.array([0.6, 0.55]), np.array([1.0, 0.0]), bins=1) == pytest.approx(0.075)
    assert math.isnan(calibration_error(np.array([]), np.array([])))
