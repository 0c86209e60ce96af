"""MediaWiki dumps (`…-pages-articles-multistream.xml.bz2`) as documents, and their entries as questions and answers.

Pages come one after another from the packed file, so memory does not grow with the dump. What is not running text goes:
redirects, disambiguations, talk and file pages; templates, tables, footnotes, categories, and the sections that only
list sources and links. Headings, list items and formulas stay as plain text.
"""

import bz2
import gzip
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import xxhash

from oriole.errors import MissingExtra, raise_for_os_error
from oriole.text.paths import BrokenFile
from oriole.text.records import Doc
from oriole.text.template import Chat, Message

__all__ = ["QUESTIONS", "Entry", "is_dump", "plain", "question", "read_dump", "read_entries", "read_questions"]

LONGEST_MARKUP = 2_000_000
"""Characters of markup after which a page is cut: MediaWiki's own limit is 2 MiB of bytes."""
ANSWER_CHARS = 512
"""Longest answer to an entry's question, as in ChatLM-mini-Chinese (`raw_data_process.py`)."""
SHORTEST_ANSWER = 30
"""Characters below which an entry's beginning says too little to be an answer."""

_OPENERS: dict[str, Any] = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open, ".xml": open}

QUESTIONS: dict[str, tuple[str, ...]] = {
    "zh": (
        "介绍一下{}。", "请简单介绍一下{}。", "你知道{}吗？", "关于{}，你了解多少？", "能给我讲讲{}吗？",
        "我想了解一下{}。", "我对{}不太熟悉，能说说吗？", "请用一小段话说明{}。", "百科里是怎么介绍{}的？",
        "帮我写一段{}的简介。",
    ),
    "en": (
        "Tell me about {}.", "What do you know about {}?", "Please give me a short introduction to {}.",
        "What can you tell me about {}?", "Could you describe {} for me?", "I'd like to know more about {}.",
        "Can you sum up the main facts about {}?", "I'm not familiar with {}. Can you help me out?",
        "How would an encyclopedia introduce {}?", "Write a brief summary about {}.",
    ),
}  # fmt: skip
"""What a person may ask about an entry, whether it is a thing, a place or a person; `{}` is its name."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One article: its title, its text as plain paragraphs, and the wiki's name and language."""

    title: str
    text: str
    source: str = ""
    lang: str = ""


# --- dumps -----------------------------------------------------------------------------------------------------------


def is_dump(path: Path) -> bool:
    """Whether the file is a MediaWiki dump: XML, packed or not, that opens with a `<mediawiki>` element."""
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    if ".xml" not in suffixes or suffixes[-1] not in _OPENERS:
        return False
    try:
        with _OPENERS[suffixes[-1]](path, "rb") as file:
            return b"<mediawiki" in file.read(2048)
    except (OSError, EOFError, lzma.LZMAError):
        return False


def read_dump(path: Path) -> Iterator[Doc]:
    """The articles of a dump, in its order, each with its title as the first line; `read_entries` for the errors."""
    for entry in read_entries(path):
        yield Doc(f"{entry.title}\n\n{entry.text}", entry.lang, entry.source)


def read_questions(path: Path, seed: int = 0) -> Iterator[Chat]:
    """A question about each article of a dump with its opening paragraphs as the answer."""
    for entry in read_entries(path):
        if (chat := question(entry, seed)) is not None:
            yield chat


def read_entries(path: Path) -> Iterator[Entry]:
    """The articles of a dump, in its order.

    `BrokenFile` when the file is cut short or is no dump, `MissingExtra` when the libraries of `[wiki]` are not there.
    """
    try:
        from mwxml import Dump
        from mwxml.element_iterator import ElementIterator
        from mwxml.errors import MalformedXML
    except ImportError as error:
        raise MissingExtra("reading MediaWiki dumps", "wiki") from error
    import xml.etree.ElementTree as tree  # for the name of its error; mwxml parses with it

    try:
        with cast(IO[bytes], _OPENERS[path.suffix.lower()](path, "rb")) as file:
            root = ElementIterator.from_file(file)
            dump = Dump.from_element(root)
            source = dump.site_info.dbname or path.name.partition("-")[0].partition(".")[0]
            lang = next((lang for lang in QUESTIONS if source.startswith(lang)), "")
            for page in dump.pages:
                entry = _entry(page, source, lang)
                del root.element[:-1]  # mwxml empties the pages it has read but leaves them in the tree
                if entry is not None:
                    yield entry
    except (tree.ParseError, MalformedXML, EOFError, AssertionError) as error:
        raise BrokenFile(
            f"{path} is no whole MediaWiki dump ({str(error)[:100] or 'not the expected XML'}); "
            "copy or download it again"
        ) from error
    except lzma.LZMAError as error:
        raise BrokenFile(f"{path} is no valid .xz file; copy or download it again") from error
    except OSError as error:
        if error.errno is None:  # how bz2 and gzip report what they cannot read
            raise BrokenFile(f"{path} is damaged ({error}); copy or download it again") from error
        raise_for_os_error(error, "reading", path)


