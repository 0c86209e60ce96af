"""What this machine has: memory, its limits, cores, and the peak of its matrix units, by which MFU is measured."""

import functools
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from oriole.train.accelerators import find_accelerator

__all__ = ["HostMemory", "Mfu", "Peak", "device_memory_limit", "host_memory", "peak_flops", "usable_cores"]

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
            f"tokens/s x {self.flops_per_token:.3g} FLOP a token (6 N + 6 L H hd T of all that trains) / "
            f"{self.peak.flops / 1e12:.3g} TFLOP/s ({self.peak.source}){many}"
        )

    def record(self) -> dict[str, Any]:
        """What goes into the start record of metrics.jsonl."""
        return {"flops_per_token": self.flops_per_token, "peak_flops": self.peak.flops, "mfu_is": str(self)}


# --- memory and cores ------------------------------------------------------------------------------------------------

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of a container (control groups, version 2; version 1 has subfolders)."""


class HostMemory(NamedTuple):
    """Bytes of main memory; None where the system does not say."""

    total: int | None
    available: int | None
    """What a new program can take without swapping."""
    limit: int | None
    """A container's limit, where it is below the total."""

    @property
    def usable(self) -> int | None:
        """What one program can have in all."""
        known = [n for n in (self.total, self.limit) if n is not None]
        return min(known, default=None)


def host_memory() -> HostMemory:
    """Main memory of this machine as Linux tells it; elsewhere the total, where POSIX has it."""
    total = available = None
    if MEMINFO.exists():
        found = dict(re.findall(r"(\w+):\s+(\d+) kB", MEMINFO.read_text()))
        total, available = (int(found[k]) * 1024 if k in found else None for k in ("MemTotal", "MemAvailable"))
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _number(CGROUP / "memory.max") or _number(CGROUP / "memory" / "memory.limit_in_bytes")
    return HostMemory(total, available, limit if limit is not None and (total is None or limit < total) else None)


MEMINFO = Path("/proc/meminfo")


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().split()
    except OSError:
        return None
    return int(text[0]) if text and text[0].isdigit() else None


def usable_cores() -> tuple[int, float | None]:
    """Cores that this process may use, and how many a container's quota is worth (None: no quota)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota: float | None = None
    try:
        words = (CGROUP / "cpu.max").read_text().split()
        quota = int(words[0]) / int(words[1]) if words[0].isdigit() else None
    except (OSError, IndexError, ValueError):
        first, second = (_number(CGROUP / "cpu" / f"cpu.cfs_{n}_us") for n in ("quota", "period"))
        quota = first / second if first and second else None
    return allowed, quota


def device_memory_limit(device: torch.device) -> int:
    """Bytes that training may take on a device: a GPU's memory, or the main memory within a container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_memory().usable or 8 << 30
