"""Orthogonal factors against the singular value decomposition in fp64, on spectra as gradients have them."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from oriole.train import orthogonal
from oriole.train.orthogonal import NEWTON_SCHULZ, POLAR_EXPRESS, Method, orthogonalise

METHODS = get_args(Method)
BOUNDS = {"polar-express": (0.85, 1.16), "newton-schulz": (0.65, 1.25)}


def best_quintic(low: float, high: float) -> tuple[float, float, float]:
    """a, b, c of the odd polynomial nearest to 1 on [low, high]: Remez' exchange, as in Amsel et al. 2025."""
    q, r, error, before = (3 * low + high) / 4, (low + 3 * high) / 4, math.inf, 0.0
    while abs(error - before) > 1e-15:
        before = error
        points = np.array([low, q, r, high])
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = (math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
    return a, b, c


def test_the_polynomials_are_those_of_the_paper() -> None:
    low, high, cushion = 0.004, 1.0, 0.02407327424182761
    for found in POLAR_EXPRESS:
        a, b, c = best_quintic(max(low, cushion * high), high)
        ends = [a * x + b * x**3 + c * x**5 for x in (low, high)]
        a, b, c = (2 * k / sum(ends) for k in (a, b, c))
        assert found == pytest.approx((a, b, c), rel=1e-5)
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
    x = np.geomspace(0.004, 1, 10_000)
    for a, b, c in POLAR_EXPRESS:
        x = a * x + b * x**3 + c * x**5
    assert 0.867 < x.min() < 0.868 and 1.132 < x.max() < 1.133


def spectrum(kind: str, n: int) -> Tensor:
    """Singular values, largest first."""
    match kind:
        case "flat":
            return torch.ones(n, dtype=torch.float64)
        case "two decades" | "four decades":
            return torch.logspace(0, -2 if kind == "two decades" else -4, n, dtype=torch.float64)
        case "one giant":
            return torch.tensor([100.0] + [1.0] * (n - 1), dtype=torch.float64)
        case _:
            return 1 / torch.arange(1, n + 1, dtype=torch.float64)


KINDS = ("flat", "two decades", "four decades", "one giant", "power law")


def factors(n: int, m: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """U (n, k), s (k,), V (m, k) of a matrix with random directions, in fp64."""
    generator = torch.Generator().manual_seed(n * m)
    k = min(n, m)
    u, v = (torch.linalg.qr(torch.randn(side, k, generator=generator, dtype=torch.float64)).Q for side in (n, m))
    return u, spectrum(kind, k), v


def wanted(s: Tensor, method: Method) -> Tensor:
    """What the polynomials make of singular values, in fp64 and one by one."""
    x = s / s.square().sum().sqrt()
    if method == "polar-express":
        x = x / x.pow(8).sum().pow(1 / 8)
        x = x / orthogonal.SAFETY
    for step, (a, b, c) in enumerate(POLAR_EXPRESS if method == "polar-express" else NEWTON_SCHULZ):
        x = a * x + b * x**3 + c * x**5
        if method == "polar-express" and step < 2:
            x = x / orthogonal.SAFETY
    return x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(256, 704), (48, 144), (144, 48), (64, 64), (60, 64), (5, 7)])
def test_equals_the_decomposition(n: int, m: int, kind: str, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 nearly exactly; in bf16 singular values within the promised bounds, and little across directions."""
    u, s, v = factors(n, m, kind)
    x = (u * s @ v.T).float()[None]
    clear = s > 0.01 * s[0]

    y = orthogonalise(x, method)[0].double()
    along = torch.einsum("nk,nm,mk->k", u, y, v)
    low, high = BOUNDS[method]
    assert low < float(along[clear].min()) and float(along.max()) < high
    assert float(torch.linalg.svdvals(y)[0]) < high + 0.05
    # 0.4 to 0.9 where noise has taken over the small singular values.
    assert float((y - u * along @ v.T).norm() / y.norm()) < 0.2

    monkeypatch.setattr(orthogonal, "fast_dtype", lambda device: torch.float32)
    y = orthogonalise(x, method)[0].double()
    ideal = u * wanted(s, method) @ v.T
    assert float((y - ideal).norm() / ideal.norm()) < 2e-3


@pytest.mark.parametrize("method", METHODS)
def test_scale_does_not_matter_and_zero_stays_zero(method: Method) -> None:
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    y = orthogonalise(x, method)
    assert not y[1].any() and bool(y.isfinite().all())
    for scale in (1e-12, 1e12):
        torch.testing.assert_close(orthogonalise(x * scale, method), y, atol=0.03, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_matrices_of_a_batch_do_not_know_each_other(method: Method) -> None:
    x = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 1e3]).view(
        3, 1, 1
    )
    apart = torch.cat([orthogonalise(one[None], method) for one in x])
    torch.testing.assert_close(orthogonalise(x, method), apart, atol=0.02, rtol=0)


def test_polar_express_is_nearer_to_orthogonal_in_fewer_steps() -> None:
    x = torch.randn(4, 64, 160, generator=torch.Generator().manual_seed(0))
    off = {m: float((torch.linalg.svdvals(orthogonalise(x, m).float()) - 1).abs().mean()) for m in METHODS}
    assert len(POLAR_EXPRESS) < len(NEWTON_SCHULZ) and off["polar-express"] < 0.6 * off["newton-schulz"]
