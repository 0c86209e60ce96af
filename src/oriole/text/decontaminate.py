"""Does a text hold something of an evaluation file? By 13-grams, as in GPT-3 (Brown et al. 2020, appendix C).

An n-gram is 13 words of English, without case and punctuation, as published; of Chinese it is 13 characters, which are
seven or eight words and so catch more. A string of an evaluation record with fewer tokens than that, such as "true" or
"B. 25 metres", proves nothing and is passed over. Where GPT-3 cuts the passage out, here the document is to be dropped.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from oriole.text.files import file_kind, lines, values
from oriole.text.formats import read_docs
from oriole.text.shingles import LONGEST, batches, grams, tokens

__all__ = ["Decontaminator"]

SIZE: Final = 13
"""Tokens in an n-gram (Brown et al. 2020)."""
FILTER_BITS: Final = 16
"""Bits of the filter for each n-gram: all but a sixteenth of a clean text's n-grams end there."""
OVERLAP: Final = 1 << 12
"""Characters that two parts of a very long text have in common."""
LONGEST_CELL: Final = 1 << 25
"""Characters of a cell in a csv file."""


@final
class Decontaminator:
    """Knows the n-grams of some evaluation files, in about 20 bytes for each beside their text; pickles."""

    def __init__(self, files: Sequence[Path], size: int = SIZE) -> None:
        """Read every string of every record of the files, whatever their format. `DataError` as in reading data."""
        self.size = size
        self.strings = 0
        """Strings of at least `size` tokens."""
        self.short = 0
        """Strings of fewer, which are not looked for."""
        hashes: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        places: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        kept: list[str] = []
        length = 0
        strings = (string for path in files for string in _strings(path))
        for _, texts in batches((0, window) for string in strings for window in _windows(string)):
            found = grams(texts, size)
            for row, text in enumerate(texts):
                if len(tokens(text, 0, size)) < size:
                    self.short += 1
                    continue
                self.strings += 1
                hashes.append(found.of(row))
                places.append(found.places(row) + length)
                kept.append(text)
                length += len(text) + 1
        self._text = "\n".join(kept)
        self._hashes, first = np.unique(np.concatenate(hashes), return_index=True)
        self._places = np.concatenate(places)[first]
        self._bits = max(10, (FILTER_BITS * len(self._hashes)).bit_length())
        self._filter = np.zeros(1 << (self._bits - 3), np.uint8)
        at = self._hashes >> np.uint64(64 - self._bits)
        np.bitwise_or.at(self._filter, (at >> np.uint64(3)).astype(np.int64), _bit(at))

    def __len__(self) -> int:
        """How many different n-grams are known."""
        return len(self._hashes)

    def hit(self, text: str) -> str | None:
        """The first passage of the text that is an n-gram of an evaluation file, as it stands in the text."""
        return self.hits([text])[0]

    def hits(self, texts: Sequence[str]) -> list[str | None]:
        """`hit` of each text; many short ones in one call are faster."""
        if any(len(text) > LONGEST for text in texts):
            return [next((hit for hit in map(self.hit, _windows(text)) if hit), None) for text in texts]
        found = grams(texts, self.size)
        at = found.hashes >> np.uint64(64 - self._bits)
        maybe = np.flatnonzero(self._filter[(at >> np.uint64(3)).astype(np.int64)] & _bit(at))
        out: list[str | None] = [None] * len(texts)
        if not len(maybe) or not len(self._hashes):
            return out
        where = np.searchsorted(self._hashes, found.hashes[maybe])
        where[where == len(self._hashes)] = 0
        equal = self._hashes[where] == found.hashes[maybe]
        rows = np.searchsorted(found.rows, maybe[equal], side="right") - 1
        for gram, known, row in zip(maybe[equal].tolist(), where[equal].tolist(), rows.tolist(), strict=True):
            if out[row] is None:
                begin = int(found.places(row)[gram - int(found.rows[row])])
                out[row] = self._confirmed(texts[row], begin, int(self._places[known]))
        return out

    def _confirmed(self, text: str, begin: int, place: int) -> str | None:
        """The passage, if it has the same tokens as the one that is known and not only the same hash."""
        ours = tokens(text, begin, self.size)
        theirs = tokens(self._text, place, self.size)
        return text[begin : ours[-1][2]] if [w for w, _, _ in ours] == [w for w, _, _ in theirs] else None


def _windows(text: str) -> Iterator[str]:
    """The text, or parts of it that overlap by more than any n-gram where it is too long for one call of `grams`."""
    yield text[:LONGEST]
    for begin in range(LONGEST - OVERLAP, len(text) - OVERLAP, LONGEST - OVERLAP):
        yield text[begin : begin + LONGEST]


def _bit(at: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return np.left_shift(np.uint8(1), (at & np.uint64(7)).astype(np.uint8))


def _strings(path: Path) -> Iterator[str]:
    """Every string in the file: of JSON records at any depth, of tables every cell, of documents the text."""
    match file_kind(path):
        case "json":
            for _, value in values(path):
                yield from _inside(value)
        case "csv" | "tsv" as kind:
            csv.field_size_limit(LONGEST_CELL)
            for row in csv.reader((line for _, line in lines(path)), delimiter="," if kind == "csv" else "\t"):
                yield from row
        case "parquet" | "arrow":
            from oriole.text.tables import rows

            for _, record in rows(path, frozenset()):
                yield from _inside(record)
        case _:
            for doc in read_docs(path):
                yield doc.text


def _inside(value: Any) -> Iterator[str]:
    """The strings in a JSON value; without recursion, because it may be nested as deeply as it likes."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str() as text:
                yield text
            case dict() as record:
                waiting += reversed(record.values())
            case list() as items:
                waiting += reversed(items)
