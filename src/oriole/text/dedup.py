"""Which documents of a set of files say again what another one says: exactly, or nearly.

    exact   equal xxh3-128 of the text in NFC with white space as single blanks; the first is kept
    near    Jaccard similarity of the sets of 5-grams (characters of Chinese, words of English: `text.shingles`) of at
            least 0.8; documents linked by such pairs are one group, of which the longest is kept, else the first
    lines   lines that stand in many documents are taken out first (`text.boilerplate`)

Near duplicates are found by MinHash and banding (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive
Datasets, section 3.4; as FineWeb, Penedo et al. 2024, with 14 bands of 8): two documents become candidates when all
minima of one of `bands` bands are equal, which for a similarity J happens with probability 1 - (1 - J^rows)^bands. Then
their true similarity decides, so precision does not hang on the sketch, and few large bands can be traded for recall:

    J                        0.20    0.30    0.50    0.70    0.75    0.80    0.85    0.90
    18 bands x 7 (default)   0.0002  0.0039  0.132   0.787   0.924   0.986   0.9990  1.0000
    14 bands x 8 (FineWeb)   0.0000  0.0009  0.053   0.565   0.772   0.924   0.988   0.9996

On disk a document takes 8 bytes for each band and 24 more; in memory one band at a time is sorted, so the peak is about
the sum of one file's keys and 60 bytes for each document. Texts are read a second time, those of candidates only.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field

from oriole.config import Config
from oriole.errors import DataError, raise_for_os_error
from oriole.text import boilerplate, sketches
from oriole.text.boilerplate import Lines
from oriole.text.sketches import EXACT, read_array, with_ending
from oriole.text.work import Engine, Piece, new_file, run_pieces

__all__ = ["DedupConfig", "Duplicates", "find_duplicates", "find_lines"]

SCHEMA: Final = 1
"""Of the working files; another one makes them anew."""
MATCHES: Final = 6
"""Pieces that the bands are matched in; few, because the work is small and each waits for the disk."""
PAIRS: Final = 1 << 17
"""Candidates verified in one piece."""
_LOW: Final = np.uint64(0xFFFFFFFF)

Duplicates = dict[Path, dict[int, str]]
"""For each file, the lines (from 0) of the records to leave out and why: "exact", "near" or "lines"."""


@final
class DedupConfig(Config):
    """What counts as a duplicate."""

    exact: bool = True
    """Drop documents whose text stood before, but for white space."""
    near: bool = True
    """Drop documents that are nearly the same as a longer or an earlier one."""
    lines: bool = False
    """Take lines out that stand in many documents. Off, because lists and verse repeat lines with good reason."""
    threshold: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity from which two documents are nearly the same (Lee et al. 2022 and SlimPajama: 0.8)."""
    size: int = Field(5, ge=1, le=50)
    """Characters of Chinese, or words of English, in an n-gram (FineWeb: 5)."""
    bands: int = Field(18, ge=1, le=512)
    """Bands of the signature; more find more pairs."""
    rows: int = Field(7, ge=1, le=64)
    """Minima in a band; more leave out more pairs that are not alike."""
    line_documents: int = Field(10, ge=2)
    """Documents that a line must stand in to be boilerplate."""
    line_bytes: int = Field(24, ge=1)
    """Bytes of UTF-8 from which a line can be boilerplate: 8 Chinese characters or 24 Latin letters."""


@final
@dataclass(frozen=True, slots=True)
class _Job:
    """What every step needs: where, how, on what."""

    files: tuple[Path, ...]
    keys: tuple[str, ...]
    """A fingerprint of each file."""
    config: DedupConfig
    folder: Path
    engine: Engine
    workers: int

    def names(self) -> list[str]:
        """A name for each file's piece, which an error of it shows."""
        names = [path.name for path in self.files]
        return names if len({*names}) == len(names) else [f"{i:05}-{name}" for i, name in enumerate(names)]

    def run(
        self, step: str, function: Callable[..., dict[str, Any]], pieces: Sequence[Piece], what: str
    ) -> list[dict[str, Any]]:
        done = self.folder / step / "done"
        return run_pieces(function, pieces, done, engine=self.engine, workers=self.workers, what=what)


def find_duplicates(
    files: Sequence[Path], config: DedupConfig, folder: Path, *, engine: Engine = "local", workers: int = 0
) -> Duplicates:
    """The records to drop, within and across the files, each a jsonl of one {"text"} a line, packed or not.

    `folder` keeps the working files: a run that was stopped goes on there, and one that is done is read from there
    until a file or a setting changes. Counts are in its `duplicates.json`. The result depends on the texts and on the
    order of the files only.
    """
    job = _job(files, config, folder, engine, workers)
    result = job.folder / "duplicates.json"
    key = _fingerprint("result", job.keys, config)
    saved = _saved(result, key)
    if saved is None:
        saved = {"key": key, **_find(job)}
        with new_file(result) as file:
            file.write(json.dumps(saved).encode())
    return {
        path: {line: reason for reason, dropped in found.items() for line in dropped}
        for path, found in zip(job.files, saved["files"], strict=True)
    }


