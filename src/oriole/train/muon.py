"""Muon: momentum whose update is made orthogonal, for the matrices between embedding and head (Jordan et al. 2024).

Matrices that are fused in memory are treated part by part, as if they were apart, and all parts of one shape together
in batched products.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from oriole.train.orthogonal import Method, fast_dtype, orthogonalise
from oriole.train.parallel import as_rows_of, local, span, whole

__all__ = ["Muon"]

MOMENTUM = 0.95
SECOND_MOMENT = 0.95
"""NorMuon only: decay of the neurons' mean squares."""

CPU_CHUNK, CHUNK = 2**20, 2**26
"""Numbers in one batch of matrices: on a CPU it should stay in the cache, elsewhere it should fill the device."""


class _Part(NamedTuple):
    """Rows of a parameter that form one matrix."""

    place: int
    start: int
    rows: int
    neurons: int
    """Where its second moments begin in the parameter's."""


class Muon:
    """Updates `parameters` (matrices) in place.

    `method` is how the update is made orthogonal. `normalise` is NorMuon (Li et al. 2025): the neurons of an update get
    like sizes over time, each divided by the root of the running mean of its squares, and the whole its old norm back.
    Neurons are the rows, but of a wide matrix the columns, for the rows of an orthogonal one have length 1 already.
    `cautious` decays a weight only where the update, too, would bring it nearer to zero (Chen et al. 2025).
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        parts: Mapping[int, Sequence[int]],
        *,
        method: Method = "polar-express",
        normalise: bool = False,
        cautious: bool = False,
    ) -> None:
        """`parts` maps a parameter's place in the sequence to the rows of its parts; absent: one part."""
        self.parameters = list(parameters)
        self.method, self.normalise, self.cautious = method, normalise, cautious
        self.momentum = [torch.zeros_like(p) for p in self.parameters]
        self.second_moment: list[Tensor] = []
        """NorMuon only: the neurons' mean squares, one vector for each parameter."""
        self._by_shape: dict[tuple[int, int], list[_Part]] = defaultdict(list)
        for place, parameter in enumerate(self.parameters):
            start = neurons = 0
            columns = parameter.shape[1]
            for rows in parts.get(place, (parameter.shape[0],)):
                self._by_shape[rows, columns].append(_Part(place, start, rows, neurons))
                start, neurons = start + rows, neurons + max(rows, columns)
            assert start == parameter.shape[0], "the parts of a fused matrix are all of it"
            if normalise:
                self.second_moment.append(torch.zeros(neurons, dtype=parameter.dtype, device=parameter.device))

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, divisor: Tensor, bad: Tensor) -> None:
        """One update by the gradients divided by `divisor`; nothing changes where `bad` (0-dim) is not zero.

        W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows / columns)) U V^T, with Nesterov momentum.
        """
        good = 1 - bad
        ahead = self._look_ahead(divisor, bad)
        for (rows, columns), parts in self._by_shape.items():
            stretch = max(1.0, rows / columns) ** 0.5
            for some in _chunks(parts, rows * columns, ahead[0].device):
                stack = torch.empty(
                    (len(some), rows, columns), dtype=fast_dtype(ahead[0].device), device=ahead[0].device
                )
                torch._foreach_copy_(list(stack), self._matrices(ahead, some))
                update = orthogonalise(stack, self.method).float()
                if self.normalise:
                    self._even(update, some, good)
                weights, updates = self._held(update, some)
                if self.cautious:
                    nearer = torch._foreach_mul(weights, updates)
                    torch._foreach_sign_(nearer)
                    torch._foreach_clamp_min_(nearer, 0)
                    torch._foreach_addcmul_(updates, weights, nearer, value=weight_decay / stretch)
                else:
                    torch._foreach_mul_(weights, 1 - lr * weight_decay * good)
                update.mul_(lr * stretch * good)
                torch._foreach_sub_(weights, updates)

    def tensors(self) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
        """The state itself: parameter, name, tensor."""
        for place, parameter in enumerate(self.parameters):
            yield parameter, "momentum", self.momentum[place]
            if self.normalise:
                yield parameter, "second_moment", self.second_moment[place]

    def _look_ahead(self, divisor: Tensor, bad: Tensor) -> list[Tensor]:
        """Moves the momentum and gives Nesterov's look ahead, in the gradients' place.

        Infinite times zero is not zero: hence `nan_to_num_`. A parameter without gradient has one of zeros.
        """
        grads = [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in self.parameters]
        momentum = [local(m) for m in self.momentum]
        for grad in grads:
            grad.nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_mul_(grads, torch.where(bad > 0, 0.0, (1 - MOMENTUM) / divisor))
        torch._foreach_mul_(momentum, torch.where(bad > 0, 1.0, MOMENTUM))
        torch._foreach_add_(momentum, grads)
        torch._foreach_add_(grads, momentum, alpha=MOMENTUM)
        return grads

    def _matrices(self, ahead: list[Tensor], parts: list[_Part]) -> list[Tensor]:
        """The parts of `ahead`, of which this process may hold some rows only: they are gathered, and every process
        makes the whole update."""
        places = {part.place for part in parts}
        whole_ones = {place: whole(as_rows_of(ahead[place], self.parameters[place])) for place in places}
        return [whole_ones[part.place][part.start : part.start + part.rows] for part in parts]

    def _held(self, update: Tensor, parts: list[_Part]) -> tuple[list[Tensor], list[Tensor]]:
        """The weights of the parts that this process holds, and the same rows of their updates (k, rows, columns)."""
        weights, updates = [], []
        for part, rows in zip(parts, update, strict=True):
            parameter = self.parameters[part.place]
            start, stop = span(parameter)
            first = max(start, part.start)
            last = max(first, min(stop, part.start + part.rows))
            weights.append(local(parameter)[first - start : last - start])
            updates.append(rows[first - part.start : last - part.start])
        return weights, updates

    def _even(self, update: Tensor, parts: list[_Part], good: Tensor) -> None:
        """Gives the neurons of the updates (k, rows, columns) like sizes, in place."""
        rows, columns = update.shape[1:]
        across = 2 if rows >= columns else 1
        squares = update.square().mean(across)
        kept = [self.second_moment[p.place][p.neurons : p.neurons + squares.shape[1]] for p in parts]
        moment = torch.stack(kept).lerp_(squares, (1 - SECOND_MOMENT) * good)
        torch._foreach_copy_(kept, list(moment))
        scale = moment.clamp(min=1e-12).rsqrt()
        before, after = squares.sum(1, keepdim=True), (squares * scale.square()).sum(1, keepdim=True)
        update.mul_((scale * (before / (after + 1e-30)).sqrt()).unsqueeze(across))


def _chunks(parts: list[_Part], size: int, device: torch.device) -> list[list[_Part]]:
    """The parts in batches that do not claim much fresh memory; `size`: the numbers in one part."""
    most = max(1, (CPU_CHUNK if device.type == "cpu" else CHUNK) // size)
    return [parts[i : i + most] for i in range(0, len(parts), most)]
