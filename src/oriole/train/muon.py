"""Muon: momentum whose update is made orthogonal, for the matrices between embedding and head (Jordan et al. 2024).

The update U V^T of the momentum's singular value decomposition is approximated by five Newton–Schulz steps of degree
five, in bf16 where the hardware has it. Matrices that are fused in memory are orthogonalised part by part, as if they
were apart, and all parts of one shape in one batched product.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Muon", "orthogonalise"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic x -> a x + b x^3 + c x^5, which lifts small singular values fastest (Jordan et al. 2024)."""
_ROUNDS, _ROUNDS_WIDE = (1, 1, 1, 1, 1), (3, 2)
"""Newton–Schulz steps between two looks at the matrix itself; five in all."""
MOMENTUM = 0.95


class _Part(NamedTuple):
    """Rows of a parameter that form one matrix."""

    place: int
    start: int
    rows: int


class Muon:
    """Updates `parameters` (matrices) in place; `parts` gives the row counts of those that are fused."""

    def __init__(self, parameters: Sequence[nn.Parameter], parts: Mapping[int, Sequence[int]]) -> None:
        """`parts` maps a parameter's place in the sequence to the rows of its parts; absent: one part."""
        self.parameters = list(parameters)
        self.momentum = [torch.zeros_like(p) for p in self.parameters]
        self._by_shape: dict[tuple[int, int], list[_Part]] = defaultdict(list)
        for index, parameter in enumerate(self.parameters):
            start = 0
            for rows in parts.get(index, (parameter.shape[0],)):
                shape = min(rows, parameter.shape[1]), max(rows, parameter.shape[1])
                self._by_shape[shape].append(_Part(index, start, rows))
                start += rows
            assert start == parameter.shape[0], "the parts of a fused matrix are all of it"

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, divisor: Tensor, bad: Tensor) -> None:
        """One update by the gradients divided by `divisor`; nothing changes where `bad` (0-dim) is not zero.

        W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows / columns)) U V^T, with Nesterov momentum.
        """
        nesterov = [
            # A parameter without gradient has one of zeros.
            _mix(torch.zeros_like(p) if p.grad is None else p.grad, momentum, divisor, bad)
            for p, momentum in zip(self.parameters, self.momentum, strict=True)
        ]
        keep, rate = (1 - lr * weight_decay * (1 - bad)), lr * (1 - bad)
        for parts in self._by_shape.values():
            wide = [_wide(nesterov[p.place][p.start : p.start + p.rows]) for p in parts]
            for part, update in zip(parts, orthogonalise(torch.stack(wide)), strict=True):
                rows = self.parameters[part.place][part.start : part.start + part.rows]
                scale = rate * max(1.0, part.rows / rows.shape[1]) ** 0.5
                _apply(rows, update if part.rows <= rows.shape[1] else update.mT, keep, scale)


def _mix(gradient: Tensor, momentum: Tensor, divisor: Tensor, bad: Tensor) -> Tensor:
    """Moves the momentum in place and gives Nesterov's look ahead, both as they were where `bad` is not zero.

    Infinite times zero is not zero: hence `where`.
    """
    gradient = torch.where(bad > 0, momentum, gradient / divisor)
    momentum.lerp_(gradient, 1 - MOMENTUM)
    return gradient.lerp(momentum, MOMENTUM)


def _apply(weight: Tensor, update: Tensor, keep: Tensor, scale: Tensor) -> None:
    """weight <- keep weight - scale update, in place."""
    weight.copy_(keep * weight - scale * update.to(weight.dtype))


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bf16, but fp32 on a CPU that would have to imitate it: that is far slower."""
    emulated = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if emulated else torch.bfloat16


def orthogonalise(x: Tensor) -> Tensor:
    """About U V^T for each matrix of x (k, n, m), n <= m: singular values between 0.7 and 1.2, in x's dtype."""
    a, b, c = COEFFICIENTS
    y = x.to(_fast_dtype(x.device))
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    # Every step multiplies y from the left by a polynomial p of its Gram matrix G = y y^T, and turns G into p G p. For
    # a wide matrix it is cheaper to follow the small square ones and to multiply y once for several steps; but in bf16
    # their errors grow with each, and five in a row turn the small singular values of a real gradient into noise.
    for steps in _ROUNDS_WIDE if y.shape[2] > 2 * y.shape[1] else _ROUNDS:
        gram = y @ y.mT
        product: Tensor | None = None
        for step in range(steps):
            p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            p.diagonal(dim1=-2, dim2=-1).add_(a)
            product = p if product is None else p @ product
            gram = p @ gram @ p if step < steps - 1 else gram
        assert product is not None
        y = product @ y
    out: Tensor = y.to(x.dtype)
    return out
