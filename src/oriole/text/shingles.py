"""Texts as hashes of their n-grams, a whole batch at once in NumPy: what deduplication and decontamination compare.

A token is a word (a run of letters, digits and marks) where words stand apart, and one character in scripts that write
without spaces: Han, kana, Thai, Lao, Khmer, Myanmar, Tibetan. So an n-gram is n characters of Chinese and n words of
English (`n_words`), mixed text needs no label, and neither case nor width nor punctuation counts. A text of fewer
tokens than n is one n-gram of all it has; one without any token has none.

A token's hash is a polynomial in a random value per character, modulo 2^64. Multiplying character i of the batch by
B^i, summing, and taking B^(start of the token) out again (an odd B has an inverse) gives all of them without a loop. An
n-gram's hash is a polynomial in its tokens' hashes, then murmur3's finaliser. Two different n-grams are taken for one
with a probability of about 2^-60.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, TypeVar, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["LONGEST", "Grams", "batches", "grams", "tokens"]

T = TypeVar("T")
U64 = NDArray[np.uint64]

LONGEST: Final = 1 << 20
"""Characters of a text that are looked at; what is behind them does not count. It bounds memory."""
BATCH_CHARS: Final = 1 << 17
"""Characters hashed in one go: as many as make NumPy's overhead small and still stay in the processor's cache."""

_LAST: Final = 0x3FFFF
"""Code points above this one (none is a letter) are separators, as this one is."""
_BASE: Final = 0xD1342543DE82EF97
_STEP: Final = 0x9E3779B97F4A7C15
_GRAM: Final = np.uint64(0xAF251AF3B0F025B5)
_ALONE: Final = (
    (0x0E00, 0x0E7F), (0x0E80, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF),  # Thai … Khmer
    (0x3005, 0x3007), (0x3021, 0x3029), (0x3040, 0x30FF), (0x31A0, 0x31BF), (0x31F0, 0x31FF),  # kana, bopomofo
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1B000, 0x1B16F), (0x20000, 0x3FFFD),
)  # fmt: skip
"""Scripts without spaces between words: every character is a token."""


@final
@dataclass(frozen=True, slots=True)
class Grams:
    """The n-grams of a batch of texts, in order, repeated ones included."""

    hashes: U64
    """One for each n-gram (n,)."""
    rows: NDArray[np.int64]
    """Where each text's n-grams start among `hashes`, and behind the last of them (texts + 1,)."""
    tokens: NDArray[np.int64]
    """Where each token begins in the batch (tokens,)."""
    first: NDArray[np.int64]
    """Which token is the first of each text (texts,)."""
    begins: NDArray[np.int64]
    """Where each text begins in the batch (texts,)."""

    def of(self, row: int) -> U64:
        """The n-grams of one text."""
        return self.hashes[self.rows[row] : self.rows[row + 1]]

    def set_of(self, row: int) -> U64:
        """The distinct n-grams of one text, sorted."""
        return np.unique(self.of(row))

    def places(self, row: int) -> NDArray[np.int64]:
        """Where in the text each of its n-grams begins."""
        first, count = self.first[row], self.rows[row + 1] - self.rows[row]
        places: NDArray[np.int64] = self.tokens[first : first + count] - self.begins[row]
        return places


def batches(items: Iterable[tuple[T, str]]) -> Iterator[tuple[list[T], list[str]]]:
    """The items and their texts in runs that are worth one call of `grams`."""
    keys: list[T] = []
    texts: list[str] = []
    chars = 0
    for key, text in items:
        keys.append(key)
        texts.append(text)
        chars += len(text) + 1
        if chars >= BATCH_CHARS:
            yield keys, texts
            keys, texts, chars = [], [], 0
    if keys:
        yield keys, texts


