"""The gradient norm at which to clip: fixed, or learnt from the norms of the last steps."""

import torch
from torch import Tensor

__all__ = ["NormWindow"]

WINDOW = 128
"""Norms that are remembered."""
ENOUGH = 16
"""Norms from which a quantile is taken; with fewer the threshold is `FIRST`."""
FIRST = 1.0
QUANTILE = 0.9
"""Of the remembered norms. AutoClip takes the tenth percentile, which clips nine steps of ten: under AdamW and Muon,
which do not mind the gradients' common scale, only what is out of line needs clipping."""


class NormWindow:
    """Clips what is large for its time: at a quantile of the last finite norms, all on the device.

    Seetharaman, Wichern, Pardo & Le Roux 2020, "AutoClip" (the quantile); Kumar, Owen, Chowdhury & Güra 2025, "ZClip"
    (the window instead of the whole history, and judging a norm by those before it). A norm enters the window as it was
    before clipping, so that a lasting change of scale is followed after a tenth of the window.
    """

    def __init__(self, device: torch.device) -> None:
        self.norms = torch.full((WINDOW,), torch.inf, device=device)
        """The last finite norms, oldest first; infinite where there is none yet."""

    def threshold(self) -> Tensor:
        """The norm (0-dim) above which gradients are to be scaled down: the smallest of the remembered norms that at
        least `QUANTILE` of them do not exceed."""
        known = self.norms.isfinite().sum()
        rank = ((known * QUANTILE).ceil().long() - 1).clamp(min=0)
        quantile = self.norms.sort().values.gather(0, rank[None])[0]
        return torch.where(known < ENOUGH, FIRST, quantile)

    def add(self, norm: Tensor, bad: Tensor) -> None:
        """Remember the norm (0-dim) of a step, unless the step is `bad` (0-dim, not zero)."""
        self.norms = torch.where(bad > 0, self.norms, torch.cat([self.norms[1:], norm[None]]))
