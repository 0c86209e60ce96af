"""How good a reward model is on held-out pairs: figures that follow from its scores, in NumPy and fp64."""

import math
from collections.abc import Mapping

import numpy as np

from oriole.infer import calibration

__all__ = ["accuracy", "auc", "calibration_error", "correlation", "figures"]

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]

BINS = calibration.BINS


def figures(chosen: Floats, rejected: Floats, margin: Floats, chosen_tokens: Floats, rejected_tokens: Floats,
            centre: float) -> dict[str, float]:  # fmt: skip
    """Everything about N pairs from their scores, the margins asked for and the lengths of the answers, each (N,).

    `accuracy`, `margin`, `min_reward`, `mean_reward` and `max_reward` are TRL's figures (RewardTrainer), and `loss` is
    what is trained. `auc` and `ece` are explained below. `length_correlation` is that of score and answer length over
    all answers, and `longer_chosen` the share of pairs whose chosen answer is the longer one: together they tell a
    model that has learnt "long is good" from data in which it is.
    """
    both = np.concatenate([chosen, rejected])
    gap = chosen - rejected
    longer = (chosen_tokens > rejected_tokens) + 0.5 * (chosen_tokens == rejected_tokens)
    return {
        "loss": float((np.logaddexp(0.0, margin - gap) + centre * (chosen + rejected) ** 2).mean()),
        "accuracy": accuracy(chosen, rejected),
        "auc": auc(chosen, rejected),
        "ece": calibration_error(chosen, rejected),
        "margin": float(gap.mean()),
        "min_reward": float(both.min()),
        "mean_reward": float(both.mean()),
        "max_reward": float(both.max()),
        "length_correlation": correlation(both, np.concatenate([chosen_tokens, rejected_tokens])),
        "longer_chosen": float(longer.mean()),
    }


def accuracy(chosen: Floats, rejected: Floats) -> float:
    """Share of the pairs whose chosen answer has the higher score; a tie is wrong."""
    return float((chosen > rejected).mean())


def auc(chosen: Floats, rejected: Floats) -> float:
    """Area under the ROC curve: how often any chosen answer outscores any rejected one, of whatever pair; ties half.

    By ranks (Mann and Whitney 1947): U = sum of the chosen answers' ranks - n (n + 1) / 2, over n m.
    """
    n, m = len(chosen), len(rejected)
    _, place, count = np.unique(np.concatenate([chosen, rejected]), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks = (last - (count - 1) / 2)[place]  # equal scores share the mean of their ranks
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def calibration_error(chosen: Floats, rejected: Floats, bins: int = BINS) -> float:
    """Expected calibration error of the probability that Bradley and Terry's model gives its own verdict, 0 … 1.

    The model prefers the higher score and is sigmoid(|r_c - r_r|) sure of it, at least one half. A tie is half right.
    """
    gap = chosen - rejected
    right = (gap > 0) + 0.5 * (gap == 0)
    return calibration.calibration_error(1.0 / (1.0 + np.exp(-np.abs(gap))), right, bins, least=0.5)


def correlation(x: Floats, y: Floats) -> float:
    """Pearson's correlation; 0 where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale > 0 else 0.0


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """To four places, for a record."""
    return {name: round(value, 4) for name, value in values.items()}
