"""What the quality rules measure of one document: lines, words, and how much of it repeats.

The published rules (Gopher, C4, FineWeb, FineWeb-2) count words and n-grams of words with Python dictionaries; here a
document becomes one array of code points, and words and n-grams become 64-bit numbers:

* A polynomial hash of all prefixes, S[i] = sum of c[j] * B^j for j < i (mod 2^64), gives the hash of any piece by one
  subtraction and one product with B^-start. B is odd, so it has an inverse.
* English words are runs of letters, digits and marks, with `'`, `.` or `,` between two of them (it's, 3.14); every
  other visible character is a word of its own, and so is a run of one such character. Chinese words are jieba's
  (rjieba), as in FineWeb-2.
* An n-gram's number is made of its words' numbers; sorting finds the repeated ones.

Two different pieces get the same number with probability about 2^-64. Everything here is about prose: code, LaTeX and
tables are cut out first, because they repeat and have no sentences.
"""

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from oriole.text.rulescode import prose

__all__ = [
    "ALNUM", "ALPHA", "CLASS", "HAN", "PUNCT", "SPACE", "Measures", "codes", "highest", "measure", "repeats",
    "word_number",
]  # fmt: skip

Numbers = npt.NDArray[np.uint64]
Places = npt.NDArray[np.intp]

# Classes of characters; the order matters: all from ALNUM on are parts of words, all from ALPHA on are letters.
SPACE, PUNCT, ALNUM, ALPHA, HAN = range(5)


def _classes() -> npt.NDArray[np.uint8]:
    table = np.full(0x110000, PUNCT, np.uint8)
    for code in range(0x30000):  # the planes with assigned letters
        c = chr(code)
        if "\u3400" <= c <= "\u9fff" or c == "\u3007" or "\uf900" <= c <= "\ufaff" or code >= 0x20000:
            table[code] = HAN
        elif c.isalpha():
            table[code] = ALPHA
        elif c.isspace() or code < 32 or 127 <= code < 160:
            table[code] = SPACE
        elif c.isalnum() or c == "_" or "\u0300" <= c <= "\u036f":
            table[code] = ALNUM
    table[0x30000:0x33480] = HAN
    return table


CLASS = _classes()
_MARKS = np.zeros(0x110000, np.bool_)
"""Signs that prose and Markdown are written with, however good they are."""
_MARKS[[ord(c) for c in "，。、；：？！…—“”‘’「」『』《》〈〉（）【】·,.;:?!'\"()-*#`_|[]<>/\\"]] = True
_BASE = np.uint64(0x9E3779B97F4A7C15)
_STEP = np.uint64(0xD1B54A32D192ED03)


@lru_cache(maxsize=4)
def _powers(bits: int) -> tuple[Numbers, Numbers]:
    """B^i and B^-i for i < 2^bits."""
    inverse = pow(int(_BASE), -1, 1 << 64)
    out = []
    for base in (_BASE, np.uint64(inverse)):
        powers = np.full(1 << bits, base, np.uint64)
        powers[0] = 1
        out.append(np.cumprod(powers))
    return out[0], out[1]