def _entry(page: Any, source: str, lang: str) -> Entry | None:
    """The article on a page, None where the page is another thing or holds nothing once it is plain."""
    if page.namespace != 0 or page.redirect:
        return None
    markup = ""
    for revision in page:  # a pages-articles dump has one, a history dump the newest last
        if revision.model in (None, "wikitext"):
            markup = revision.text or ""
    if _REDIRECT.match(markup) or _DISAMBIGUATION.search(markup) or _DISAMBIGUATION_TITLE.search(page.title):
        return None
    text = plain(markup[:LONGEST_MARKUP])
    return Entry(page.title, text, source, lang) if text else None


# --- markup ----------------------------------------------------------------------------------------------------------

_REDIRECT = re.compile(r"\s*#\s*(?:redirect|重定向|重新導向)", re.IGNORECASE)
_DISAMBIGUATION = re.compile(
    r"\{\{\s*(?:disambig\w*|hndis|geodis|dab|消歧[义義]?|消歧[义義]页|Disambiguation page)\s*[|}]", re.IGNORECASE
)
_DISAMBIGUATION_TITLE = re.compile(r"[（(](?:disambiguation|消歧[义義])[)）]\s*$")
_LISTS = re.compile(r"^(?:List|Index|Outline|Timeline) of |列表$|年表$|^\d+年?$|^\d+月\d+日$")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f]")
_MAGIC = re.compile(r"__[A-Z]{3,}__")
_VARIANT = re.compile(r"-\{(.*?)\}-", re.DOTALL)
_VARIANTS = ("zh-cn", "zh-hans", "zh", "zh-sg", "zh-hant", "zh-tw", "zh-hk")
_DROPPED_TAGS = {"ref", "references", "gallery", "table", "timeline", "imagemap", "mapframe", "graph", "score", "style",
                 "templatestyles", "script", "indicator", "categorytree", "inputbox", "hiero"}  # fmt: skip
_MATH_TAGS = {"math", "chem", "ce"}
_BULLETS = {"*": "- ", "#": "- ", ";": "", ":": ""}
_MEDIA = re.compile(r"\s*(?:file|image|media|category|文件|檔案|档案|图像|圖像|图片|分类|分類)\s*:", re.IGNORECASE)
_INTERWIKI = re.compile(r"\s*[a-z]{2,3}(?:-[a-z-]+)?\s*:", re.IGNORECASE)
_ENDINGS = {
    "references", "notes", "notes and references", "external links", "see also", "further reading", "bibliography",
    "sources", "citations", "footnotes", "works cited", "gallery",
    "参考文献", "參考文獻", "参考资料", "參考資料", "参考来源", "參考來源", "参考", "外部链接", "外部連結", "外部鏈接",
    "参见", "參見", "另见", "另見", "参看", "參看", "注释", "註釋", "注解", "註解", "脚注", "腳註", "备注", "備註",
    "延伸阅读", "延伸閱讀", "扩展阅读", "擴展閱讀", "相关条目", "相關條目", "图集", "圖集", "资料来源", "資料來源",
}  # fmt: skip
"""Sections that list sources and links: no running text."""
_QUOTES = re.compile("'{2,5}")  # bold and italic
_MARK = "\x02"  # before a heading: two of them and its level; control characters are not allowed in XML
_CODE_SPACE = "\x03"  # a space that must stay
_EMPTY_BRACKETS = re.compile(r"[ \t]?(?:[（(][\s，、；：,;:]*[)）]|\[\s*\])")
_BRACKET_START = re.compile(r"([（(])[\s，、；：,;]+")
_BRACKET_END = re.compile(r"[\s，、；：,;]+([)）])")
_SPACES = re.compile(r"[ \t\u00a0]{2,}")
_SPACE_BEFORE = re.compile(r" +([,.;:!?，。；：！？、）])")
_NO_TEXT = re.compile(r"^[-\s|*#:;]*$")


def plain(markup: str) -> str:
    """Wiki markup as plain paragraphs, headings and `- ` list items; templates, tables and footnotes are gone.

    Text between `-{` and `}-` is the variant for the mainland, else the first. Errors: none, whatever the markup.
    """
    import mwparserfromhell

    markup = _VARIANT.sub(_variant, _MAGIC.sub("", _CONTROL.sub("", markup)))
    out: list[str] = []
    _write(mwparserfromhell.parse(markup, skip_style_tags=True), out)
    return _tidy("".join(out))


def _variant(match: re.Match[str]) -> str:
    """The text of `-{zh-hans:…;zh-hant:…}-`; `-{A|…}-` shows its text, `-{H|…}-` and `-{T|…}-` show nothing."""
    flags, bar, body = match[1].rpartition("|") if "|" in match[1][:12] else ("", "", match[1])
    if bar and set(flags.upper()) & {"H", "T", "-"}:
        return ""
    chosen = {}
    for part in body.split(";"):
        name, colon, text = part.strip().partition(":")
        if colon and name.strip().lower() in _VARIANTS:
            chosen[name.strip().lower()] = text.strip()
    return next((chosen[v] for v in _VARIANTS if v in chosen), body)


