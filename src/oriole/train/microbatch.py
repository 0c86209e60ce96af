"""How many rows go through the model at once: chosen by the free memory, and halved when that was too many.

A step's batch is what the recipe says, whatever fits: a loss is a sum over rows, so that the gradients of the pieces
add up to the same gradient.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oriole.model.config import KEPT
from oriole.model.costs import OptimizerName, training_memory
from oriole.model.lm import LM
from oriole.model.seq2seq import Seq2Seq
from oriole.train.batch import Batch
from oriole.train.machine import host_memory
from oriole.train.smart import Decision

__all__ = ["Memory", "MicroBatches", "free_memory", "memory_of", "rows_that_fit"]

Memory = Callable[[int, int], dict[str, int]]
"""Bytes of a step by part, "weights" among them, for rows and length; those of `model.costs.training_memory`."""

MARGIN = 0.8
"""The share of the free memory that is planned with: the rest is for what an estimate forgets, and fragmentation."""


class MicroBatches:
    """The rows of one forward pass; None: as the data come."""

    def __init__(self) -> None:
        self.rows: int | None = None

    def split(self, micro: Sequence[Batch]) -> list[Batch]:
        """The batches of a step as pieces of `rows` rows, in the same order."""
        if self.rows is None or all(len(batch.tokens) == self.rows for batch in micro):
            return list(micro)
        whole = Batch.joined(micro)
        return [whole.cut(start, start + self.rows) for start in range(0, len(whole.tokens), self.rows)]

    def choose(self, micro: Sequence[Batch], memory: Memory, device: torch.device) -> Decision | None:
        """Take as many rows as the free memory holds; None where it is not known.

        A GPU gains by larger pieces, so that micro-batches of the recipe are joined there; a CPU does not.
        """
        free = free_memory(device)
        if free is None:
            return None
        total, length = sum(len(b.tokens) for b in micro), micro[0].tokens.shape[1]
        most = total if device.type == "cuda" else len(micro[0].tokens)
        self.rows = rows_that_fit(memory, total, most, length, free)
        needed = _needed(memory, self.rows, length)
        why = f"{_gb(free)} are free, and {self.rows} rows of {length} tokens take about {_gb(needed)}"
        if needed > MARGIN * free:
            why += ", which may not fit (a smaller model or train.length would)"
        numbers = {"rows": self.rows, "free_bytes": free, "needed_bytes": needed}
        return Decision("micro_batch", f"{why}: {_pieces(total, self.rows)}", numbers)

    def back_off(self, micro: Sequence[Batch]) -> Decision | None:
        """Halve the rows, or what comes next below that divides the batch; None when it was a single one."""
        total = sum(len(b.tokens) for b in micro)
        rows = self.rows or max(len(b.tokens) for b in micro)
        if rows == 1:
            return None
        self.rows = _divisor(total, rows // 2)
        why = f"{rows} rows at a time are too many for the memory: {_pieces(total, self.rows)}"
        return Decision("back_off", why, {"rows": self.rows, "rows_before": rows})

    def state_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the same pieces: sums of other pieces would be rounded differently."""
        self.rows = state["rows"]


def rows_that_fit(memory: Memory, total: int, most: int, length: int, free: int) -> int:
    """The largest divisor of `total` up to `most` whose step fits in MARGIN of `free` bytes; 1 where none does."""
    for rows in range(min(most, total), 1, -1):
        if total % rows == 0 and _needed(memory, rows, length) <= MARGIN * free:
            return rows
    return 1


def memory_of(
    model: nn.Module,
    optimizer: OptimizerName,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
) -> Memory | None:
    """How much memory a training step of the model takes, None where nobody has written that down."""
    if not isinstance(model, LM | Seq2Seq):
        return None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = trained / max(1, sum(p.numel() for p in model.parameters()))  # frozen weights have no gradients

    def memory(rows: int, length: int) -> dict[str, int]:
        parts = training_memory(
            model.config,
            rows,
            length,
            dtype.itemsize,
            model.deep.table if isinstance(model, LM) and model.deep is not None else None,
            optimizer=optimizer,
            recompute=model.recompute,
            whole_scores=device.type == "cpu" and length <= KEPT,
            compiled=compiled,
        )
        return parts | {name: int(share * parts[name]) for name in ("gradients", "optimizer")}

    return memory


def _needed(memory: Memory, rows: int, length: int) -> int:
    """Bytes that a step still takes: the weights are there already."""
    parts = memory(rows, length)
    return sum(parts.values()) - parts["weights"]


def _gb(n: int) -> str:
    return f"{n / 1e9:.3g} GB"


def _divisor(total: int, most: int) -> int:
    return next(rows for rows in range(max(1, most), 0, -1) if total % rows == 0)


def _pieces(total: int, rows: int) -> str:
    return f"a step's {total} rows go through in {total // rows} x {rows}"


# --- free memory -----------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process can still take on the device, None where nobody says.

    On a GPU what the driver has left and what torch's allocator holds without using it; on a CPU the least of what the
    kernel calls available, what the control group (a container's limit) leaves, and the limit on addresses (ulimit -v).
    """
    match device.type:
        case "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        case "cpu":
            known = [n for n in (host_memory().available, _cgroup_left(), _addresses_left()) if n is not None]
            return max(0, min(known)) if known else None
        case _:
            return None


def _cgroup_left(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> int | None:
    """What is left to this process's control group and to those above it; file caches count as free.

    None without a limit (version 2 says "max" then, which is no number; version 1 a number beyond any memory).
    """
    left = []
    for folder, limit, used in _cgroup_folders(root, groups):
        with contextlib.suppress(OSError, ValueError):
            most = int((folder / limit).read_text(encoding="ascii"))
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            caches = dict(line.split(maxsplit=1) for line in lines)
            reclaimable = int(caches.get("total_inactive_file", caches.get("inactive_file", 0)))
            left.append(most - int((folder / used).read_text(encoding="ascii")) + reclaimable)
    return min(left, default=None)


def _cgroup_folders(root: Path, groups: Path) -> Iterator[tuple[Path, str, str]]:
    """Folder and names of the files with limit and use, from the process's own group up to the root."""
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            top, limit, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top):
                yield folder, limit, used


def _addresses_left() -> int | None:
    """What RLIMIT_AS leaves of the address space."""
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        import resource  # not on Windows

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            return soft - pages * os.sysconf("SC_PAGE_SIZE")
    return None
