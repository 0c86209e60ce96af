"""What a rule that mends prose must not touch: code, LaTeX and addresses inside a document.

`replace` applies a regular expression everywhere else. A fenced block without an end reaches to the end of the
document, as in CommonMark (section 4.5), so the search is linear in the length of the text.
"""

import re
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache

__all__ = ["Spans", "code", "fences", "inside", "prose", "protected", "replace", "without_code"]

Spans = tuple[list[int], list[int]]
"""Starts and ends of pieces of a text, in order, without overlap."""

_FENCE = r"^[ \t]{0,12}(?P<f>```+|~~~+)[^\n`]*$(?:(?s:.*?)^[ \t]*(?P=f)[`~]*[ \t]*$|(?s:.*)\Z)"
# Four blanks or a tab before something that is no Chinese: in Chinese books a paragraph may begin with four blanks.
_INDENTED = r"^(?:\t| {4})[ \t]*[^\s\u2010-\u201f\u2e80-\U0003ffff][^\n]*$"
_INLINE = r"`[^`\n]+`"
_MATH = r"\$\$[^$]+\$\$|\$[^$\n]+\$|\\\([^\n]+?\\\)|\\\[(?s:.{1,2000}?)\\\]"
_ADDRESS = r"[a-zA-Z][a-zA-Z+.-]{1,9}://[^\s<>\"'`\u2e80-\U0003ffff]+"
_NONE: Spans = ([], [])


def _has_fence(text: str) -> bool:
    return "```" in text or "~~~" in text


def _has_indent(text: str) -> bool:
    return "\n    " in text or "\n\t" in text or text.startswith(("    ", "\t"))


@lru_cache(maxsize=16)
def _pattern(fence: bool, indented: bool, inline: bool, math: bool, address: bool) -> re.Pattern[str]:
    parts = ((fence, _FENCE), (indented, _INDENTED), (inline, _INLINE), (math, _MATH), (address, _ADDRESS))
    return re.compile("|".join(part for on, part in parts if on), re.MULTILINE)


def _spans(text: str, pattern: re.Pattern[str]) -> Spans:
    spans = [m.span() for m in pattern.finditer(text)]
    return [s for s, _ in spans], [e for _, e in spans]


@lru_cache(maxsize=2)
def protected(text: str) -> Spans:
    """The pieces of code (fenced, indented, inline), LaTeX and addresses in `text`."""
    found = (_has_fence(text), _has_indent(text), "`" in text, "$" in text or "\\" in text, "://" in text)
    return _spans(text, _pattern(*found)) if any(found) else _NONE


def fences(text: str) -> Spans:
    """The fenced code blocks of `text`."""
    return _spans(text, _pattern(True, False, False, False, False)) if _has_fence(text) else _NONE


def code(text: str) -> Spans:
    """The pieces of code of `text`: fenced, indented, inline."""
    found = (_has_fence(text), _has_indent(text), "`" in text, False, False)
    return _spans(text, _pattern(*found)) if any(found) else _NONE


def inside(spans: Spans, at: int) -> bool:
    """Whether a place lies in one of the pieces."""
    starts, ends = spans
    n = bisect_right(starts, at) - 1
    return n >= 0 and at < ends[n]


def replace(pattern: re.Pattern[str], with_: Callable[[re.Match[str]], str], text: str) -> str:
    """`text` with every hit of `pattern` that does not begin in a protected piece put through `with_`."""
    spans = protected(text)
    if not spans[0]:
        return pattern.sub(with_, text)
    return pattern.sub(lambda m: m[0] if inside(spans, m.start()) else with_(m), text)


def without_code(text: str) -> str:
    """`text` without its fenced and indented code."""
    fence, indented = _has_fence(text), _has_indent(text)
    return _pattern(fence, indented, False, False, False).sub("", text) if fence or indented else text


_ROW = re.compile(r"^[ \t]*\|[^\n]*$", re.MULTILINE)
_RULE = re.compile(r"^[^\w\n]{3,}$", re.MULTILINE)
_RULES = ("---", "===", "***", "* *", "___", "~~~", "- -", "...")


def prose(text: str) -> str:
    """`text` without code blocks, LaTeX, table rows and lines that are only signs: what rules about prose measure."""
    found = (_has_fence(text), _has_indent(text), False, "$" in text or "\\" in text, False)
    if any(found):
        text = _pattern(*found).sub("", text)
    if "\n|" in text or "\n |" in text or text.startswith("|"):
        text = _ROW.sub("", text)
    if any(rule in text for rule in _RULES):
        text = _RULE.sub("", text)
    return text.strip()
