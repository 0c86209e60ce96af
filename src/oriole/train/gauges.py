"""What the loop reads off while it runs: how long it took, and means over a window of steps."""

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from oriole.log import say
from oriole.train.optim import Optimizer

__all__ = ["Clock", "DataWait", "Window"]


class Clock:
    """Seconds that can be paused and carried over from an earlier process."""

    def __init__(self) -> None:
        self._before, self._since = 0.0, math.nan
        self._running = False

    def start(self) -> None:
        self._since, self._running = time.monotonic(), True

    def add(self, seconds: float) -> None:
        self._before += seconds

    @property
    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._since if self._running else 0.0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        was_running, self._before, self._running = self._running, self.seconds, False
        try:
            yield
        finally:
            if was_running:
                self.start()


class Window:
    """Means over the steps between two records, gathered on the device. Skipped steps stay out of them."""

    def __init__(self, optimizer: Optimizer, tokens: int, seconds: float) -> None:
        self.tokens, self.seconds, self.wait = tokens, seconds, 0.0
        self._optimizer = optimizer
        self._sums: dict[str, Tensor] = {}
        self._good = torch.zeros((), device=optimizer.skipped.device)

    def add(self, values: dict[str, Tensor], skipped: Tensor, wait: float) -> None:
        """Values of one step, 0-dim, and whether (1.0) its update was skipped."""
        self.wait += wait
        self._good += 1 - skipped
        for name, value in values.items():
            kept = torch.where(skipped > 0, 0.0, value)
            self._sums[name] = self._sums[name] + kept if name in self._sums else kept

    def read(self) -> tuple[dict[str, float], int, int]:
        """Means by name (nan without a good step), updates skipped so far, and skipped in a row up to now."""
        optimizer = self._optimizer
        counts = (self._good, optimizer.skipped, optimizer.skipped_in_a_row)
        good, skipped, in_a_row, *sums = torch.stack([t.float() for t in (*counts, *self._sums.values())]).tolist()
        means = {name: total / good if good else math.nan for name, total in zip(self._sums, sums, strict=True)}
        return means, int(skipped), int(in_a_row)


class DataWait:
    """Says once when the data, and not the device, sets the pace."""

    LIMIT, PATIENCE = 0.1, 3
    """Share of the time that may go by waiting for batches, and records in a row above it before a word is said (the
    first record of a run carries the filling of the buffers)."""

    def __init__(self) -> None:
        self._in_a_row, self._said = 0, False

    def note(self, step: int, share: float) -> None:
        """Take note of the share of waiting in the record written at `step`."""
        self._in_a_row = self._in_a_row + 1 if share > self.LIMIT else 0
        if self._in_a_row >= self.PATIENCE and not self._said:
            self._said = True
            say(
                f"the device waits for data: {share:.0%} of the time up to step {step} went by without work for it; "
                "put the data on a local disk, pack it beforehand (oriole data pack), or leave the loader a core",
                "yellow",
            )