def grams(texts: Sequence[str], n: int) -> Grams:
    """The hashes of the n-grams of each text; memory is about 50 bytes for each character of all texts together."""
    if not texts:
        none = np.empty(0, np.int64)
        return Grams(np.empty(0, np.uint64), np.zeros(1, np.int64), none, none, none)
    texts = [text if len(text) <= LONGEST else text[:LONGEST] for text in texts]
    values, kinds, _ = _tables()
    # "\n" before each text: a token of one never runs on into the next, and every position has one before it.
    points = np.frombuffer(("\n" + "\n".join(texts)).encode("utf-32-le", "surrogatepass"), "<u4")
    points = np.minimum(points, np.uint32(_LAST))
    kind = kinds[points]
    first = kind > 0
    first[1:] &= (kind[1:] == 2) | (kind[:-1] != 1)
    starts = np.flatnonzero(first)
    powers, inverses = _powers(1 << (len(points) - 1).bit_length())
    value = values[points]
    value *= powers[: len(points)]
    token = np.add.reduceat(value, starts) if len(starts) else np.empty(0, np.uint64)
    token *= inverses[starts]

    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    begins = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(lengths + 1, out=begins[1:])
    bounds = np.searchsorted(starts, begins)  # of each text's tokens
    counts = np.diff(bounds)
    padded = np.concatenate([token, np.zeros(n, np.uint64)])
    hashed = padded[: len(token)].copy()
    for k in range(1, n):
        hashed *= _GRAM
        hashed += padded[k : k + len(token)]
    kept = np.ones(len(token), bool)
    for k in range(1, n):  # the last n-1 of a text's tokens begin no n-gram of it
        kept[bounds[1:][counts >= k] - k] = False
    short = np.flatnonzero((counts > 0) & (counts < n))
    if len(short):
        at = bounds[short]
        whole = counts[short].astype(np.uint64)
        for k in range(n - 1):
            whole *= _GRAM
            whole += np.where(k < counts[short], padded[at + k], np.uint64(0))
        hashed[at], kept[at] = whole, True
    rows = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(np.where(counts > 0, np.maximum(counts - n + 1, 1), 0), out=rows[1:])
    return Grams(_mixed(hashed[kept]), rows, starts, bounds[:-1], begins[:-1] + 1)


def tokens(text: str, begin: int = 0, count: int = -1) -> list[tuple[str, int, int]]:
    """(token in lower case, where it begins, where it ends) of each token from `begin` on, or of the first `count`.

    What `grams` hashes, one after another.
    """
    _, kinds, folded = _tables()
    out: list[tuple[str, int, int]] = []
    word, start, place = "", 0, begin
    for place in range(begin, len(text) + 1):
        point = min(ord(text[place]), _LAST) if place < len(text) else _LAST
        kind = kinds[point]
        if word and kind != 1:
            out.append((word, start, place))
            word = ""
        if len(out) == count:
            return out
        if kind == 1:
            word, start = word + chr(folded[point]), start if word else place
        elif kind == 2:
            out.append((chr(folded[point]), place, place + 1))
            if len(out) == count:
                return out
    return out


def _mixed(hashes: U64) -> U64:
    """murmur3's 64-bit finaliser, in place: every bit of the input moves every bit of the output."""
    hashes ^= hashes >> np.uint64(33)
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> np.uint64(33)
    hashes *= np.uint64(0xC4CEB9FE1A85EC53)
    hashes ^= hashes >> np.uint64(33)
    return hashes


@cache
def _powers(size: int) -> tuple[U64, U64]:
    """`_BASE` to the power of 0, 1, 2 …, and the inverses of these, modulo 2^64."""
    inverse = pow(_BASE, -1, 1 << 64)
    both = []
    for base in (_BASE, inverse):
        row = np.full(size, base, np.uint64)
        row[0] = 1
        both.append(np.cumprod(row, dtype=np.uint64))
    return both[0], both[1]


@cache
def _tables() -> tuple[U64, NDArray[np.uint8], NDArray[np.uint32]]:
    """For each code point: its random value (0 for separators); 1 in words, 2 alone, 0 separator; its folded form."""
    kinds = np.zeros(_LAST + 1, np.uint8)
    folded = np.arange(_LAST + 1, dtype=np.uint32)
    for point in range(0x20000):
        if 0x3400 <= point <= 0x9FFF or 0xAC00 <= point <= 0xD7A3 or 0xD800 <= point <= 0xF8FF:
            continue  # Han, Hangul, surrogates and private use: many, and all of one kind
        char = chr(point)
        if unicodedata.category(char)[0] in "LNM":
            kinds[point] = 1
            folds = unicodedata.normalize("NFKC", char).lower()
            if len(folds) == 1:
                folded[point] = ord(folds)
    kinds[0xAC00:0xD7A4] = 1
    for begin, end in _ALONE:
        row = kinds[begin : end + 1]
        row[:] = 2 if begin in (0x3400, 0x4E00, 0x20000) else np.where(row > 0, 2, 0)
    values = _mixed((folded.astype(np.uint64) + np.uint64(1)) * np.uint64(_STEP))
    values[kinds == 0] = 0
    return values, kinds, folded
