"""Rules that drop documents: the published quality rules for English and Chinese, one function each.

They measure prose: code blocks are left out (`text.rulesmeasure`), and a document that is mostly code is none of their
business (`prose_share` of `RulesConfig`). Each function takes the document's measures and its threshold and says why
the document must go, or "" where it may stay.

Sources. Gopher: Rae et al. 2021, arXiv:2112.11446, table A1 and section A.1.1. C4: Raffel et al. 2020, JMLR 21/140.
FineWeb: Penedo et al. 2024, arXiv:2406.17557, and datatrove's filters of those names. FineWeb-2: Penedo et al. 2025,
arXiv:2506.20920, configs/cmn_Hani.yml. EvalWeb: Chen et al. 2023 (ChineseWebText), arXiv:2311.01149, preprocess.py.
"""

import re
from collections.abc import Sequence

import numpy as np

from oriole.text.rulesmeasure import HAN, Measures, repeats, word_number

__all__ = [
    "alpha_words", "bullets", "c4_curly", "c4_sentences", "dup_characters", "dup_line_characters", "dup_lines",
    "dup_ngrams", "dup_paragraph_characters", "dup_paragraphs", "ellipses", "evalweb_han", "evalweb_length",
    "evalweb_lines", "evalweb_repeats", "evalweb_words", "line_ends", "new_lines", "num_words", "short_lines",
    "stop_words", "symbols", "top_ngrams", "word_length",
]  # fmt: skip


def _over(value: float, most: float, what: str) -> str:
    return f"{what} {value:.3f} > {most:g}" if value > most else ""


def _under(value: float, least: float, what: str) -> str:
    return f"{what} {value:.3f} < {least:g}" if value < least else ""


# --- Gopher: quality -------------------------------------------------------------------------------------------------


def num_words(m: Measures, least: int, most: int) -> str:
    """Words that are no mere signs: Gopher 50 to 100,000."""
    count = len(m.real_lengths)
    return f"{count} words" if count < least or (most and count > most) else ""


def word_length(m: Measures, least: float, most: float) -> str:
    """Mean characters of the words that are no mere signs: Gopher 3 to 10, FineWeb-2 for Chinese 1 to 5."""
    real = m.real_lengths
    if not len(real):
        return "no words"
    mean = float(real.mean())
    return f"mean word of {mean:.2f} characters" if mean < least or (most and mean > most) else ""


def symbols(m: Measures, most: float) -> str:
    """`#` to words and ellipses to words: Gopher at most 0.1. Marks of Markdown headings do not count."""
    text, words = m.prose, max(1, m.num_words)
    hashes = text.count("#")
    if hashes > most * words:
        hashes -= sum(len(heading) for heading in re.findall(r"(?m)^#{1,6}(?=[ \t])", text))
    return _over(hashes / words, most, "# to words") or _over(
        (text.count("...") + text.count("…")) / words, most, "ellipses to words"
    )


def bullets(m: Measures, most: float) -> str:
    """Lines that begin with a bullet: Gopher at most 0.9."""
    return _over(sum(s.startswith(("•", "-")) for s in m.lines) / max(1, len(m.lines)), most, "bullet lines")


def ellipses(m: Measures, most: float) -> str:
    """Lines that end with an ellipsis: Gopher at most 0.3."""
    return _over(sum(s.endswith(("...", "…")) for s in m.lines) / max(1, len(m.lines)), most, "lines ending in …")


def alpha_words(m: Measures, least: float) -> str:
    """Words with a letter: Gopher at least 0.8 of the words between blanks, FineWeb-2 for Chinese 0.735 of jieba's.

    FineWeb-2 counts every `，` as a word without a letter; that drops half of all verse, classical prose and manuals
    here, so the signs of prose and Markdown are not counted.
    """
    return _under(m.alpha_words, least, "words with a letter")


def stop_words(m: Measures, words: Sequence[str], least: int) -> str:
    """Different stop words in the document: at least 2, of Gopher's eight or FineWeb-2's list for Chinese.

    Chinese verse hides them in longer words (行人, 夜半): twice as many of the characters, wherever they stand,
    do as well.
    """
    found = 0
    for word in words:
        if bool((m.numbers == np.uint64(_number(word))).any()):
            found += 1
            if found >= least:
                return ""
    if m.lang == "zh" and sum(word in m.prose for word in words) >= 2 * least:
        return ""
    return f"{found} of the stop words" if found < least else ""


_numbers: dict[str, int] = {}


def _number(word: str) -> int:
    if word not in _numbers:
        _numbers[word] = word_number(word)
    return _numbers[word]


# --- Gopher: repetition ----------------------------------------------------------------------------------------------


def dup_lines(m: Measures, most: float) -> str:
    """Lines that occurred before: Gopher at most 0.30 of the lines, FineWeb-2 for Chinese 0.287."""
    return _over(repeats(m.lines)[0] / max(1, len(m.lines)), most, "repeated lines")


def dup_line_characters(m: Measures, most: float) -> str:
    """Characters in lines that occurred before: Gopher at most 0.20."""
    return _over(repeats(m.lines)[1] / max(1, len(m.prose)), most, "characters in repeated lines")


def dup_paragraphs(m: Measures, most: float) -> str:
    """Paragraphs that occurred before: Gopher at most 0.30."""
    return _over(repeats(m.paragraphs)[0] / max(1, len(m.paragraphs)), most, "repeated paragraphs")