def codes(text: str) -> npt.NDArray[np.uint32]:
    """The code points of `text`, (characters,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def highest(text: str) -> int:
    """The highest UTF-16 unit of `text`, 0 for none: an upper plane counts as 0xD800 or more. Far faster than a search
    for a class of characters, where a text has none of them."""
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), np.uint16)
    return int(units.max()) if len(units) else 0


def _prefixes(points: npt.NDArray[np.uint32]) -> tuple[Numbers, Numbers]:
    """Prefix hashes (characters + 1,) of code points, and the inverse powers to read them with."""
    powers, inverse = _powers(max(12, len(points).bit_length()))
    sums = np.empty(len(points) + 1, np.uint64)
    sums[0] = 0
    np.cumsum(points * powers[: len(points)], out=sums[1:])
    return sums, inverse


def word_number(word: str) -> int:
    """The number that `Measures.numbers` has for `word`."""
    return int(_prefixes(codes(word))[0][-1])


@lru_cache(maxsize=2)
def measure(text: str, lang: str) -> "Measures":
    """The measures of a document; the rules, called one after another, share them."""
    return Measures(text, lang)


class Measures:
    """Measures of one document, each computed when it is first asked for. Fractions are 0 for an empty document."""

    def __init__(self, text: str, lang: str) -> None:
        self.lang = lang
        self.prose = prose(text)
        """The text without code blocks, LaTeX, table rows and lines of signs."""

    @cached_property
    def lines(self) -> list[str]:
        """The lines of the prose that are not blank, stripped."""
        return [s for line in self.prose.split("\n") if (s := line.strip())]

    @cached_property
    def paragraphs(self) -> list[str]:
        """The pieces of the prose between blank lines."""
        return [p for piece in self.prose.split("\n\n") if (p := piece.strip("\n"))]

    @cached_property
    def points(self) -> npt.NDArray[np.uint32]:
        """The prose as code points, (characters,)."""
        return codes(self.prose)

    @cached_property
    def kinds(self) -> npt.NDArray[np.uint8]:
        """The class of each character, (characters,)."""
        return CLASS.take(self.points)

    @cached_property
    def characters(self) -> list[int]:
        """How many characters of each class there are, by SPACE, PUNCT, ALNUM, ALPHA, HAN."""
        return [int(n) for n in np.bincount(self.kinds, minlength=5)]

    @cached_property
    def _spans(self) -> tuple[Places, Places]:
        if not self.prose:
            return np.zeros(0, np.intp), np.zeros(0, np.intp)
        return self._chinese() if self.lang == "zh" else self._english()

    def _english(self) -> tuple[Places, Places]:
        kinds = np.minimum(self.kinds, ALNUM)
        points = self.points
        if len(points) > 2:
            # An apostrophe, dot or comma between two letters or digits is part of the word.
            middle = points[1:-1]
            joins = (middle == 0x27) | (middle == 0x2E) | (middle == 0x2C) | (middle == 0x2019)
            at = np.flatnonzero(joins) + 1
            at = at[(kinds[at - 1] == ALNUM) & (kinds[at + 1] == ALNUM)]
            kinds[at] = ALNUM
        same = np.where(kinds == PUNCT, points, kinds)  # runs of one sign are one word; a sign's code is above ALNUM
        turn = np.flatnonzero(same[1:] != same[:-1]) + 1
        start = np.concatenate((np.zeros(1, np.intp), turn))
        end = np.concatenate((turn, np.full(1, len(points), np.intp)))
        words = kinds[start] != SPACE
        return start[words], end[words]

    def _chinese(self) -> tuple[Places, Places]:
        import rjieba  # loads its dictionary when it is imported

        pieces = rjieba.cut(self.prose)
        end = np.fromiter(map(len, pieces), np.intp, len(pieces)).cumsum()
        start = np.concatenate((np.zeros(1, np.intp), end[:-1]))
        words = self.kinds[start] != SPACE
        return start[words], end[words]

    @cached_property
    def lengths(self) -> Places:
        """Characters of each word, (words,)."""
        start, end = self._spans
        return end - start

    @cached_property
    def numbers(self) -> Numbers:
        """One number for each word; equal words have equal numbers, (words,)."""
        start, end = self._spans
        sums, inverse = _prefixes(self.points)
        return (sums[end] - sums[start]) * inverse[start]

    @cached_property
    def real_lengths(self) -> Places:
        """Characters of each word that is no mere sign, (words,)."""
        out: Places = self.lengths[self.kinds[self._spans[0]] != PUNCT]
        return out

    @cached_property
    def num_words(self) -> int:
        """Words, signs included."""
        return len(self._spans[0])

    @cached_property
    def alpha_words(self) -> float:
        """Share of the words that have a letter: in Chinese of jieba's words that are no mark of prose or Markdown,
        else of what stands between blanks."""
        if self.lang == "zh":
            start = self._spans[0]
            marks = int(np.count_nonzero(_MARKS[self.points[start]]))
            if len(start) == marks:
                return 0.0
            return int(np.count_nonzero(np.maximum.reduceat(self.kinds, start) >= ALPHA)) / (len(start) - marks)
        blank = self.kinds == SPACE
        start = np.flatnonzero(blank[:-1] & ~blank[1:]) + 1
        if len(blank) and not blank[0]:
            start = np.concatenate((np.zeros(1, np.intp), start))
        if not len(start):
            return 0.0
        return int(np.count_nonzero(np.maximum.reduceat(self.kinds, start) >= ALPHA)) / len(start)

    # --- repetition ----------------------------------------------------------------------------------------------

    def ngrams(self, n: int) -> Numbers:
        """One number for each n-gram of words, (max(0, words - n + 1),)."""
        if n == 1:
            return self.numbers
        cache = self.__dict__.setdefault("_ngrams", {})
        if n not in cache:
            cache[n] = self.ngrams(n - 1)[:-1] * _STEP + self.numbers[n - 1 :]
        out: Numbers = cache[n]
        return out

    def top_ngram(self, n: int) -> tuple[float, int]:
        """The most frequent n-gram of words: its share of the prose's characters, blanks between its words counted
        (Gopher, table A1), and how often it occurs."""
        grams = self.ngrams(n)
        if len(grams) < 2:
            return 0.0, 1
        ordered = np.sort(grams)
        edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        counts = np.diff(edges, prepend=0, append=len(ordered))
        most = int(counts.max())
        if most < 2:
            return 0.0, 1
        tops = ordered[np.concatenate(([0], edges))[counts == most]]
        places = grams == tops[0] if len(tops) == 1 else np.isin(grams, tops)
        first = int(places.argmax())  # of several the one that comes first
        length = int(self.lengths[first : first + n].sum()) + n - 1
        return length * most / len(self.prose), most

    def longest_ngram(self, n: int) -> int:
        """Characters of the longest n-gram of words, blanks between its words counted."""
        ends = np.concatenate(([0], self.lengths.cumsum()))
        return int((ends[n:] - ends[:-n]).max()) + n - 1 if self.num_words >= n else 0

    def dup_ngram_bound(self, n: int) -> float:
        """Share of the prose's characters under an n-gram of words that occurred before.

        Never less than `dup_ngram` of the same n or a greater one.
        """
        grams = self.ngrams(n)
        count = len(grams)
        if count < 2:
            return 0.0
        bits = np.uint64(count.bit_length())
        ordered = np.sort((grams >> bits << bits) | np.arange(count, dtype=np.uint64))  # the place in the low bits
        again = ordered[1:][(ordered[1:] >> bits) == (ordered[:-1] >> bits)]
        if not len(again):
            return 0.0
        place = (again & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.intp)
        covered = np.zeros(self.num_words + 1, np.int8)
        covered[place] = 1
        covered[place + n] -= 1
        return int(self.lengths[covered[:-1].cumsum(dtype=np.int32) > 0].sum()) / len(self.prose)

    def dup_ngram(self, n: int) -> float:
        """Share of the prose's characters in n-grams of words that occurred before, counted without overlap.

        As datatrove counts it for Gopher's rule: from left to right, a repeated n-gram is counted and stepped over.
        """
        seen: set[int] = set()
        grams = self.ngrams(n).tolist()
        ends = np.concatenate(([0], self.lengths.cumsum())).tolist()
        chars = at = 0
        while at < len(grams):
            if grams[at] in seen:
                chars += ends[at + n] - ends[at]
                at += n
            else:
                seen.add(grams[at])
                at += 1
        return chars / len(self.prose) if chars else 0.0

    def repeated_characters(self, n: int) -> float:
        """Share of the n-grams of characters (lower case, without blanks) that occur more than once (EvalWeb)."""
        sums, inverse = _prefixes(codes(re.sub("[ \n\t]", "", self.prose.lower())))
        count = len(sums) - n
        if count < 2:
            return 0.0
        ordered = np.sort((sums[n:] - sums[:-n]) * inverse[:count])
        same = ordered[1:] == ordered[:-1]
        once = np.concatenate(([True], ~same)) & np.concatenate((~same, [True]))
        return 1.0 - int(np.count_nonzero(once)) / count


def repeats(items: Sequence[str]) -> tuple[int, int]:
    """How many of the items occurred before, and their characters."""
    seen = set(items)
    if len(seen) == len(items):
        return 0, 0
    return len(items) - len(seen), sum(map(len, items)) - sum(map(len, seen))
