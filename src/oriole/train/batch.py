"""Documents -> fixed-shape batches: several documents share a row, and none of them sees another."""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from oriole.errors import DataError

__all__ = ["IGNORE", "Batch", "BestFit", "Packer", "Rows", "shifted"]

T = TypeVar("T")

IGNORE = -100
"""Target of a position that is not trained."""


_UNKNOWN = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Batch:
    """One micro-batch; every tensor but `rows` is (B, T)."""

    tokens: Tensor
    """Token ids, int64."""
    targets: Tensor
    """The next token of the same document where it is trained, else IGNORE; int64."""
    doc: Tensor
    """Number of the document within its row, -1 for padding; int32."""
    pos: Tensor
    """Position within the document, for RoPE; int64."""
    rows: Tensor = _UNKNOWN
    """Where the flattened batch has a target, (N,) int64; found when the batch is made, on the host, since asking a
    GPU for the number would wait for it."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What else an objective wants to know of a position or its target, by name: advantages, reference log-probs, …;
    each (B, T) or (B, T, …), so that a batch may be cut by rows whatever it is for."""

    def __post_init__(self) -> None:
        if self.rows is _UNKNOWN:
            object.__setattr__(self, "rows", (self.targets != IGNORE).flatten().nonzero().squeeze(-1))

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`; copies to a GPU go on while the host does something else."""
        pin = torch.device(device).type == "cuda" and not self.tokens.is_cuda  # only pinned memory is not waited for

        def moved(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=True)

        tensors = (self.tokens, self.targets, self.doc, self.pos, self.rows)
        tokens, targets, doc, pos, rows = map(moved, tensors)
        return Batch(tokens, targets, doc, pos, rows, {name: moved(t) for name, t in self.extra.items()})

    def tensors(self) -> dict[str, Tensor]:
        """All that is (B, T), by name."""
        return {"tokens": self.tokens, "targets": self.targets, "doc": self.doc, "pos": self.pos, **self.extra}

    def cut(self, start: int, stop: int) -> "Batch":
        """Rows start … stop - 1."""
        at = slice(start, stop)
        extra = {name: tensor[at] for name, tensor in self.extra.items()}
        return Batch(self.tokens[at], self.targets[at], self.doc[at], self.pos[at], extra=extra)

    @staticmethod
    def joined(batches: Sequence["Batch"]) -> "Batch":
        """The rows of all of them."""
        names = ("tokens", "targets", "doc", "pos")
        tokens, targets, doc, pos = (torch.cat([getattr(b, name) for b in batches]) for name in names)
        extra = {name: torch.cat([b.extra[name] for b in batches]) for name in batches[0].extra}
        return Batch(tokens, targets, doc, pos, extra=extra)


class Stream(Protocol):
    """An infinite iterator of (ids, mask), each (n,), that can be resumed; `text.mixture.Mixture` is one."""

    def __next__(self) -> tuple[np.ndarray, np.ndarray]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


BARREN = 100_000
"""Documents of one token in a row after which it is clear that no row can ever be filled."""

Waiting = tuple[int, int, T]
"""Length, order of arrival, and what waits."""


class BestFit(Generic[T]):
    """Things of a length that wait for their place in a row.

    The oldest opens a row, so that none waits for ever; then the longest that fits follows, until nothing does.
    """

    def __init__(self) -> None:
        self.tokens = self.arrived = 0
        """Lengths of all that wait, together; and how many have come so far."""
        self._waiting: list[Waiting[T]] = []  # sorted by length, then by arrival
        self._queue: deque[tuple[int, int]] = deque()  # length and arrival, oldest first; some have left already

    def add(self, length: int, item: T) -> None:
        """Let it wait."""
        insort(self._waiting, (length, self.arrived, item), key=lambda w: w[:2])
        self._queue.append((length, self.arrived))
        self.tokens += length
        self.arrived += 1

    def row(self, space: int) -> Iterator[T]:
        """What goes into one row of `space` tokens, in this order."""
        index = self._oldest()
        while index >= 0:
            length, _, item = self._waiting.pop(index)
            self.tokens -= length
            space -= length
            yield item
            # The longest not longer than the space left, the youngest of that length; -1: none fits.
            index = bisect_right(self._waiting, space, key=lambda w: w[0]) - 1

    def _oldest(self) -> int:
        """Where that stands which has waited longest."""
        while True:
            wanted = self._queue.popleft()
            index = bisect_left(self._waiting, wanted, key=lambda w: w[:2])
            if index < len(self._waiting) and self._waiting[index][:2] == wanted:
                return index

    def waiting(self) -> list[Waiting[T]]:
        """All that wait, by length."""
        return list(self._waiting)

    def restore(self, arrived: int, waiting: list[Waiting[T]]) -> None:
        """Go on from what `arrived` and `waiting()` were."""
        self.arrived, self._waiting = arrived, waiting
        self._queue = deque(sorted((w[:2] for w in waiting), key=lambda order: order[1]))
        self.tokens = sum(w[0] for w in waiting)


class Packer:
    """Packs a stream of documents into batches (B, T), best fit first.

    A document of n ids gives n - 1 pairs of a token and its successor, the target. One of more than T pairs is cut into
    pieces that start anew, with no pair lost. About `2 B T` tokens wait in the buffer: enough to fill rows of short
    chats beyond 97 %, and little to save.
    """

    def __init__(self, stream: Stream, batch_size: int, length: int) -> None:
        self.stream, self.batch_size, self.length = stream, batch_size, length
        self._room: BestFit[tuple[np.ndarray, np.ndarray]] = BestFit()  # tokens (n,) and targets (n,) of pieces

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        rows = Rows(self.batch_size, self.length)
        for row in range(self.batch_size):
            self._refill()
            for ids, targets in self._room.row(self.length):
                rows.add(row, ids, targets)
        return rows.batch()

    def _refill(self) -> None:
        barren = 0
        while self._room.tokens < 2 * self.batch_size * self.length:
            ids, mask = next(self.stream)
            ids, following = shifted(ids, mask)
            for start in range(0, len(ids), self.length):
                span = slice(start, start + self.length)
                self._room.add(len(ids[span]), (ids[span], following[span]))
            barren = 0 if len(ids) else barren + 1
            if barren > BARREN:
                raise DataError(f"{barren:,} documents in a row have no second token; give documents with text")

    def state_dict(self) -> dict[str, Any]:
        """The stream's state and the waiting pieces, for JSON; bounded by the buffer, whatever the corpus."""
        return {
            "stream": self.stream.state_dict(),
            "arrived": self._room.arrived,
            "waiting": [[order, ids.tolist(), targets.tolist()] for _, order, (ids, targets) in self._room.waiting()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.stream.load_state_dict(state["stream"])
        waiting = [
            (len(ids), order, (np.array(ids, np.int64), np.array(targets, np.int64)))
            for order, ids, targets in state["waiting"]
        ]
        self._room.restore(state["arrived"], waiting)


def shifted(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n - 1,) and targets (n - 1,) of a document ids (n,) with its loss mask (n,)."""
    return ids[:-1], np.where(mask[1:], ids[1:].astype(np.int64), IGNORE)


class Rows:
    """A batch (B, T) that is filled document by document."""

    def __init__(self, batch_size: int, length: int) -> None:
        shape = (batch_size, length)
        self._tokens = np.zeros(shape, np.int64)
        self._targets = np.full(shape, IGNORE, np.int64)
        self._doc = np.full(shape, -1, np.int32)
        self._pos = np.zeros(shape, np.int64)
        self._ends, self._docs = [0] * batch_size, [0] * batch_size

    def add(self, row: int, tokens: np.ndarray, targets: np.ndarray) -> slice:
        """Put a document, tokens (n,) and targets (n,), behind what the row holds; the columns that it takes."""
        span = slice(self._ends[row], self._ends[row] + len(tokens))
        self._tokens[row, span], self._targets[row, span] = tokens, targets
        self._doc[row, span], self._pos[row, span] = self._docs[row], np.arange(len(tokens))
        self._ends[row], self._docs[row] = span.stop, self._docs[row] + 1
        return span

    def batch(self, extra: Mapping[str, np.ndarray] | None = None) -> Batch:
        """The batch; `extra` are arrays (B, T)."""
        known = {name: torch.from_numpy(array) for name, array in (extra or {}).items()}
        as_tensor = torch.from_numpy
        tokens, targets, doc, pos = map(as_tensor, (self._tokens, self._targets, self._doc, self._pos))
        return Batch(tokens, targets, doc, pos, extra=known)
