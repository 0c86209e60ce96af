"""The forward and backward passes of a step: compiled where that pays, in smaller pieces where memory is short."""

import copy
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from oriole.log import say
from oriole.train import dist
from oriole.train.batch import Batch
from oriole.train.device import choose_compile
from oriole.train.guard import from_compiler
from oriole.train.objectives import Loss
from oriole.train.parallel import Parallel
from oriole.train.pilot import Pilot

__all__ = ["Gradients", "Objective"]


class Objective(Protocol):
    """A loss as a sum over units, and the number of units. It may have `compile()`."""

    def weight(self, batch: Batch) -> Tensor: ...
    def __call__(self, model: Any, batch: Batch) -> Loss: ...


class Gradients:
    """Adds the gradients of a step's batches up in the parameters of `model`."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        parallel: Parallel,
        pilot: Pilot,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.objective, self.parallel, self.pilot = model, objective, parallel, pilot
        self.device, self.dtype = device, dtype
        self.compiled, self.why = False, ""
        """Whether torch.compile is used, and why or why not."""
        self._untried = False
        self._model_call: Any = model  # what training calls: the model, or its compiled form
        self._objective_call = objective

    def choose_compile(self, how: bool | Literal["auto"], steps: int) -> None:
        """Compile model and objective where that is wanted, or where it pays with so many steps to go."""
        self.compiled, self.why = choose_compile(self.device, how, steps)
        self._untried = self.compiled
        if self.compiled:
            self._model_call = self.parallel.compile()
            if hasattr(self.objective, "compile"):
                self._objective_call = copy.copy(self.objective)
                self._objective_call.compile()

    def of(
        self, micro: list[Batch], total: Tensor, step: int, scale: Tensor | None
    ) -> tuple[list[Batch], list[Tensor], dict[str, Tensor]]:
        """The pieces that a step went through in, their shares of the loss, and the metrics of the whole.

        `total` is the weight of all processes' batches together; `scale` the factor of the loss that fp16 needs.
        """
        while True:
            pieces = self.pilot.micro.split(micro)
            try:
                return pieces, *self._sum_up(pieces, total, scale)
            except Exception as error:
                # Others that wait for this process's gradients would wait for ever.
                if dist.world() > 1 or not self.pilot.smaller(error, step, micro):
                    raise
            # Only here, where the error no longer holds them, are the tensors of the failed attempt free.
            self.model.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _sum_up(
        self, pieces: Sequence[Batch], total: Tensor, scale: Tensor | None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(pieces):
            part = self._backward(batch, total, scale, last=i == len(pieces) - 1)
            losses.append(part.sum.detach() / total)
            for name, value in part.metrics.items():
                sums[name] = sums.get(name, torch.zeros_like(total)) + value.detach() / total
        return losses, sums

    def _backward(self, batch: Batch, total: Tensor, scale: Tensor | None, *, last: bool) -> Loss:
        """Forward and backward of one micro-batch; its gradients are added to those of the others."""
        try:
            loss = self._forward_backward(batch, total, scale, last)
        except Exception as error:
            # A compiler may be there and yet not work; it is used first when no gradient exists yet.
            if not self._untried or not from_compiler(error):
                raise
            say(f"torch.compile failed ({_first_line(error)}); going on without it", "yellow")
            self.compiled, self._model_call, self._objective_call = False, self.model, self.objective
            self.model.zero_grad()
            self.parallel.reset()
            loss = self._forward_backward(batch, total, scale, last)
        self._untried = False
        return loss

    def _forward_backward(self, batch: Batch, total: Tensor, scale: Tensor | None, last: bool) -> Loss:
        with self.parallel.micro(last):
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = self.parallel.call(lambda: self._objective_call(self._model_call, batch))
            share = loss.sum * dist.world() / total
            (share if scale is None else share * scale).backward()  # type: ignore[no-untyped-call]
        return loss


def _first_line(error: BaseException) -> str:
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return lines[0] if lines else type(error).__name__
