"""Sources and targets for an encoder-decoder, and batches in which several pairs share a row.

They are made of the usual token shards. Of a conversation every answer is a target, and all before it the source; the
loss mask says where answers are. Running text is corrupted (Raffel et al. 2020, 3.1.4): spans are taken out of the
source, each replaced by a sentinel, and the target lists the sentinels with what stood there.

Sentinels are the reserved ids 9 to 15, one after the other and then from the start again. No text can produce them,
which cannot be said of the last ids of a vocabulary, and the tokenizer stays that of every other stage. There are
seven, where T5 has a hundred: as many spans as about 140 tokens have at T5's rate. Beyond that a sentinel comes back,
and the order, which is the same on both sides, says which of the two is meant.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Self, final

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from oriole.errors import DataError
from oriole.model.seq2seq import START
from oriole.text.mixture import Documents, Mixture
from oriole.text.shards import Ids, Mask
from oriole.text.tokenizer import END_OF_TEXT
from oriole.train.batch import IGNORE, Batch
from oriole.train.tables import Seq2SeqTable

__all__ = ["SENTINELS", "Pair", "PairStream", "Pieces", "Seq2SeqPacker", "answers", "corrupted", "documents"]

SENTINELS = tuple(range(9, 16))
"""What stands for a span that was taken out."""

Pair = tuple[list[int], list[int]]
"""Ids of a source (s,) and of its target (t,), which ends with an end mark."""

BARREN = 10_000
"""Documents in a row without a pair that fits, after which it is clear that none will come."""
WAITING = 1024
"""Most pairs that wait for a place in a row."""


# --- documents to pairs ----------------------------------------------------------------------------------------------


def answers(ids: Sequence[int], mask: Sequence[int]) -> Iterator[Pair]:
    """Each run of trained tokens of a conversation, with all that stands before it."""
    edges = np.flatnonzero(np.diff(np.asarray(mask, np.int8), prepend=0, append=0))
    for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield [int(i) for i in ids[:start]], [int(i) for i in ids[start:stop]]


def corrupted(ids: Sequence[int], key: int, table: Seq2SeqTable) -> Pair | None:
    """A text of n ids with spans taken out, and these; None for one of less than two tokens. `key` decides where.

    round(noise n) tokens in round(noise n / span) spans, each at a random place, with at least a token between two; the
    text begins with a token that stays. Of a share `prefix` of the texts all behind a random place is one span.
    """
    text = [int(i) for i in ids]
    if text and text[-1] == END_OF_TEXT:
        text.pop()
    n = len(text)
    if n < 2:
        return None
    draw = np.random.PCG64(key)
    if draw.random_raw() < table.prefix * 2.0**64:
        start = 1 + int(draw.random_raw()) % (n - 1)
        kept, taken = [start], [n - start]
    else:
        noise = min(max(1, round(table.noise * n)), n - 1)
        spans = min(max(1, round(noise / table.span)), noise, n - noise)
        kept, taken = _split(n - noise, spans, draw), _split(noise, spans, draw)
    source: list[int] = []
    target: list[int] = []
    at = 0
    for number, (stays, goes) in enumerate(zip(kept, taken, strict=True)):
        sentinel = SENTINELS[number % len(SENTINELS)]
        source += [*text[at : at + stays], sentinel]
        target += [sentinel, *text[at + stays : at + stays + goes]]
        at += stays + goes
    return source, [*target, END_OF_TEXT]


def _split(n: int, parts: int, draw: np.random.PCG64) -> list[int]:
    """`n` as a sum of so many numbers above 0, each such sum as likely."""
    # Sorting a generator's raw output, because NumPy promises that stream for all versions.
    cuts = np.sort(np.argsort(draw.random_raw(n - 1), kind="stable")[: parts - 1]) + 1 if n > 1 else np.array([], int)
    edges = [0, *cuts.tolist(), n]
    return [b - a for a, b in itertools.pairwise(edges)]


# --- a mixture of them -----------------------------------------------------------------------------------------------


@final
class Pieces:
    """Running text as documents of at most `length` tokens, none of them in two."""

    def __init__(self, text: Documents, length: int) -> None:
        self._text, self.length = text, length
        pieces = np.maximum(1, -(-text.lengths // length))
        self._first: NDArray[np.int64] = np.concatenate([[0], np.cumsum(pieces)])

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def num_tokens(self) -> int:
        """Of the text."""
        return self._text.num_tokens

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(pieces,): tokens of each."""
        place = np.arange(len(self)) - np.repeat(self._first[:-1], np.diff(self._first))
        left: NDArray[np.int64] = np.repeat(self._text.lengths, np.diff(self._first)) - place * self.length
        return left.clip(max=self.length)

    @property
    def fingerprint(self) -> str:
        """Changes with the text and the length."""
        return f"{self._text.fingerprint}/{self.length}"

    def doc(self, i: int, /) -> tuple[Ids, Mask]:
        """Ids (n,) and mask (n,) of a piece."""
        doc = int(np.searchsorted(self._first, i, side="right")) - 1
        ids, mask = self._text.doc(doc)
        start = (i - int(self._first[doc])) * self.length
        return ids[start : start + self.length], mask[start : start + self.length]


def documents(parts: Mapping[str, Documents], piece: int) -> dict[str, Documents]:
    """The parts of a mixture, running text in pieces."""
    return {name: Pieces(part, piece) if _is_text(part) else part for name, part in parts.items()}


