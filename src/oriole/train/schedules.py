"""Learning rates as pure functions of the step: a resumed run needs no state to know where it is.

Every schedule but `onecycle` begins with a linear warmup: n / w of the peak in step n = 1 … w (Goyal et al. 2017). What
follows is a share of the peak as a function of the progress p = (n - w) / (total - w), in (0, 1], so that the last step
has the lowest rate, m = `min_lr` of the peak (but for `noam`, which depends on n alone). torch.optim.lr_scheduler
counts in the same way, one step later.
"""

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from oriole.train.optim import OptimConfig

__all__ = ["Schedule", "check", "cosine", "exponential", "linear", "lr_at", "noam", "onecycle", "sgdr", "wsd"]

Schedule = Literal["cosine", "linear", "wsd", "sgdr", "onecycle", "exponential", "constant", "plateau", "noam"]

ONE_CYCLE_START = 1 / 25
"""First rate of `onecycle` as a share of the peak (torch's and fastai's default)."""


def lr_at(step: int, total: int, config: "OptimConfig") -> float:
    """Learning rate of step `step` = 0 … total - 1 by `config.schedule`, its warmup and its other fields."""
    n = step + 1
    if config.schedule == "onecycle":
        return config.lr * onecycle(n, total, config.rise, config.min_lr)
    warmup = round(config.warmup * total) if config.warmup < 1 else round(config.warmup)
    if n <= warmup:
        return config.lr * n / warmup
    left = max(1, total - warmup)
    done = min(n - warmup, left)
    progress = done / left
    match config.schedule:
        case "constant" | "plateau":
            share = 1.0
        case "cosine":
            share = cosine(progress, config.min_lr)
        case "linear":
            share = linear(progress, config.min_lr)
        case "wsd":
            decay = min(left, max(1, round(config.decay * total)))
            share = wsd(done, left, decay, config.min_lr)
        case "sgdr":
            share = sgdr(done, left, config.cycles, config.cycle_mult, config.min_lr)
        case "exponential":
            share = exponential(progress, config.min_lr)
        case "noam":
            share = noam(n, warmup)
    return config.lr * share


def check(schedule: Schedule, low: float) -> None:
    """`ValueError` for a schedule that cannot end at the share `low` of the peak."""
    if schedule == "exponential" and low == 0:
        raise ValueError("schedule=exponential never reaches 0; give min_lr a value above it, for example 0.01")


def cosine(progress: float, low: float) -> float:
    """m + (1 - m) (1 + cos(pi p)) / 2 (Loshchilov & Hutter 2017, without restarts)."""
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, low: float) -> float:
    """1 - (1 - m) p. Down to 0 it is the best of the simple ones for a fixed budget (Bergsma et al. 2025)."""
    return 1 - (1 - low) * progress


def wsd(done: int, left: int, decay: int, low: float) -> float:
    """The peak, then a straight line to m over the last `decay` of the `left` steps (Hu et al. 2024)."""
    start = left - decay
    return linear(max(0, done - start) / max(1, left - start), low)


def sgdr(done: int, left: int, cycles: int, mult: float, low: float) -> float:
    """Cosine with warm restarts: `cycles` of them, each `mult` times as long as the one before (Loshchilov & Hutter
    2017). The first has the length that lets the last end with the last step; every one ends at m."""
    lengths = [mult**i for i in range(cycles)]
    start = 0
    for i in range(cycles):
        end = round(left * sum(lengths[: i + 1]) / sum(lengths))
        if done <= end:
            return cosine((done - start) / (end - start), low)
        start = end
    return low


def noam(n: int, warmup: int) -> float:
    """sqrt(w / n) after the warmup: with a peak of 1 / sqrt(D w) it is the rate of Vaswani et al. 2017, equation 3,
    D^-0.5 min(n^-0.5, n w^-1.5). It has no end, and knows no `min_lr`."""
    return math.sqrt(max(1, warmup) / n)


def onecycle(n: int, total: int, rise: float, low: float) -> float:
    """Up by half a cosine from 1/25 of the peak over the first `rise` of the steps, and down to m by another (Smith &
    Topin 2018, in the form of fastai and torch; momentum stays as it is). n = 1 … total."""
    top = max(1, round(rise * total))
    if n <= top:
        progress = (n - 1) / (top - 1) if top > 1 else 1.0
        return 1 - (1 - ONE_CYCLE_START) * 0.5 * (1 + math.cos(math.pi * progress))
    return cosine((n - top) / max(1, total - top), low)


def exponential(progress: float, low: float) -> float:
    """m^p: every step multiplies the rate by the same factor, and the last one has m."""
    return float(low**progress)