def dup_paragraph_characters(m: Measures, most: float) -> str:
    """Characters in paragraphs that occurred before: Gopher at most 0.20."""
    return _over(repeats(m.paragraphs)[1] / max(1, len(m.prose)), most, "characters in repeated paragraphs")


def top_ngrams(m: Measures, most: Sequence[float]) -> str:
    """Characters in the most frequent 2-, 3-, 4-gram of words: Gopher .20 .18 .16, FineWeb-2 .256 .201 .171."""
    often = len(m.prose)
    for n, limit in enumerate(most, 2):
        # No n-gram is more frequent than its beginning, nor longer than the longest.
        if often * m.longest_ngram(n) > limit * len(m.prose):
            share, often = m.top_ngram(n)
            if why := _over(share, limit, f"most frequent {n}-gram"):
                return why
    return ""


def dup_ngrams(m: Measures, most: Sequence[float], votes: int = 1) -> str:
    """Characters in repeated 5- to 10-grams of words: Gopher .15 … .10, FineWeb-2 for Chinese .198 … .127.

    A document goes when it is over at least `votes` of the limits (published: 1). Statutes and manuals repeat terms of
    five or six words, but seldom passages of ten: with 1 a quarter of all Chinese laws would go.
    """
    # What a longer n-gram covers a shorter one covers too, so one bound nearly always settles all of them.
    votes = min(votes, len(most))
    if not votes or m.dup_ngram_bound(5 + votes - 1) <= min(most):
        return ""
    over = ""
    for n, limit in reversed([*enumerate(most, 5)]):
        if m.dup_ngram_bound(n) > limit and (why := _over(m.dup_ngram(n), limit, f"repeated {n}-grams")):
            votes, over = votes - 1, over or why
            if not votes:
                return over
    return ""


# --- C4 and FineWeb --------------------------------------------------------------------------------------------------

_SENTENCE = re.compile(r"[.!?。！？][\"'”’」』)\]）]*(?=\s|\Z|[\u2e80-\uffef])|[.!?。！？][”」』]")


def c4_sentences(m: Measures, least: int) -> str:
    """Sentences: C4 at least 5."""
    count = 0
    for _ in _SENTENCE.finditer(m.prose):
        count += 1
        if count >= least:
            return ""
    return f"{count} sentences" if count < least else ""


def c4_curly(m: Measures) -> str:
    """A curly bracket outside code blocks: C4 drops the document."""
    return "a curly bracket" if "{" in m.prose else ""


_ENDS = tuple(".!?。！？…．｡﹒﹖﹗‼⁇⁈⁉\"'”’」』）)；;：:")


def line_ends(m: Measures, least: float, ends: tuple[str, ...] = _ENDS) -> str:
    """Lines that end in punctuation: FineWeb at least 0.12, FineWeb-2 for Chinese 0.106.

    A Chinese line with a comma inside counts as well: editions of verse often leave out the stops at line ends, and it
    is menus and lists of links, which have neither, that the rule is after.
    """
    lines = m.lines
    good = sum(s.endswith(ends) for s in lines)
    if m.lang == "zh" and good < least * len(lines):
        good = sum(s.endswith(ends) or "，" in s for s in lines)
    return _under(good / max(1, len(lines)), least, "lines ending in punctuation")


def short_lines(m: Measures, most: float, length: int = 30) -> str:
    """Lines of at most 30 characters: FineWeb at most 0.67."""
    return _over(sum(len(s) <= length for s in m.lines) / max(1, len(m.lines)), most, "short lines")


def dup_characters(m: Measures, most: float) -> str:
    """Characters in lines that occurred before, of those that are no line breaks: FineWeb 0.01, FineWeb-2 0.1."""
    total = len(m.prose) - m.prose.count("\n")
    return _over(repeats(m.lines)[1] / max(1, total), most, "characters in repeated lines")


def new_lines(m: Measures, most: float) -> str:
    """Lines to words: FineWeb at most 0.3, FineWeb-2 for Chinese 0.178.

    Blank lines, which its texts lack, do not count, nor do Chinese lines with a comma or stop: verse has few words on a
    line, and the rule is after lists.
    """
    lines = len(m.lines) - 1
    if m.lang == "zh" and lines > most * m.num_words:
        lines = sum(not _CLAUSE.search(s) for s in m.lines)
    return _over(lines / max(1, m.num_words), most, "line breaks to words")


_CLAUSE = re.compile("[，。！？；]")


# --- EvalWeb ---------------------------------------------------------------------------------------------------------


def evalweb_length(m: Measures, least: int) -> str:
    """Characters: EvalWeb more than 200."""
    return f"{len(m.prose)} characters" if len(m.prose) <= least else ""


def evalweb_lines(m: Measures, least: float) -> str:
    """Mean characters of a line: EvalWeb at least 10."""
    return _under(len(m.prose) / max(1, len(m.lines)), least, "mean characters of a line")


def evalweb_han(m: Measures, least: float) -> str:
    """Han characters: EvalWeb at least 0.30 of all."""
    return _under(m.characters[HAN] / max(1, len(m.prose)), least, "Han share")


def evalweb_repeats(m: Measures, most: float) -> str:
    """13-grams of characters that occur more than once: EvalWeb at most 0.5 of them."""
    return _over(m.repeated_characters(13), most, "repeated 13-grams of characters")


def evalweb_words(m: Measures, words: re.Pattern[str], most: float) -> str:
    """Different words of a list of unwanted ones, per line: EvalWeb at most 0.5."""
    found = len(set(words.findall(m.prose)))
    return _over(found / (m.prose.count("\n") + 1), most, "unwanted words per line") if found else ""
