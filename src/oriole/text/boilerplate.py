"""Lines that stand in many documents: menus, disclaimers, signatures. They stay in the first document only.

CCNet (Wenzek et al. 2020, section 3.1) and C4 (Raffel et al. 2020, section 2.2) remove every repeated paragraph or run
of three sentences; here a line must stand in several documents and be long enough, so that a common phrase, a closing
bracket or an import is no boilerplate. Lines inside fenced code never are.

Counting takes two passes of pieces: `count` sums up one file, sorted by hash, and `merge` adds up one slice of the
hashes of all files. So memory is that of one file or one slice.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, final

import numpy as np
import xxhash
from numpy.typing import NDArray

from oriole.text.work import new_file

__all__ = ["COUNTED", "SLICES", "Lines", "count", "merge"]

COUNTED: Final = np.dtype([("line", "<u8"), ("documents", "<u4"), ("file", "<u4"), ("row", "<u4")])
"""A line's hash, the number of documents that have it, and the file and row of the first of them."""
SLICES: Final = 8
"""Parts of equal size that the hashes are merged in."""
_FLUSH: Final = 1 << 21
"""Lines that are held before they are summed up."""

Rows = Iterable[tuple[int, str]]


@final
@dataclass(frozen=True, slots=True)
class Lines:
    """The boilerplate of a set of files; pickles."""

    files: dict[str, int]
    """The place of each file."""
    shortest: int
    """Bytes of UTF-8 below which a line is never boilerplate."""
    first: dict[int, tuple[int, int]] = field(repr=False)
    """For each line's hash, the file and row of the document that keeps it."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as saved:
            table = saved["lines"]
            places = zip(table["file"].tolist(), table["row"].tolist(), strict=True)
            first = dict(zip(table["line"].tolist(), places, strict=True))
            return cls({name: i for i, name in enumerate(saved["files"].tolist())}, int(saved["shortest"]), first)

    @staticmethod
    def save(path: Path, files: Sequence[Path], shortest: int, table: NDArray[Any]) -> None:
        """Write merged counts as a file for `read`."""
        with new_file(path) as file:
            np.savez(file, files=np.array([str(f) for f in files]), shortest=np.array(shortest), lines=table)

    def strip(self, text: str, path: Path, row: int) -> tuple[str, int]:
        """The text of the record on line `row` (from 0) of the file without boilerplate, and how many lines went."""
        if not self.first or ("\n" not in text and 4 * len(text) < self.shortest):
            return text, 0
        here = (self.files[str(path)], row)
        drop = {number for number, key in _keys(text, self.shortest) if self.first.get(key, here) != here}
        if not drop:
            return text, 0
        kept: list[str] = []
        for number, line in enumerate(text.split("\n")):
            if number in drop or (not line.strip() and number - 1 in drop and (not kept or not kept[-1].strip())):
                continue  # the blank line behind a line that went, too, if one stands before it
            kept.append(line)
        return "\n".join(kept).strip("\n"), len(drop)

    def stripped(self, path: Path, rows: Rows) -> Iterator[tuple[int, str]]:
        """The rows of a file with their texts stripped."""
        for row, text in rows:
            yield row, self.strip(text, path, row)[0]


def count(number: int, rows: Rows, shortest: int, out: Path) -> dict[str, Any]:
    """Write a COUNTED entry for each distinct line of file `number`, ascending."""
    total = np.empty(0, COUNTED)
    held: list[tuple[int, int, int, int]] = []
    lines = 0
    for row, text in rows:
        held += [(key, 1, number, row) for key in {key for _, key in _keys(text, shortest)}]
        if len(held) >= _FLUSH:
            lines += len(held)
            total = _summed([total, np.array(held, COUNTED)])
            held = []
    lines += len(held)
    total = _summed([total, np.array(held, COUNTED)])
    with new_file(out) as file:
        np.save(file, total, allow_pickle=False)
    return {"lines": lines}


def merge(counted: Sequence[Path], slice_: int, documents: int, out: Path) -> dict[str, Any]:
    """Write those COUNTED entries of one slice of the hashes that stand in at least that many documents."""
    begin, end = slice_ * (2**64 // SLICES), (slice_ + 1) * (2**64 // SLICES) - 1
    parts = []
    for path in counted:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
        low = np.searchsorted(table["line"], np.uint64(begin))
        high = np.searchsorted(table["line"], np.uint64(end), side="right")
        parts.append(np.array(table[low:high]))
    total = _summed(parts)
    often = total[total["documents"] >= documents]
    with new_file(out) as file:
        np.save(file, often, allow_pickle=False)
    return {"lines": len(often), "occurrences": int(often["documents"].sum())}


def _summed(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One entry for each line, ascending; of equal ones the first in the order of the parts says where it was first."""
    whole = np.concatenate([np.empty(0, COUNTED), *parts])
    if not len(whole):
        return whole
    whole = whole[np.argsort(whole["line"], kind="stable")]
    starts = np.flatnonzero(np.concatenate([[True], whole["line"][1:] != whole["line"][:-1]]))
    total = whole[starts]
    total["documents"] = np.add.reduceat(whole["documents"], starts)
    return total


def _keys(text: str, shortest: int) -> list[tuple[int, int]]:
    """(number, hash) of each line that could be boilerplate; neither case nor white space counts."""
    out = []
    fenced = False
    for number, line in enumerate(text.split("\n")):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced:
            plain = " ".join(unicodedata.normalize("NFC", line).lower().split()).encode("utf-8", "surrogatepass")
            if len(plain) >= shortest:
                out.append((number, xxhash.xxh3_64_intdigest(plain)))
    return out
