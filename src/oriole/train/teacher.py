"""A teacher's answers, asked once: of every trained position the likeliest tokens and their log-probabilities.

What a model says at a position follows from the piece of the document up to there and from nothing else, however the
pieces are packed. So an answer is found again by the hash of its piece, in every epoch and after a resume:

    keys.bin        u64 (pieces,): xxh3 of the piece's tokens and targets, ascending
    starts.bin      i64 (pieces + 1,): where the answers of each piece begin
    top.bin         u16 or u32 (positions, k): the likeliest tokens, likeliest first
    log_probs.bin   f16 (positions, k + 1): of each of them, and last that of all others together
    index.json      schema, counts
"""

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from oriole.errors import DataError, ResourceError, raise_for_os_error
from oriole.log import say, track
from oriole.model.lm import LM
from oriole.text.shards import Shards, View
from oriole.text.writer import new_folder
from oriole.train.batch import IGNORE, Batch, shifted
from oriole.train.checkpoint import write_json
from oriole.train.objectives import CHUNK

__all__ = ["LOG_PROBS", "SCHEMA", "TOP", "Answers", "Asking", "Taught", "ask", "digest"]

SCHEMA = 1
LOG_PROBS, TOP = "teacher_log_probs", "teacher_top"
"""Names in `Batch.extra`."""
WINDOW = 64
"""Batches whose pieces are sorted by length, so that little is padded."""


class Asking(NamedTuple):
    """How a teacher is asked."""

    k: int
    """Tokens that are kept of each position."""
    temperature: float
    """What its logits are divided by."""
    length: int
    """Longest piece of a document."""
    batch: int
    """Pieces of that length in one forward pass."""
    device: torch.device
    dtype: torch.dtype
    """Arithmetic of the matrix products."""


class _Piece(NamedTuple):
    key: int
    tokens: np.ndarray
    targets: np.ndarray


class Answers:
    """The answers in a folder, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        """`DataError` when the folder is damaged or of another schema."""
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            if index["schema"] != SCHEMA:
                raise ValueError(f"schema {index['schema']}, this Oriole reads {SCHEMA}")
            self.k: int = index["k"]
            n, pieces = index["positions"], index["pieces"]
            self._keys = np.fromfile(folder / "keys.bin", "<u8", pieces)
            self._starts = np.fromfile(folder / "starts.bin", "<i8", pieces + 1)
            self._top = np.memmap(folder / "top.bin", index["ids"], "r", shape=(n, self.k))
            self._log_probs = np.memmap(folder / "log_probs.bin", "<f2", "r", shape=(n, self.k + 1))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"the teacher's answers in {folder} are damaged ({error}); remove that folder") from error
        self.positions = n
        """How many there are."""

    def beside(self, batch: Batch) -> Batch:
        """The batch with the answers to its targets in `extra`, (B, T, k) and (B, T, k + 1); on the host."""
        shape = tuple(batch.tokens.shape)
        top = np.zeros((*shape, self.k), np.int64)
        log_probs = np.zeros((*shape, self.k + 1), np.float16)
        tokens, targets, doc = (t.numpy() for t in (batch.tokens, batch.targets, batch.doc))
        for row in range(shape[0]):
            edges = np.flatnonzero(np.diff(doc[row], prepend=-2, append=-2))
            for start, stop in itertools.pairwise(edges):
                columns = np.flatnonzero(targets[row, start:stop] != IGNORE)
                if doc[row, start] < 0 or not columns.size:
                    continue
                at = self._place(_key(tokens[row, start:stop], targets[row, start:stop]))
                top[row, start + columns] = self._top[at]
                log_probs[row, start + columns] = self._log_probs[at]
        extra = {**batch.extra, TOP: torch.from_numpy(top), LOG_PROBS: torch.from_numpy(log_probs)}
        return Batch(batch.tokens, batch.targets, batch.doc, batch.pos, batch.rows, extra)

    def _place(self, key: int) -> slice:
        number = int(np.searchsorted(self._keys, np.uint64(key)))
        if number == len(self._keys) or int(self._keys[number]) != key:
            raise DataError("the teacher was not asked about a piece of the data; remove the run's shards/teacher-*")
        return slice(int(self._starts[number]), int(self._starts[number + 1]))


class Taught:
    """Batches with the teacher's answers beside them."""

    def __init__(self, data: Any, answers: Answers) -> None:
        self.data, self.answers = data, answers

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return self.answers.beside(next(self.data))

    def state_dict(self) -> dict[str, Any]:
        """That of the batches: what the teacher says follows from them."""
        state: dict[str, Any] = self.data.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.data.load_state_dict(state)


# --- asking ----------------------------------------------------------------------------------------------------------


