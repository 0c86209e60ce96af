"""The nearest orthogonal matrix by matrix products alone: U V^T of the singular value decomposition U S V^T.

Each step multiplies y by a polynomial of its Gram matrix G = y y^T, p(G) = a I + b G + c G², and so maps its singular
values by x -> a x + b x³ + c x⁵, in bf16 where the hardware has it.
"""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Method", "fast_dtype", "orthogonalise"]

Method = Literal["polar-express", "newton-schulz"]

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""Lifts small singular values fast and never settles: what comes out lies between 0.67 and 1.2 (Jordan et al. 2024)."""
POLAR_EXPRESS = (
    (8.185466, -23.306189, 17.087982),
    (3.956344, -2.910707, 0.551435),
    (3.344841, -2.508153, 0.512277),
    (2.324058, -1.689827, 0.421071),
)
"""The four polynomials that in turn bring [0.004, 1] as near to 1 as any can: 0.87 to 1.13 (Amsel, Persson, Musco &
Gower 2025, algorithm 1 with l = 0.004; tests/train/test_orthogonal.py computes them anew)."""
SAFETY = 1.02
"""All but the last are stretched by this, for beyond 1, where rounding may lead, they rise steeply."""
ROUNDS = {4: (2, 2), 5: (3, 2)}
"""Steps of a long matrix between two looks at it, by their number."""


def orthogonalise(x: Tensor, method: Method = "polar-express") -> Tensor:
    """About U V^T for each matrix of x (k, n, m), in the dtype of the iteration; zero where x is zero.

    Singular values above a hundredth of the largest become 0.85 to 1.16, with newton-schulz 0.65 to 1.25; those far
    below stay behind in proportion.
    """
    y = x.to(fast_dtype(x.device))
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-30)
    short, long = sorted(y.shape[1:])
    left = y.shape[1] == short
    polynomials = _polynomials(method)
    # For a long matrix it is cheaper to follow the small square ones and to multiply y once for several steps; but in
    # bf16 their errors grow with each, and four in a row turn the small singular values of a real gradient into noise.
    rounds = ROUNDS[len(polynomials)] if 2 * long > 3 * short else (1,) * len(polynomials)
    for index, steps in enumerate(rounds):
        gram = y @ y.mT if left else y.mT @ y
        start = sum(rounds[:index])
        for step in range(start, start + steps):
            a, b, c = polynomials[step]
            if step == 0 and method == "polar-express":
                square = gram @ gram
                t = _shrinkage(square)
                gram = gram.mul_(t)
                p = _plus_diagonal(square.mul_(t).mul_(t).mul_(c).add_(gram, alpha=b), a)
                product = p * t.sqrt()
            else:
                p = _plus_diagonal(torch.baddbmm(gram, gram, gram, beta=b, alpha=c), a)
                product = p if step == start else p @ product
            if step < start + steps - 1:
                gram = p @ gram @ p  # of the next y
        y = product @ y if left else y @ product
    out: Tensor = y
    return out


def _polynomials(method: Method) -> tuple[tuple[float, float, float], ...]:
    if method == "newton-schulz":
        return NEWTON_SCHULZ
    *others, last = POLAR_EXPRESS
    return (*((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in others), last)


def _shrinkage(square: Tensor) -> Tensor:
    """t (k, 1, 1) by which G (k, n, n), whose square is given, is multiplied: its largest eigenvalue comes near
    1, but not above.

    The Frobenius norm of y is the root of the sum of all eigenvalues of G, and far above the largest where many are
    alike. The square of G has to be computed anyway, and the root of its norm is as safe a bound and much closer: the
    fourth root of the sum of their fourth powers. For a random matrix that saves one step.
    """
    norm: Tensor = square.norm(dim=(-2, -1), keepdim=True)
    return (norm + 1e-30).rsqrt()


def _plus_diagonal(matrices: Tensor, value: float) -> Tensor:
    """matrices (k, n, n) + value I, in place."""
    matrices.diagonal(dim1=-2, dim2=-1).add_(value)
    return matrices


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16, but fp32 on a CPU that would have to imitate it: that is far slower."""
    emulated = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if emulated else torch.bfloat16
