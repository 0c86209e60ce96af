"""The peak of this machine's matrix units, from the data sheet of its GPU or measured: what MFU is measured by."""

import functools
import time
from typing import Any, NamedTuple

import torch

from oriole.train.accelerators import find_accelerator

__all__ = ["Mfu", "Peak", "peak_flops"]

_BUDGET_S = 0.3
"""About how long one measurement of a peak may take."""


class Peak(NamedTuple):
    """FLOP/s that matrix products can reach, and how it is known."""

    flops: float
    source: str


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """Peak of one device for products in `dtype`: its data sheet, or the best matrix product measured now (once).

    A GPU that the table does not know and a CPU are measured, in under a second; another program that runs beside it
    makes the figure lower, and MFU higher. No random number is drawn.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = find_accelerator(name)
        if known is not None:
            flops = known.fp32 if dtype == torch.float32 else known.tflops
            return Peak(flops * 1e12, f"data sheet of {known.name}, dense")
    size, flops = _measure(device, dtype)
    return Peak(flops, f"best {size}³ product here")


def _measure(device: torch.device, dtype: torch.dtype) -> tuple[int, float]:
    """Size and FLOP/s of the best product; sizes double while three products of the next fit the budget."""
    size, last = 512, 4096 if device.type == "cpu" else 16384
    while True:
        best = _product_flops(size, device, dtype)
        if size == last or 3 * 2 * (2 * size) ** 3 / best > _BUDGET_S:
            return size, best
        size *= 2


def _product_flops(size: int, device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        product = a @ a
        if device.type != "cpu":
            product[0, 0].item()  # waits for the device, whichever it is
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


class Mfu(NamedTuple):
    """Model FLOP utilisation: the share of the devices' peak that the model's own FLOPs use (Chowdhery et al. 2022)."""

    flops_per_token: float
    peak: Peak
    devices: int = 1

    def of(self, tokens_per_second: float) -> float:
        """The utilisation, 0 … 1, at that rate of all devices together."""
        return tokens_per_second * self.flops_per_token / (self.peak.flops * self.devices)

    def __str__(self) -> str:
        many = f" x {self.devices} devices" if self.devices > 1 else ""
        return (
            f"tokens/s x {self.flops_per_token:.3g} FLOP a token (6 N + 6 L H hd T) / {self.peak.flops / 1e12:.3g} "
            f"TFLOP/s ({self.peak.source}){many}"
        )

    def record(self) -> dict[str, Any]:
        """What goes into the start record of metrics.jsonl."""
        return {"flops_per_token": self.flops_per_token, "peak_flops": self.peak.flops, "mfu_is": str(self)}