def _is_text(part: Documents) -> bool:
    """A conversation begins with what is not trained on, its header or the question; text is trained from the start."""
    return len(part) > 0 and bool(part.doc(0)[1][0])


@final
class PairStream:
    """An endless iterator of pairs that fit, a document's together, from a mixture of conversations and text."""

    def __init__(self, mixture: Mixture, table: Seq2SeqTable, seed: int, source: int, target: int) -> None:
        """Pairs of more than `source` and `target` tokens are left out."""
        self.mixture, self.table, self.seed = mixture, table, seed
        self.source, self.target = source, target
        self.drawn = self.left_out = self.given = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Pair]:
        for _ in range(BARREN):
            ids, mask = next(self.mixture)
            self.drawn += 1
            made = self._pairs(ids, mask)
            fitting = [pair for pair in made if len(pair[0]) <= self.source and len(pair[1]) <= self.target]
            self.left_out += len(made) - len(fitting)
            self.given += len(fitting)
            if fitting:
                return fitting
        raise DataError(
            f"of {BARREN:,} documents in a row none has a source of at most {self.source} and a target of at most "
            f"{self.target} tokens; raise train.length, seq2seq.source_length or the model's context"
        )

    def _pairs(self, ids: Ids, mask: Mask) -> list[Pair]:
        if not mask[0]:
            return list(answers(ids.tolist(), mask.tolist()))
        # Another corruption each time that the text comes, and the same again in a run that goes on.
        key = xxhash.xxh3_128_intdigest(f"{self.seed}\0{self.drawn}".encode())
        pair = corrupted(ids.tolist(), key, self.table)
        return [] if pair is None else [pair]

    def state_dict(self) -> dict[str, Any]:
        """For JSON."""
        counts = {"drawn": self.drawn, "left_out": self.left_out, "given": self.given}
        return {"mixture": self.mixture.state_dict(), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.mixture.load_state_dict(state["mixture"])
        self.drawn, self.left_out, self.given = state["drawn"], state["left_out"], state["given"]


# --- pairs to batches ------------------------------------------------------------------------------------------------


@final
class Seq2SeqPacker:
    """Packs pairs into rows of S source and T target tokens; pair k of a row is document k on both sides.

    `extra` of a batch has "source", "source_doc" and "source_pos", each (B, S). The oldest pair opens a row, so that
    none waits for ever; then comes, as long as one fits on both sides, the one that fills most of them.
    """

    def __init__(self, stream: PairStream, batch_size: int, source_length: int, length: int) -> None:
        self.stream, self.batch_size = stream, batch_size
        self.source_length, self.length = source_length, length
        self._waiting: list[Pair] = []  # in the order of arrival

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return filled([self.row() for _ in range(self.batch_size)], self.source_length, self.length)

    def row(self) -> list[Pair]:
        """The pairs of one row."""
        tokens = sum(len(target) for _, target in self._waiting)
        while len(self._waiting) < WAITING and tokens < 2 * self.batch_size * self.length:
            some = next(self.stream)
            self._waiting += some
            tokens += sum(len(target) for _, target in some)
        sizes = np.array([(len(source), len(target)) for source, target in self._waiting])
        fills = sizes[:, 0] * self.length + sizes[:, 1] * self.source_length
        space = np.array([self.source_length, self.length])
        chosen = [0]
        while True:
            space = space - sizes[chosen[-1]]
            fills[chosen[-1]] = -1
            fitting = np.where((sizes <= space).all(1), fills, -1)
            best = int(fitting.argmax())  # the oldest of those that fill most
            if fitting[best] < 0:
                break
            chosen.append(best)
        row = [self._waiting[i] for i in chosen]
        left = set(chosen)
        self._waiting = [pair for i, pair in enumerate(self._waiting) if i not in left]
        return row

    def state_dict(self) -> dict[str, Any]:
        """The stream's state and the pairs that wait, for JSON; bounded, whatever the corpus."""
        return {"stream": self.stream.state_dict(), "waiting": [list(pair) for pair in self._waiting]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.stream.load_state_dict(state["stream"])
        self._waiting = [(source, target) for source, target in state["waiting"]]


def filled(rows: Sequence[Sequence[Pair]], source_length: int, length: int) -> Batch:
    """The batch of rows of pairs. The decoder reads START and a target but its last token, which it predicts."""
    shape, source_shape = (len(rows), length), (len(rows), source_length)
    tokens, source = np.zeros(shape, np.int64), np.zeros(source_shape, np.int64)
    doc, source_doc = np.full(shape, -1, np.int32), np.full(source_shape, -1, np.int32)
    pos, source_pos = np.zeros(shape, np.int64), np.zeros(source_shape, np.int64)
    targets = np.full(shape, IGNORE, np.int64)
    for row, pairs in enumerate(rows):
        at = source_at = 0
        for number, (read, written) in enumerate(pairs):
            span, source_span = slice(at, at + len(written)), slice(source_at, source_at + len(read))
            tokens[row, span], targets[row, span] = [START, *written[:-1]], written
            source[row, source_span] = read
            doc[row, span], source_doc[row, source_span] = number, number
            pos[row, span], source_pos[row, source_span] = np.arange(len(written)), np.arange(len(read))
            at, source_at = span.stop, source_span.stop
    extra = {"source": source, "source_doc": source_doc, "source_pos": source_pos}
    as_tensor = torch.from_numpy
    tensors = {name: as_tensor(array) for name, array in extra.items()}
    return Batch(as_tensor(tokens), as_tensor(targets), as_tensor(doc), as_tensor(pos), extra=tensors)
