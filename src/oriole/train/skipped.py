"""Batches whose update was skipped because loss or gradients were not finite, written down for whoever looks for why.

folder/step-7.safetensors   the micro-batches: tokens, targets, doc, pos (several: tokens.0, tokens.1, …)
folder/step-7.json          {"schema", "step", "tokens", "loss", "losses", "grad_norm"}
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from oriole.errors import raise_for_os_error
from oriole.log import say
from oriole.train import dist
from oriole.train.batch import Batch
from oriole.train.checkpoint import write_json

__all__ = ["PATIENCE", "Skipped"]

PATIENCE = 20
"""Skipped updates in a row after which a run gives up: by then fp16's loss scale would have found its place."""

MOST = 5
"""So many batches are written down for one folder: the first ones tell the story."""

HELD_BYTES = 1 << 27
"""Memory, on the device, for batches whose outcome is not known yet; beyond it the oldest are let go unseen."""


@dataclass(frozen=True)
class _Step:
    step: int
    tokens: int
    micro: Sequence[Batch]
    losses: Sequence[Tensor]
    norm: Tensor
    skipped: Tensor


class Skipped:
    """Holds on to the batches of the last steps until the loop looks, when the device has to be waited for anyway.

    Good steps cost a reference: neither a copy nor a wait.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last: Path | None = None
        """The batch that was written down last."""
        self._steps: deque[_Step] = deque()
        self._bytes = 0

    def note(
        self, step: int, tokens: int, micro: Sequence[Batch], losses: Sequence[Tensor], norm: Tensor, skipped: Tensor
    ) -> None:
        """One step: its number, the positions trained on before it, its micro-batches, each one's share of the loss,
        the gradient norm, and whether (1.0) its update was skipped; all tensors stay on the device."""
        self._steps.append(_Step(step, tokens, micro, losses, norm, skipped))
        self._bytes += _size(micro)
        while self._bytes > HELD_BYTES and len(self._steps) > 1:
            self._bytes -= _size(self._steps.popleft().micro)

    def look(self, in_a_row: int, *, loss_scale: bool) -> None:
        """Write down the skipped ones among the steps since the last look.

        With a `loss_scale` (fp16) an overflow of the gradients is how the scale finds its place and no fault of the
        batch, unless `in_a_row` says that it never does.
        """
        for one in self._steps:
            skipped, norm, *losses = torch.stack([t.float() for t in (one.skipped, one.norm, *one.losses)]).tolist()
            usual = loss_scale and math.isfinite(sum(losses)) and in_a_row < PATIENCE
            if skipped and not usual and len(list(self.folder.glob("*.json"))) < MOST:
                self._write(one, norm, losses)
        self._steps.clear()
        self._bytes = 0

    def _write(self, one: _Step, norm: float, losses: Sequence[float]) -> None:
        name = f"step-{one.step}" + (f"-rank-{dist.rank()}" if dist.world() > 1 else "")
        path = self.folder / f"{name}.safetensors"
        tensors = {
            name + (f".{i}" if len(one.micro) > 1 else ""): tensor.cpu().contiguous()
            for i, batch in enumerate(one.micro)
            for name, tensor in batch.tensors().items()
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(save(tensors))
        except OSError as error:
            raise_for_os_error(error, "writing", path)
        loss = sum(losses)
        found = {"loss": _text(loss), "losses": [_text(x) for x in losses], "grad_norm": _text(norm)}
        write_json(path.with_suffix(".json"), {"schema": 1, "step": one.step, "tokens": one.tokens, **found})
        self.last = path
        say(f"step {one.step} was skipped: loss {loss:.3g}, gradient norm {norm:.3g}; its batch is in {path}", "yellow")


def _size(micro: Sequence[Batch]) -> int:
    return sum(tensor.nbytes for batch in micro for tensor in (*batch.tensors().values(), batch.rows))


def _text(x: float) -> float | str:
    """Non-finite numbers are strings, as in metrics.jsonl."""
    return x if math.isfinite(x) else str(x)
