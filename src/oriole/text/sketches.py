"""The pieces of deduplication, each for one file, one band or one run of pairs: what `text.dedup` puts together.

    sketch    file -> a 128-bit hash of each document and one 64-bit key for each band of its MinHash signature
    match     one band's keys of all files, sorted -> pairs of documents with equal keys: the candidates
    collect   file -> the n-grams of the documents that are in a pair
    verify    a run of pairs -> whether their true Jaccard similarity reaches the threshold

They share nothing but files, and a key depends on the text alone. So it makes no difference to the result how many
processes or machines there are. Documents are numbered through all files, in the order of the files.
"""

import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, final

import numpy as np
import xxhash
from numpy.typing import NDArray
from rensa import RMinHash

from oriole.errors import DataError
from oriole.text.boilerplate import Lines
from oriole.text.files import lines
from oriole.text.shingles import Grams, batches, grams
from oriole.text.work import new_file

__all__ = [
    "EXACT", "GROUP", "band_keys", "collect", "match", "read_array", "rows", "sketch", "verify", "with_ending",
    "write_array",
]  # fmt: skip

U64 = NDArray[np.uint64]

SEED: Final = 1
EXACT: Final = 2
"""64-bit halves of an exact hash."""
GROUP: Final = 16
"""In larger groups of equal keys a document is paired with the first one and with the 15 before it, not with all."""
CACHE_BYTES: Final = 1 << 25
"""Of n-grams that `verify` keeps at hand."""
OPEN_FILES: Final = 128
"""How many it reads from at a time."""
_KEY: Final = np.uint64(0x9E3779B97F4A7C15)
_LOW: Final = np.uint64(0xFFFFFFFF)


# --- files -----------------------------------------------------------------------------------------------------------


def rows(path: Path, wanted: Sequence[int] | None = None) -> Iterator[tuple[int, str]]:
    """(line from 0, text) of each record, or of those on the `wanted` lines, which ascend; others are not parsed."""
    ahead = iter(wanted) if wanted is not None else None
    following = next(ahead, -1) if ahead is not None else 0
    if following < 0 or path.stat().st_size == 0:
        return
    for number, line in lines(path):
        if ahead is not None:
            if number - 1 != following:
                continue
            following = next(ahead, -1)
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            if line.isspace():
                continue
            raise DataError(
                f"{path}, line {number}: no JSON record with a 'text'; give files that `oriole data clean` wrote"
            ) from None
        yield number - 1, text
        if following < 0:
            return


def write_array(path: Path, array: NDArray[Any]) -> None:
    """The array as .npy, whole or not at all."""
    with new_file(path) as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: Path) -> Any:
    """The array in a .npy file, mapped; only what is touched is read."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def with_ending(stem: Path, ending: str) -> Path:
    """`00001` -> `00001.docs.npy`."""
    return stem.with_name(f"{stem.name}.{ending}.npy")


# --- sketch ----------------------------------------------------------------------------------------------------------


def sketch(
    path: Path, out: Path, boilerplate: Path | None, exact: bool, near: bool, size: int, bands: int, band_rows: int
) -> dict[str, Any]:
    """Write out.docs (line, characters) and out.keys: two rows for halves of exact hashes, one for each band."""
    strip = Lines.read(boilerplate) if boilerplate is not None else None
    docs: list[NDArray[np.uint32]] = []
    digests: list[bytes] = []
    keys: list[U64] = []
    for numbers, texts in batches(strip.stripped(path, rows(path)) if strip else rows(path)):
        docs.append(np.array([numbers, [len(text) for text in texts]], np.uint32).T)
        if exact:
            digests += [_digest(text) for text in texts]
        if near:
            keys.append(band_keys(grams(texts, size), bands, band_rows))
    count = sum(map(len, docs))
    table = np.empty((EXACT * exact + bands * near, count), np.uint64)
    if exact:
        table[:EXACT] = np.frombuffer(b"".join(digests), np.uint64).reshape(count, EXACT).T
    place = 0
    for part in keys:
        table[EXACT * exact :, place : place + len(part)] = part.T
        place += len(part)
    write_array(with_ending(out, "keys"), table)
    write_array(with_ending(out, "docs"), np.concatenate(docs) if docs else np.empty((0, 2), np.uint32))
    return {"documents": count}


def band_keys(shingles: Grams, bands: int, band_rows: int) -> U64:
    """One key for each document and band (docs, bands); 0 where a document has no n-gram, and never else.

    The signature is rensa's: bands x band_rows minima, an unbiased estimate of Jaccard's similarity.
    """
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles.hashes, shingles.rows.astype(np.uint64), bands * band_rows, SEED
    )
    signature = np.array(matrix.to_rows(), np.uint64).reshape(-1, bands, band_rows)
    keys = np.full(signature.shape[:2], _KEY)
    for r in range(band_rows):
        keys ^= signature[:, :, r]
        keys *= _KEY
        keys ^= keys >> np.uint64(29)
    np.maximum(keys, np.uint64(1), out=keys)
    keys[np.diff(shingles.rows) == 0] = 0
    return keys


def _digest(text: str) -> bytes:
    """xxh3's 128 bits of the text in NFC with white space as single blanks."""
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    return xxhash.xxh3_128_digest(plain.encode("utf-8", "surrogatepass"))


# --- match -----------------------------------------------------------------------------------------------------------


def match(sketches: Sequence[Path], bands: Sequence[int], alive: Path, out: Path) -> dict[str, Any]:
    """Write the pairs of living documents with equal keys in one of these rows: (smaller << 32 | larger), ascending."""
    living = np.load(alive, allow_pickle=False)
    found = np.empty(0, np.uint64)
    for band in bands:
        found = np.union1d(found, _matched(sketches, band, living))
    write_array(out, found)
    return {"pairs": len(found)}


