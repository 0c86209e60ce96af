"""The text of .html and .pdf files, as a reader sees it.

HTML is read by Python's own parser: pages found in a person's folders are thousands, not millions, so no library is
asked for. PDF needs pypdf (extra `pdf`).
"""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Final, final

from oriole.errors import MissingExtra, raise_for_os_error
from oriole.text.files import LONGEST_LINE, BrokenFile, Skipped, opened

__all__ = ["html_text", "pdf_pages", "read_html"]

_HIDDEN = frozenset(("head", "script", "style", "noscript", "template", "svg", "math", "iframe", "object", "select"))
_BLOCKS = frozenset(
    "address article aside blockquote body caption dd details dialog div dl dt fieldset figcaption figure footer form "
    "h1 h2 h3 h4 h5 h6 header hr li main nav ol p pre section summary table tbody tfoot thead tr ul".split()
)
_APART = frozenset("article blockquote dl figure h1 h2 h3 h4 h5 h6 ol p pre section table ul".split())
_HAN: Final = "\u3000-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
_WRAPPED = re.compile(f"(?<=[{_HAN}])\\s*\n\\s*(?=[{_HAN}])")
_SPACE = re.compile(r"[ \t\r\n\f]+")
_BLANK_LINES = re.compile(r"\n{3,}")


def read_html(path: Path, skip_bad: Skipped | None = None) -> str:
    """The visible text of a page; `BrokenFile` for one that is no UTF-8 (or what can be told from it), or too long."""
    with opened(path, skip_bad) as file:
        raw = file.read(LONGEST_LINE + 1)
    if len(raw) > LONGEST_LINE:
        raise BrokenFile(f"{path} is a page of more than {LONGEST_LINE >> 20} MB; split it")
    try:
        return html_text(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BrokenFile(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error


def html_text(source: str) -> str:
    """The text that a browser would show: blocks on lines of their own, paragraphs apart, `pre` as it stands."""
    page = _Page()
    page.feed(source)
    page.close()
    text = "\n".join(line.rstrip() for line in "".join(page.out).split("\n"))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


@final
class _Page(HTMLParser):
    """Collects what is visible. A tag that is never closed hides at most what `head` or `script` would."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self._hidden: list[str] = []
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self._hidden.append(tag)
        elif tag == "body":
            self._hidden.clear()
        elif tag == "br":
            self._text("\n")
        elif tag in ("td", "th"):
            self._text("\t" if self._on_line() else "")
        elif tag in _BLOCKS:
            self._break(tag)
            self._pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN:
            if tag in self._hidden:
                del self._hidden[self._hidden.index(tag) :]
        elif tag in _BLOCKS:
            self._pre -= tag == "pre" and self._pre > 0
            self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._pre:
            self._text(data)
            return
        data = _SPACE.sub(" ", _WRAPPED.sub("", data))
        self._text(data if self._on_line() else data.lstrip(" "))

    def _text(self, text: str) -> None:
        if text and not self._hidden:
            self.out.append(text)

    def _break(self, tag: str) -> None:
        if not self._hidden and self.out:
            self.out.append("\n\n" if tag in _APART else "\n" if self._on_line() else "")

    def _on_line(self) -> bool:
        last = next((piece for piece in reversed(self.out) if piece), "\n")
        return not last.endswith(("\n", "\t"))


# --- PDF -------------------------------------------------------------------------------------------------------------


def pdf_pages(path: Path) -> Iterator[str]:
    """The text of each page that has any; `BrokenFile` for a file that is damaged, locked, or only pictures."""
    try:
        import pypdf
    except ImportError as error:
        raise MissingExtra(f"reading {path}", "pdf") from error
    try:
        if path.stat().st_size == 0:
            raise BrokenFile(f"{path} is empty; give a file with data or leave it out")
        with open(path, "rb") as file:
            reader = pypdf.PdfReader(file)
            if reader.is_encrypted and not reader.decrypt(""):
                raise BrokenFile(f"{path} is locked with a password; save it without one")
            empty = True
            for page in reader.pages:
                if (text := page.extract_text()).strip():
                    empty = False
                    yield text
            if empty:
                raise BrokenFile(f"{path} has no text, only pictures of pages; run it through text recognition first")
    except BrokenFile:
        raise
    except OSError as error:
        raise_for_os_error(error, "reading", path)
    except Exception as error:  # a damaged PDF ends in whatever pypdf trips over: KeyError, RecursionError, …
        raise BrokenFile(f"{path} is no valid PDF ({type(error).__name__}: {error}); open and save it again") from error