def find_lines(
    files: Sequence[Path], config: DedupConfig, folder: Path, *, engine: Engine = "local", workers: int = 0
) -> Lines:
    """The lines that stand in too many documents of the files, for `Lines.strip`; `find_duplicates` left them out."""
    return Lines.read(_lines(_job(files, config, folder, engine, workers)))


def _job(files: Sequence[Path], config: DedupConfig, folder: Path, engine: Engine, workers: int) -> _Job:
    if len({path.resolve() for path in files}) < len(files):
        raise DataError("a file is named twice for deduplication; name each once")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stats = [path.stat() for path in files]
    except OSError as error:
        raise_for_os_error(error, "preparing the deduplication in", error.filename or folder)
    keys = (_fingerprint(str(p.resolve()), s.st_size, s.st_mtime_ns) for p, s in zip(files, stats, strict=True))
    return _Job(tuple(files), tuple(keys), config, folder, engine, workers)


def _saved(path: Path, key: str) -> dict[str, Any] | None:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return saved if saved["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fingerprint(*parts: Any) -> str:
    words = [part.model_dump_json() if isinstance(part, Config) else repr(part) for part in (SCHEMA, *parts)]
    return xxhash.xxh3_128_hexdigest("\n".join(words).encode())


# --- the steps -------------------------------------------------------------------------------------------------------


def _find(job: _Job) -> dict[str, Any]:
    """Everything `duplicates.json` holds."""
    stems, counts = _sketches(job)
    first = np.cumsum([0, *counts])
    dropped = np.zeros(first[-1], np.uint8)  # 0 kept, else the reason's place in REASONS
    report = {"documents": int(first[-1]), "candidates": 0, "pairs": 0}
    characters = _column(stems, 1)
    if job.config.lines:
        dropped[characters == 0] = REASONS.index("lines")
    if job.config.exact and len(dropped):
        again = _again(np.concatenate([read_array(with_ending(stem, "keys"))[:EXACT] for stem in stems], axis=1))
        dropped[again[dropped[again] == 0]] = REASONS.index("exact")
    if job.config.near:
        found, report["candidates"], report["pairs"] = _near(job, stems, first, dropped == 0, characters)
        dropped[found] = REASONS.index("near")
    out = []
    for i, stem in enumerate(stems):
        mine, numbers = dropped[first[i] : first[i + 1]], read_array(with_ending(stem, "docs"))[:, 0]
        out.append({reason: numbers[mine == n].tolist() for n, reason in enumerate(REASONS) if n})
    report |= {reason: int((dropped == n).sum()) for n, reason in enumerate(REASONS) if n}
    return {"report": report, "files": out}


REASONS: Final = ("", "exact", "near", "lines")


def _column(stems: Sequence[Path], column: int) -> NDArray[np.uint32]:
    parts = [np.array(read_array(with_ending(stem, "docs"))[:, column]) for stem in stems]
    return np.concatenate(parts) if parts else np.empty(0, np.uint32)


def _lines(job: _Job) -> Path:
    """The file of the boilerplate lines."""
    c, folder = job.config, job.folder / "lines"
    stems = [folder / f"{i:05}.npy" for i in range(len(job.files))]
    pieces = [
        Piece(name, _fingerprint("count", key, i, c.line_bytes), (path, i, c.line_bytes, stem), (stem,))
        for i, (name, path, key, stem) in enumerate(zip(job.names(), job.files, job.keys, stems, strict=True))
    ]
    folder.mkdir(exist_ok=True)
    job.run("lines", _count, pieces, "counting lines")
    key = _fingerprint("merge", job.keys, c.line_bytes, c.line_documents)
    slices = [folder / f"slice-{n:02}.npy" for n in range(boilerplate.SLICES)]
    pieces = [Piece(out.stem, key, (stems, n, c.line_documents, out), (out,)) for n, out in enumerate(slices)]
    job.run("lines", boilerplate.merge, pieces, "finding repeated lines")
    out = folder / "lines.npz"
    Lines.save(out, job.files, c.line_bytes, np.concatenate([np.load(part) for part in slices]))
    return out


def _count(path: Path, number: int, shortest: int, out: Path) -> dict[str, Any]:
    return boilerplate.count(number, sketches.rows(path), shortest, out)


def _sketches(job: _Job) -> tuple[list[Path], list[int]]:
    """Where each file's sketch is, and how many documents it has."""
    c = job.config
    lines = _lines(job) if c.lines else None
    all_files = _fingerprint(job.keys, c.line_bytes, c.line_documents) if c.lines else ""
    shape = (c.exact, c.near, c.size, c.bands, c.rows)
    stems = [job.folder / "sketch" / f"{i:05}" for i in range(len(job.files))]
    pieces = [
        Piece(
            name,
            _fingerprint("sketch", stem.name, key, all_files, shape),
            (path, stem, lines, *shape),
            (with_ending(stem, "docs"), with_ending(stem, "keys")),
        )
        for name, path, key, stem in zip(job.names(), job.files, job.keys, stems, strict=True)
    ]
    (job.folder / "sketch").mkdir(exist_ok=True)
    results = job.run("sketch", sketches.sketch, pieces, "hashing documents")
    return stems, [result["documents"] for result in results]


def _again(digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The documents whose digest an earlier one has, too."""
    order = np.lexsort((np.arange(digests.shape[1]), *digests))
    same = (digests[:, order[1:]] == digests[:, order[:-1]]).all(0)
    again: NDArray[np.int64] = order[1:][same]
    return again


def _near(
    job: _Job, stems: list[Path], first: NDArray[np.int64], alive: NDArray[np.bool_], characters: NDArray[np.uint32]
) -> tuple[NDArray[np.int64], int, int]:
    """The documents to drop, how many pairs were candidates, and how many were near duplicates indeed."""
    (job.folder / "near").mkdir(exist_ok=True)
    pairs = _candidates(job, stems, alive) if alive.any() else np.empty(0, np.uint64)
    if not len(pairs):
        return np.empty(0, np.int64), 0, 0
    known = np.union1d(pairs >> np.uint64(32), pairs & _LOW).astype(np.int64)
    good = _verified(job, stems, first, pairs, known)
    left, right = (np.searchsorted(known, ids.astype(np.int64)) for ids in (good >> np.uint64(32), good & _LOW))
    groups = _groups(left, right, len(known))
    order = np.lexsort((known, -characters[known].astype(np.int64), groups))  # the kept one first in its group
    behind = order[1:][groups[order[1:]] == groups[order[:-1]]]
    return known[behind], len(pairs), len(good)


def _candidates(job: _Job, stems: list[Path], alive: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Pairs of living documents (smaller << 32 | larger, ascending) that have a band in common."""
    c, folder = job.config, job.folder / "near"
    living = folder / "alive.npy"
    np.save(living, alive)
    begin = EXACT * c.exact
    bands = [range(begin + at, begin + c.bands, MATCHES) for at in range(min(MATCHES, c.bands))]
    outs = [folder / f"matched-{n}.npy" for n in range(len(bands))]
    key = _fingerprint("match", job.keys, c)
    pieces = [Piece(out.stem, key, (stems, some, living, out), (out,)) for some, out in zip(bands, outs, strict=True)]
    job.run("near", sketches.match, pieces, "matching bands")
    pairs = np.empty(0, np.uint64)
    for out in outs:
        pairs = np.union1d(pairs, np.load(out))
    return pairs


def _verified(
    job: _Job,
    stems: list[Path],
    first: NDArray[np.int64],
    pairs: NDArray[np.uint64],
    known: NDArray[np.int64],
) -> NDArray[np.uint64]:
    """Those of the pairs that are near duplicates; `known` are the documents in a pair, ascending."""
    c, folder = job.config, job.folder / "near"
    key = _fingerprint("verify", job.keys, c)
    grams = [folder / f"{stem.name}.grams" for stem in stems]
    lines = job.folder / "lines" / "lines.npz" if c.lines else None
    cuts = np.searchsorted(known, first)
    pieces = [
        Piece(out.name, key, (path, stem, lines, known[begin:end] - before, c.size, out), (out,))
        for path, stem, out, begin, end, before in zip(
            job.files, stems, grams, cuts[:-1], cuts[1:], first[:-1], strict=True
        )
    ]
    job.run("near", sketches.collect, pieces, "reading candidates again")
    all_pairs, candidates = folder / "pairs.npy", folder / "candidates.npy"
    np.save(all_pairs, pairs)
    np.save(candidates, known)
    runs = range(0, len(pairs), PAIRS)
    outs = [folder / f"checked-{n:05}.npy" for n in range(len(runs))]
    pieces = [
        Piece(out.stem, key, (all_pairs, at, at + PAIRS, candidates, grams, c.threshold, out), (out,))
        for at, out in zip(runs, outs, strict=True)
    ]
    job.run("near", sketches.verify, pieces, "comparing candidates")
    for stale in {*folder.glob("*.grams"), *folder.glob("checked-*.npy")} - {*outs}:
        stale.unlink(missing_ok=True)  # the bulky ones (`duplicates.json` is all that a rerun needs), and older ones
    return np.concatenate([np.load(out) for out in outs])


def _groups(left: NDArray[np.int64], right: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """For each of `count` nodes the smallest one that edges link it with: union-find by halving paths, all at once."""
    root = np.arange(count)
    while True:
        a, b = root[left], root[right]
        differ = a != b
        if not differ.any():
            return root
        left, right = left[differ], right[differ]
        np.minimum.at(root, np.maximum(a[differ], b[differ]), np.minimum(a[differ], b[differ]))
        while (root[root] != root).any():
            root = root[root]