def _matched(sketches: Sequence[Path], band: int, living: NDArray[np.bool_]) -> U64:
    keys = np.concatenate([read_array(with_ending(stem, "keys"))[band] for stem in sketches])
    keys *= living
    ids = np.flatnonzero(keys)
    keys = keys[ids]
    order = np.argsort(keys)
    keys, ids = keys[order], ids[order]
    same = keys[1:] == keys[:-1]
    member = np.zeros(len(keys), bool)
    member[1:] = same
    member[:-1] |= same
    keys, ids = keys[member], ids[member]
    order = np.lexsort((ids, keys))
    return _pairs(keys[order], ids[order])


def _pairs(keys: U64, ids: NDArray[np.int64]) -> U64:
    """Each document with those before it in its group of equal keys: the nearest GROUP - 1 and the group's first."""
    if not len(keys):
        return np.empty(0, np.uint64)
    unsigned = ids.astype(np.uint64)
    found = []
    for step in range(1, GROUP):
        left = np.flatnonzero(keys[step:] == keys[:-step])
        if not len(left):
            break
        found.append(unsigned[left] << np.uint64(32) | unsigned[left + step])
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    begins = np.repeat(starts, np.diff(np.append(starts, len(keys))))
    far = np.flatnonzero(np.arange(len(keys)) - begins >= GROUP)
    found.append(unsigned[begins[far]] << np.uint64(32) | unsigned[far])
    return np.unique(np.concatenate(found))


# --- verify ----------------------------------------------------------------------------------------------------------


def collect(
    path: Path, stem: Path, boilerplate: Path | None, chosen: NDArray[np.int64], size: int, out: Path
) -> dict[str, Any]:
    """Write the sorted distinct n-grams of the `chosen` documents one after another, where each ends, and the count."""
    strip = Lines.read(boilerplate) if boilerplate is not None else None
    numbers = read_array(with_ending(stem, "docs"))[chosen, 0].tolist()
    ends = []
    written = 0
    with new_file(out) as file:
        wanted = rows(path, numbers)
        for _, texts in batches(strip.stripped(path, wanted) if strip else wanted):
            shingles = grams(texts, size)
            for row in range(len(texts)):
                distinct = shingles.set_of(row)
                file.write(distinct.tobytes())
                written += len(distinct)
                ends.append(written)
        file.write(np.array([*ends, len(ends)], np.int64).tobytes())
    return {"documents": len(ends)}


def verify(
    pairs: Path, begin: int, end: int, candidates: Path, collected: Sequence[Path], threshold: float, out: Path
) -> dict[str, Any]:
    """Write the pairs from `begin` to `end` whose n-grams' true Jaccard similarity is at least the threshold."""
    some = np.array(read_array(pairs)[begin:end])
    known = read_array(candidates)
    left = np.searchsorted(known, (some >> np.uint64(32)).astype(np.int64))
    right = np.searchsorted(known, (some & _LOW).astype(np.int64))
    with _Sets(collected) as sets:
        small, large = np.sort(np.stack([sets.sizes[left], sets.sizes[right]]), axis=0)
        good = small >= threshold * large
        for k in np.flatnonzero(good):
            good[k] = _jaccard(sets.get(int(left[k])), sets.get(int(right[k]))) >= threshold
    write_array(out, some[good])
    return {"pairs": int(good.sum())}


def _jaccard(a: U64, b: U64) -> float:
    """|A and B| / |A or B| of two sorted arrays of distinct values that are not both empty."""
    if len(a) > len(b):
        a, b = b, a
    at = np.searchsorted(b, a)
    at[at == len(b)] = 0
    common = int(np.count_nonzero(b[at] == a)) if len(b) else 0
    return common / (len(a) + len(b) - common)


@final
class _Sets:
    """The n-grams that `collect` wrote, read where they are needed; not mapped, so that memory is what is kept."""

    def __init__(self, collected: Sequence[Path]) -> None:
        ends = [_ends(path) for path in collected]
        self.collected = collected
        self.files: dict[int, BinaryIO] = {}
        self.first = np.cumsum([0, *map(len, ends)])
        self.ends = np.concatenate(ends)
        self.sizes = np.concatenate([np.diff(part, prepend=0) for part in ends])
        self.kept: dict[int, U64] = {}
        self.kept_bytes = 0

    def __enter__(self) -> "_Sets":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

    def file(self, number: int) -> BinaryIO:
        """The n-grams of one input file; not too many are open at a time."""
        if number not in self.files:
            if len(self.files) >= OPEN_FILES:
                self.__exit__()
            self.files[number] = open(self.collected[number], "rb")
        return self.files[number]

    def get(self, place: int) -> U64:
        """The n-grams of candidate `place`."""
        found = self.kept.get(place)
        if found is None:
            file = self.file(int(np.searchsorted(self.first, place, side="right")) - 1)
            size = 8 * int(self.sizes[place])
            file.seek(8 * int(self.ends[place]) - size)
            found = np.frombuffer(file.read(size), np.uint64)
            if self.kept_bytes > CACHE_BYTES:
                self.kept.clear()
                self.kept_bytes = 0
            self.kept[place] = found
            self.kept_bytes += size
        return found


def _ends(path: Path) -> NDArray[np.int64]:
    """Where each document's n-grams end in a file that `collect` wrote."""
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        count = int.from_bytes(file.read(8), "little")
        file.seek(-8 * (count + 1), os.SEEK_END)
        return np.frombuffer(file.read(8 * count), np.int64)
