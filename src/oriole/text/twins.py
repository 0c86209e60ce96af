"""A few pairs of near duplicates, read back from deduplication's working files so that a person can compare them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oriole.text.dedup import Duplicates
from oriole.text.rowfile import row_lines
from oriole.text.shingles import grams
from oriole.text.sketches import read_array
from oriole.text.tally import difference

__all__ = ["near_pairs"]

WINDOW = 700
"""Characters shown of each of the two."""


def near_pairs(
    files: Sequence[Path], drops: Duplicates, folder: Path, ngram: int, size: int, seed: int
) -> list[dict[str, Any]]:
    """Up to `size` pairs of a document that was dropped as "near" and one that stayed, chosen by their hashes.

    `files` and `folder` as for `find_duplicates`, which must have ended there; `ngram` is its `size`.
    """
    try:
        if not json.loads((folder / "duplicates.json").read_text(encoding="utf-8"))["report"]["pairs"]:
            return []
    except (OSError, ValueError, KeyError):
        return []
    numbers = [read_array(folder / "sketch" / f"{i:05}.docs.npy")[:, 0] for i in range(len(files))]
    first = np.cumsum([0, *map(len, numbers)])
    gone = np.zeros(first[-1], bool)
    for i, path in enumerate(files):
        lines = [line for line, reason in drops.get(path, {}).items() if reason == "near"]
        gone[first[i] + np.searchsorted(numbers[i], np.array(sorted(lines), np.uint32))] = True
    chosen = _choose(folder / "near", gone, size, seed)

    wanted: dict[int, dict[int, dict[str, Any]]] = {}
    for document in {int(d) for pair in chosen for d in pair}:
        i = int(np.searchsorted(first, document, side="right")) - 1
        wanted.setdefault(i, {})[int(numbers[i][document - first[i]])] = {"document": document}
    found: dict[int, dict[str, Any]] = {}
    for i, lines_of in wanted.items():
        for line, row in _rows_at(files[i], lines_of).items():
            found[lines_of[line]["document"]] = {**row, "input": files[i].name.removesuffix(".jsonl.zst")}
    return [_pair(found[kept], found[dropped], ngram) for kept, dropped in chosen]


def _choose(folder: Path, gone: NDArray[np.bool_], size: int, seed: int) -> list[tuple[int, int]]:
    """(kept, dropped) pairs of the lowest ranks; a dropped document is shown once."""
    best = np.empty(0, np.uint64)
    ranks = np.empty(0, np.uint64)
    for path in sorted(folder.glob("checked-*.npy")):
        pairs = np.load(path, allow_pickle=False)
        left, right = (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)
        inside = (left < len(gone)) & (right < len(gone))
        pairs, left, right = pairs[inside], left[inside], right[inside]
        pairs = pairs[gone[left] != gone[right]]
        best = np.concatenate([best, pairs])
        ranks = np.concatenate([ranks, _rank(pairs, seed)])
        order = np.argsort(ranks, kind="stable")[: 8 * size]
        best, ranks = best[order], ranks[order]
    out: dict[int, int] = {}
    for pair in best.tolist():
        left, right = pair >> 32, pair & 0xFFFFFFFF
        kept, dropped = (right, left) if gone[left] else (left, right)
        out.setdefault(dropped, kept)
    return [(kept, dropped) for dropped, kept in out.items()][:size]


def _rank(pairs: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    ranks = (pairs + np.uint64(seed * 2 + 1)) * np.uint64(0x9E3779B97F4A7C15)
    ranks ^= ranks >> np.uint64(29)
    ranks *= np.uint64(0xBF58476D1CE4E5B9)
    return ranks ^ (ranks >> np.uint64(32))


def _rows_at(path: Path, wanted: Mapping[int, Any]) -> dict[int, dict[str, Any]]:
    """The rows on the wanted lines (from 0) of a .jsonl.zst; the others are not parsed."""
    rows: dict[int, dict[str, Any]] = {}
    last = max(wanted)
    for number, line in enumerate(row_lines(path)):
        if number in wanted:
            rows[number] = json.loads(line)
        if number == last:
            break
    return rows


def _pair(kept: Mapping[str, Any], dropped: Mapping[str, Any], ngram: int) -> dict[str, Any]:
    shingles = grams([kept["text"], dropped["text"]], ngram)
    one, other = shingles.set_of(0), shingles.set_of(1)
    common = len(np.intersect1d(one, other, assume_unique=True))
    out: dict[str, Any] = {"similarity": round(common / max(1, len(one) + len(other) - common), 3)}
    windows = difference(kept["text"], dropped["text"], WINDOW)
    for name, row, window in zip(("kept", "dropped"), (kept, dropped), windows, strict=True):
        out[name] = {
            "input": row["input"], "lang": row["lang"], "source": row["source"], "characters": len(row["text"]),
            "text": window,
        }  # fmt: skip
    return out