def _write(code: Any, out: list[str]) -> None:
    """Append the plain text of parsed markup to `out`."""
    from mwparserfromhell import nodes

    for node in code.nodes:
        match node:
            case nodes.Text():
                out.append(_QUOTES.sub("", str(node.value)))
            case nodes.Heading():
                out.append(f"\n{_MARK * 2}{node.level}")
                _write(node.title, out)
                out.append("\n")
            case nodes.Wikilink():
                _write_link(node, out)
            case nodes.ExternalLink():
                if node.title is not None:
                    _write(node.title, out)
                elif not node.brackets:
                    out.append(str(node.url))
            case nodes.HTMLEntity():
                out.append(_entity(node))
            case nodes.Tag():
                _write_tag(node, out)
            case _:  # templates, their arguments, comments
                pass


def _write_link(node: Any, out: list[str]) -> None:
    title = str(node.title)
    if _MEDIA.match(title) or (node.text is None and _INTERWIKI.match(title)):
        return
    if node.text is not None:
        _write(node.text, out)
    else:
        out.append(title.strip().removeprefix(":"))


def _write_tag(node: Any, out: list[str]) -> None:
    name = str(node.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return
    if node.wiki_markup in _BULLETS:
        if not out or out[-1].endswith("\n"):
            out.append(_BULLETS[node.wiki_markup])
        elif out[-1] != "- ":  # the second mark of a nested item says nothing more
            out.append(" ")
    elif name in ("br", "hr"):
        out.append("\n")
    elif name in _MATH_TAGS:
        out.append(f"${str(node.contents).strip()}$")
    elif name in ("pre", "syntaxhighlight", "source") and node.contents is not None:
        out.append("\n" + str(node.contents).replace(" ", _CODE_SPACE).replace("\t", _CODE_SPACE * 4) + "\n")
    elif node.contents is not None:
        _write(node.contents, out)
        if name in ("p", "div", "li", "blockquote", "dd", "dt"):
            out.append("\n")


def _entity(node: Any) -> str:
    try:
        return _CONTROL.sub("", str(node.normalize()))
    except (ValueError, KeyError, OverflowError):  # no such character
        return ""


def _tidy(text: str) -> str:
    """Lines without what removed markup has left behind, and without the sections that list sources."""
    text = _EMPTY_BRACKETS.sub("", text)
    text = _BRACKET_END.sub(r"\1", _BRACKET_START.sub(r"\1", text))
    lines: list[str] = []
    headings: list[tuple[int, int]] = []  # (place in lines, level) of those with no text below them yet
    skipped = 0  # level of the section that is left out, 0 for none
    for raw in text.split("\n"):
        if raw.startswith(_MARK * 2):
            level, title = int(raw[2]), raw[3:].strip()
            if skipped and level > skipped:
                continue
            skipped = level if title.lower() in _ENDINGS else 0
            while headings and headings[-1][1] >= level:
                del lines[headings.pop()[0] :]
            if not skipped and title:
                headings.append((len(lines), level))
                lines += ["", title, ""]
            continue
        line = _SPACE_BEFORE.sub(r"\1", _SPACES.sub(" ", raw)).strip()
        if skipped or (line and _NO_TEXT.match(line)):
            continue
        if line:
            headings.clear()
        if line or (lines and lines[-1]):
            lines.append(line)
    if headings:
        del lines[headings[0][0] :]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip().replace(_CODE_SPACE, " ")


# --- questions -------------------------------------------------------------------------------------------------------


def question(entry: Entry, seed: int = 0) -> Chat | None:
    """A question about the entry with its first paragraphs as the answer; None where it has too little to say.

    Which of the ten forms is asked follows from the seed and the title alone. Lists, years and days are left out: their
    first lines are no description.
    """
    lang = entry.lang if entry.lang in QUESTIONS else ""
    answer = _opening(entry.text)
    if not lang or len(answer) < SHORTEST_ANSWER or _LISTS.search(entry.title):
        return None
    forms = QUESTIONS[lang]
    form = forms[xxhash.xxh3_64_intdigest(f"{seed}\0{entry.title}".encode("utf-8", "replace")) % len(forms)]
    name = re.sub(r"\s*[（(][^（()）]*[)）]$", "", entry.title) or entry.title
    asked = Message("user", form.replace("{}", name))
    return Chat((asked, Message("assistant", answer)), source=entry.source, lang=lang)


def _opening(text: str) -> str:
    """The whole paragraphs, and failing that the whole sentences, that fit into an answer; "" when none does."""
    paragraphs: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        if "\n" not in paragraph and not re.search(r"[.!?。！？…)）”\"]$", paragraph) and paragraphs:
            break  # a heading: what follows is no longer the introduction
        if size + len(paragraph) > ANSWER_CHARS:
            break
        paragraphs.append(paragraph)
        size += len(paragraph) + 2
    if paragraphs:
        return "\n\n".join(paragraphs)
    head = text[:ANSWER_CHARS]
    end = max((m.end() for m in re.finditer(r"[.!?](?=\s)|[。！？]", head)), default=0)
    return head[:end].strip()
