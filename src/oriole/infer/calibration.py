"""Whether a probability of being right is one: what is 80 % sure should be right four times out of five."""

import numpy as np

__all__ = ["calibration_error"]

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]

BINS = 10


def calibration_error(sure: Floats, right: Floats, bins: int = BINS, least: float = 0.0) -> float:
    """Expected calibration error, 0 … 1, of confidences `sure` (N,) in what came out `right` (N,), 0 … 1.

    Confidences are sorted into `bins` equal parts of [least, 1]; in each, the mean of `right` is compared with the mean
    confidence, and the absolute differences are averaged by the number in a part (Guo et al. 2017, eq. 3). `nan` where
    there is nothing.
    """
    if not len(sure):
        return float("nan")
    places = np.clip(((sure - least) / (1 - least) * bins).astype(np.int64), 0, bins - 1)
    difference = np.bincount(places, right - sure, minlength=bins)
    return float(np.abs(difference).sum() / len(sure))
