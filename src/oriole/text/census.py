"""What data holds, counted: documents, tokens, characters and bytes of each source and language, and their lengths."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oriole.errors import DataError
from oriole.text.shards import Shards
from oriole.text.tokenizer import Tokenizer
from oriole.text.validate import truncation

__all__ = ["Counts", "census", "histogram", "table"]

Counts = dict[str, int]
"""documents, tokens, trained_tokens, characters, bytes."""
CHUNK = 1 << 22
"""Tokens that are counted at a time."""


def census(shards: Shards, tok: Tokenizer, length: int) -> dict[str, Any]:
    """The counts of each source and language (the largest first), the lengths in tokens, and what `length` would cut.

    {"total": Counts, "sources": [{"source", "lang", **Counts}], "lengths": {"median", "longest", "histogram": [{"from",
    "to", "documents", "tokens"}]}, "truncation": {"length", "documents", "rate", "tokens", "lost", "lost_rate"}}
    """
    if shards.tokenizer != tok.fingerprint():
        raise DataError(f"{shards.folder} was made with another tokenizer; name it: tokenizer=DIR")
    per_doc = _per_document(shards, tok)
    groups = shards.source_ids.astype(np.int64) * len(shards.langs) + shards.lang_ids
    size = len(shards.sources) * len(shards.langs)
    sums = {name: np.bincount(groups, values, size).astype(np.int64) for name, values in per_doc.items()}
    documents = np.bincount(groups, minlength=size)
    sources = [
        {
            "source": shards.sources[group // len(shards.langs)],
            "lang": shards.langs[group % len(shards.langs)],
            "documents": int(documents[group]),
            **{name: int(values[group]) for name, values in sums.items()},
        }
        for group in np.flatnonzero(documents)
    ]
    return {"kind": "shards", **table(sources), **_lengths(shards.lengths, length)}


def table(sources: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of counts, the largest first, and their sums."""
    rows = sorted(sources, key=lambda row: (-row.get("tokens", row["bytes"]), row["source"], row["lang"]))
    names = [name for name in (rows[0] if rows else {}) if name not in ("source", "lang")]
    return {"total": {name: sum(row[name] for row in rows) for name in names}, "sources": rows}


def _lengths(lengths: NDArray[np.int64], length: int) -> dict[str, Any]:
    cut = truncation(lengths.tolist(), length)
    return {
        "lengths": {
            "median": int(np.median(lengths)),
            "longest": int(lengths.max()),
            "histogram": histogram(lengths),
        },
        "truncation": {
            "length": length, "documents": cut.cut, "rate": cut.rate, "tokens": cut.tokens, "lost": cut.lost,
            "lost_rate": cut.lost_rate,
        },
    }  # fmt: skip


def histogram(lengths: NDArray[np.int64]) -> list[dict[str, int]]:
    """Documents and their tokens by length, in steps of a factor of two from the shortest to the longest."""
    steps = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    documents, tokens = np.bincount(steps), np.bincount(steps, lengths)
    return [
        {"from": 1 << step, "to": (2 << step) - 1, "documents": int(documents[step]), "tokens": int(tokens[step])}
        for step in range(int(steps.min()), int(steps.max()) + 1)
    ]


def _per_document(shards: Shards, tok: Tokenizer) -> dict[str, NDArray[np.int64]]:
    """(documents,) arrays of tokens, trained tokens, characters and bytes."""
    of_id = {"characters": _characters(tok), "bytes": shards.byte_lengths.astype(np.int64)}
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in ("tokens", "trained_tokens", *of_id)}
    for ids, mask, offsets in shards.runs():
        for first, last in _spans(offsets):
            start, end = offsets[first], offsets[last]
            starts = (offsets[first:last] - start).astype(np.int64)
            sizes = np.diff(offsets[first : last + 1])
            parts["tokens"].append(sizes)
            trained = sizes if mask is None else np.add.reduceat(mask[start:end], starts, dtype=np.int64)
            parts["trained_tokens"].append(trained)
            for name, values in of_id.items():
                parts[name].append(np.add.reduceat(values[ids[start:end]], starts))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _spans(offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of documents of about CHUNK tokens, or one longer document."""
    first, count = 0, len(offsets) - 1
    while first < count:
        last = int(np.searchsorted(offsets, offsets[first] + CHUNK, "right")) - 1
        yield first, min(max(last, first + 1), count)
        first = min(max(last, first + 1), count)


def _characters(tok: Tokenizer) -> NDArray[np.int64]:
    """(V,): characters that begin in each id, so that the sum over a text's ids is its number of characters."""
    counts = (sum(byte & 0xC0 != 0x80 for byte in tok.token_bytes(i)) for i in range(tok.vocab_size))
    return np.fromiter(counts, np.int64, tok.vocab_size)