def ask(teacher: LM, parts: Mapping[str, View | Shards], folder: Path, how: Asking) -> Answers:
    """The teacher's answers to all pieces of the documents of `parts`; only asked where `folder` is not there yet.

    Says first how much room they take; `ResourceError` when the disk has less.
    """
    if folder.exists():
        return Answers(folder)
    counts: dict[int, int] = {}
    for piece in _pieces(parts, how.length):
        counts[piece.key] = int((piece.targets != IGNORE).sum())
    keys = np.array(sorted(counts), "<u8")
    starts = np.concatenate([[0], np.cumsum([counts[int(key)] for key in keys])]).astype("<i8")
    positions, vocab = int(starts[-1]), teacher.config.vocab_size
    ids = "<u2" if vocab <= 65_536 else "<u4"
    size = positions * (how.k * np.dtype(ids).itemsize + (how.k + 1) * 2) + 16 * len(keys)
    say(f"the teacher is asked once about {positions:,} tokens, of which it keeps the {how.k} likeliest: {_mb(size)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        raise ResourceError(
            f"the teacher's answers take {_mb(size)} in {folder.parent}, where {_mb(free)} are free; lower "
            "distill.top_k, or ask the teacher anew in every step with distill.top_k=0"
        )
    with new_folder(folder) as part:
        try:
            keys.tofile(part / "keys.bin")
            starts.tofile(part / "starts.bin")
            top = np.memmap(part / "top.bin", ids, "w+", shape=(positions, how.k))
            log_probs = np.memmap(part / "log_probs.bin", "<f2", "w+", shape=(positions, how.k + 1))
            _fill(teacher, _once(_pieces(parts, how.length), keys), how, starts, top, log_probs)
            top.flush()
            log_probs.flush()
        except OSError as error:
            raise_for_os_error(error, "writing the teacher's answers to", folder)
        index = {"schema": SCHEMA, "k": how.k, "positions": positions, "pieces": len(keys), "ids": ids}
        write_json(part / "index.json", index)
    return Answers(folder)


def digest(model: LM) -> str:
    """32 hex digits of the model's weights."""
    out = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        out.update(name.encode())
        out.update(tensor.detach().cpu().contiguous().numpy().data.cast("B"))
    return out.hexdigest()


def _pieces(parts: Mapping[str, View | Shards], length: int) -> Iterator[_Piece]:
    """The pieces with trained tokens, as the packer cuts them."""
    for part in parts.values():
        for number in range(len(part)):
            tokens, targets = shifted(*part.doc(number))
            for start in range(0, len(tokens), length):
                span = slice(start, start + length)
                if (targets[span] != IGNORE).any():
                    yield _Piece(_key(tokens[span], targets[span]), tokens[span], targets[span])


def _key(tokens: np.ndarray, targets: np.ndarray) -> int:
    both = np.concatenate([tokens.astype("<i8"), targets.astype("<i8")])
    return xxhash.xxh3_64_intdigest(both.tobytes())


def _once(pieces: Iterable[_Piece], keys: NDArray[np.uint64]) -> Iterator[tuple[int, _Piece]]:
    """Each piece the first time that it comes, with its place among the keys."""
    seen = np.zeros(len(keys), bool)
    for piece in pieces:
        place = int(np.searchsorted(keys, np.uint64(piece.key)))
        if not seen[place]:
            seen[place] = True
            yield place, piece


@torch.inference_mode()
def _fill(
    teacher: LM,
    pieces: Iterator[tuple[int, _Piece]],
    how: Asking,
    starts: NDArray[np.int64],
    top: NDArray[Any],
    log_probs: NDArray[Any],
) -> None:
    teacher = teacher.to(how.device).eval()
    with track("asking the teacher", total=len(top), unit="tok") as bar:
        for group in _batches(pieces, how):
            longest = max(len(piece.tokens) for _, piece in group)
            tokens, targets, doc = (np.full((len(group), longest), fill) for fill in (0, IGNORE, -1))
            for row, (_, piece) in enumerate(group):
                n = len(piece.tokens)
                tokens[row, :n], targets[row, :n], doc[row, :n] = piece.tokens, piece.targets, 0
            at = torch.from_numpy(np.flatnonzero(targets != IGNORE)).to(how.device)
            with torch.autocast(how.device.type, how.dtype, enabled=how.dtype != torch.float32):
                as_tensors = (torch.from_numpy(a).to(how.device) for a in (tokens, doc))
                h = teacher(*as_tensors).h.flatten(0, 1)[at]
            best, said = (t.cpu().numpy() for t in _likeliest(teacher, h, how))
            end = 0
            for place, _ in group:
                n = int(starts[place + 1] - starts[place])
                span = slice(starts[place], starts[place] + n)
                top[span], log_probs[span] = best[end : end + n], said[end : end + n]
                end += n
            bar.update(end)


def _likeliest(teacher: LM, h: Tensor, how: Asking) -> tuple[Tensor, Tensor]:
    """Tokens (n, k) and log-probabilities (n, k + 1) at the hidden states h (n, D), in fp32."""
    tokens, log_probs = [], []
    for start in range(0, len(h), CHUNK):
        logits = teacher.head("logits", h[start : start + CHUNK].float()) / how.temperature
        all_of_them = logits.log_softmax(-1)
        of_best, best = all_of_them.topk(how.k, -1)
        rest = all_of_them.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True)
        tokens.append(best)
        log_probs.append(torch.cat([of_best, rest], -1).clamp(min=torch.finfo(torch.float16).min).half())
    return torch.cat(tokens), torch.cat(log_probs)


def _batches(pieces: Iterator[tuple[int, _Piece]], how: Asking) -> Iterator[list[tuple[int, _Piece]]]:
    """Pieces of like length together, as many as fill `batch` rows of `length` tokens."""
    room, waiting = how.batch * how.length, 0
    window: list[tuple[int, _Piece]] = []
    for piece in pieces:
        window.append(piece)
        waiting += len(piece[1].tokens)
        if waiting >= WINDOW * room:
            yield from _cut(window, room)
            window, waiting = [], 0
    yield from _cut(window, room)


def _cut(window: list[tuple[int, _Piece]], room: int) -> Iterator[list[tuple[int, _Piece]]]:
    group: list[tuple[int, _Piece]] = []
    for piece in sorted(window, key=lambda one: len(one[1].tokens)):
        if group and (len(group) + 1) * len(piece[1].tokens) > room:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _mb(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e9:.3g} GB"
