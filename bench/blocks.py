"""Comparing options over a few seeds: each seed is a block in which every option was run once."""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple


class Difference(NamedTuple):
    """Of an option to the plain model, the mean over the seeds."""

    mean: float
    half: float
    """Half of the 95 % interval; nan where it is not known."""

    @property
    def clear(self) -> bool:
        """Whether zero lies outside of the interval."""
        return abs(self.mean) > self.half


def differences(values: Mapping[str, Mapping[int, float]], base: str = "plain") -> dict[str, Difference]:
    """By option: the difference to `base`, from the values by option and seed.

    y = option + seed + error with one variance: half = t sqrt(2 MS / n), MS the residual mean square of the options
    that have a finite value for all n seeds of the base (Fisher 1935, randomised blocks). With two options it is the
    paired t interval.
    The others have a mean over the seeds that they share with the base, and no interval.
    """
    seeds = sorted(values[base])
    whole = [name for name, own in values.items() if all(math.isfinite(own.get(seed, math.nan)) for seed in seeds)]
    half = math.nan
    if len(whole) > 1 and len(seeds) > 1:
        rows = {name: [values[name][seed] for seed in seeds] for name in whole}
        of_row = {name: statistics.fmean(row) for name, row in rows.items()}
        of_seed = [statistics.fmean(column) for column in zip(*rows.values(), strict=True)]
        mean = statistics.fmean(of_seed)
        residuals = [
            value - of_row[name] - of_seed[i] + mean for name, row in rows.items() for i, value in enumerate(row)
        ]
        degrees = (len(whole) - 1) * (len(seeds) - 1)
        variance = sum(r * r for r in residuals) / degrees
        half = student(degrees) * math.sqrt(2 * variance / len(seeds))
    out = {}
    for name, own in values.items():
        shared = [own[seed] - values[base][seed] for seed in seeds if seed in own]
        if name != base and shared:
            out[name] = Difference(statistics.fmean(shared), half if name in whole else math.nan)
    return out


T_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def student(degrees: int) -> float:
    """Student's t for an interval of 95 %, by degrees of freedom; from ten on to a thousandth, by the expansion around
    the normal distribution (Abramowitz & Stegun 1964, 26.7.5)."""
    if degrees < len(T_95):
        return T_95[degrees]
    x, n = 1.959964, degrees
    first, second = (x**3 + x) / 4, (5 * x**5 + 16 * x**3 + 3 * x) / 96
    third = (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384
    return x + first / n + second / n**2 + third / n**3
