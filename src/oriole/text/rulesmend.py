"""Rules that mend characters: markup remains, width, script, punctuation. Each is a pure function of text.

All of them leave code, LaTeX and addresses alone (`text.rulescode`), are idempotent, and return the very same object
when there is nothing to do. What they may put in the place of what they remove is listed in each docstring; nothing
else is ever added.
"""

import html
import re
from functools import lru_cache
from typing import Any

from oriole.text.clean import normalise
from oriole.text.rulescode import replace
from oriole.text.rulesmeasure import CLASS, HAN, codes, highest

__all__ = ["full_stop", "markup", "punctuation", "simplify", "tidy", "width"]

_ROUNDS = 8

# --- markup ----------------------------------------------------------------------------------------------------------

_BLOCK = (
    "address|article|aside|blockquote|br|center|dd|div|dl|dt|fieldset|figcaption|figure|footer|form|h[1-6]|header|hr|li"
    "|main|nav|ol|p|pre|section|table|tbody|tfoot|thead|tr|ul"
)
_INLINE = "a|abbr|b|big|cite|code|em|font|i|img|ins|kbd|mark|s|small|span|strike|strong|sub|sup|td|th|tt|u|var"
_BLOCK_TAGS = frozenset(_BLOCK.replace("h[1-6]", "h1|h2|h3|h4|h5|h6").split("|"))
_SURE = _BLOCK_TAGS - {"p"} | {"font", "img", "span", "td", "th"}  # names that no program text has in such brackets
_ATTRIBUTE = r"""[ \t]+[a-zA-Z_:][\w:.-]*(?:[ \t]*=[ \t]*(?:"[^"\n<>]*"|'[^'\n<>]*'|[^\s"'=<>`]+))?"""
_TAG = rf"(?P<close>/?)(?P<tag>{_BLOCK}|{_INLINE})(?P<attributes>(?:{_ATTRIBUTE})*)[ \t]*/?>"
_WHOLE = r"!--(?s:.{0,20000}?)-->|(?P<kind>script|style)\b[^>\n]{0,500}>(?s:.{0,20000}?)</(?P=kind)>"
_ENTITY = r"(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});"
# It begins with a class of characters, so that the search may skip to the next of them.
_MARKUP = re.compile(f"[<&](?:(?<=<)(?i:{_WHOLE}|{_TAG})|(?<=&)(?P<entity>{_ENTITY}))")
_BARE = rf"</?(?i:{_BLOCK}|{_INLINE})[ ]?/?>"
_AND = r"[ ]?(?:,|、|/|and|or|和|或|与)?[ ]?"
_TAG_WORDS = "标签|標籤|元素|标记|標記"
# What prose about HTML says behind the name of a tag, or before it; mail addresses are masked later and say nothing.
_TAG_BEHIND = re.compile(
    rf"(?:{_AND}{_BARE}){{0,8}}(?:[ ](?:tags?|elements?|attributes?)\b(?![\w.%+-]*@)|[ ]?(?:{_TAG_WORDS}))"
)
_TAG_BEFORE = re.compile(
    rf"(?:(?:^|[\s(（\"“])(?:[Aa]n?|[Tt]he|tags?|elements?)[ ]|(?:{_TAG_WORDS})[ ：:]{{0,2}})(?:{_BARE}{_AND}){{0,8}}\Z"
)
_NEAR = 120
_MAYBE_TAG = re.compile("<[/!a-zA-Z]")
_MAYBE_ENTITY = re.compile("&[#a-zA-Z]")
# An entity that would become markup, of HTML, Markdown or a wiki, stays as it is written.
_SIGNIFICANT = frozenset("<>&[]{}'`$\\*#~|=_")
_AFTER_LESS = re.compile(r"[/!a-zA-Z<]|&#?\w+;")  # < begins the mark of a mail address, which was a letter before
_AFTER_AMP = re.compile(r"#?\w+;")


def markup(text: str, html: bool = True, wiki: bool = True) -> str:
    """The text without remains of HTML and of wiki pages.

    HTML: comments, scripts, style sheets and the tags of text pages go, a block's tag becoming a line break and a
    cell's a blank; entities become their character, except those that would then be markup themselves (`&lt;br&gt;`
    stays, `a &lt; b` becomes `a < b`). A tag of one or few letters that is no pair on its line, as in `list<b>`, stays,
    and so does anything whose name is not HTML's (`<path>`, `#include <vector>`), and a tag that prose speaks of (`the
    <p> tag`, `a <div>`, `<table>标签`).

    Wiki: in a document that shows at least two kinds of wiki markup, `[[target|text]]` becomes `text`, bold and italic
    marks, templates, references and tables go. `[edit]`, `[citation needed]` and their Chinese forms go anywhere.

    Repeated until nothing changes, at most eight times.
    """
    for _ in range(_ROUNDS):
        before = text
        if html and (_MAYBE_TAG.search(text) or _MAYBE_ENTITY.search(text)):
            text = replace(_MARKUP, _html, text)
        if wiki:
            text = _wiki(text)
        if text == before:
            break
    return text


def _html(m: re.Match[str]) -> str:
    if m["entity"]:
        return _entity(m)
    if not m["tag"]:
        return ""
    tag = m["tag"].lower()
    start = m.string.rfind("\n", 0, m.start()) + 1
    if tag not in _SURE and not (m["attributes"] and not m["close"]):
        line = m.string[start : (m.string.find("\n", m.end()) + 1 or None)].lower()
        paired = (f"<{tag}>" in line or f"<{tag} " in line) if m["close"] else f"</{tag}>" in line
        if not paired and not (tag == "p" and not m.string[start : m.start()].strip()):
            return m[0]
    if not m["attributes"] and _spoken_of(m, tag, start):
        return m[0]
    if tag in ("td", "th"):
        return " "
    if tag in _BLOCK_TAGS:
        return " " if m.string.startswith("|", start) else "\n"  # a line of a Markdown table stays one
    return ""


def _spoken_of(m: re.Match[str], tag: str, start: int) -> bool:
    """Whether the text names the tag (that of the line from `start` on) instead of using it."""
    text: str = m.string
    before = text[max(start, m.start() - _NEAR) : m.start()]
    if before.rstrip(" ")[-1:] not in ("", ">") and _TAG_BEHIND.match(text, m.end(), m.end() + _NEAR):
        return True
    after = text[m.end() : m.end() + _NEAR].partition("\n")[0].lower()
    word = after[:1].isalnum() and after[:1] < "\u2e80"
    ends = not before.endswith(" ") if m["close"] else f"</{tag}" in after
    if word or ends or tag in ("br", "hr"):
        return False
    return _TAG_BEFORE.search(before) is not None


def _entity(m: re.Match[str]) -> str:
    name: str = m[0]
    out = html.unescape(name)
    if out == "\xa0":
        return " "
    if len(out) != 1 or ord(out) < 32 or 127 <= ord(out) < 160:
        return name
    after = m.string[m.end() : m.end() + 40]
    if out == "<":
        return name if _AFTER_LESS.match(after) else out
    if out == "&":
        return name if _AFTER_AMP.match(after) else out
    if out == ">":
        return out if m.start() and m.string[m.start() - 1] in " 0123456789" else name
    if out == "'":
        return name if m.string[m.start() - 1 : m.start()] == "'" or after[:1] in ("'", "&") else out
    return name if out in _SIGNIFICANT or (out.isspace() and out != "\u3000") else out


_LINK = r"(?<![A-Za-z0-9_)\]\[])\[\[(?P<target>[^\[\]{}|<>\n\"'`$=;,]{1,200})(?:\|(?P<text>[^\[\]{}|<>\n]{0,300}))?\]\]"
_FILE = r"\[\[(?i:file|image|category|文件|檔案|图像|圖像|分类|分類):[^\[\]]{1,1000}\]\]"
_REFERENCE = r"(?i:<ref\b[^<>]{0,300}/>|<ref\b[^<>/]{0,300}>(?s:.{0,3000}?)</ref>)"
_TEMPLATE = r"\{\{(?!\{)[^{}]{0,5000}\}\}"
_TABLE = r"^\{\|(?s:.{0,100000}?)^\|\}[ \t]*$"
_QUOTES = r"'{5}|'{2,3}"
_EDIT = r"\[(?:edit|citation needed|clarification needed|编辑|編輯|来源请求|來源請求|原創研究\?|原创研究\?)\]"
_WIKI = re.compile(f"(?m)(?P<file>{_FILE})|(?P<link>{_LINK})|{_REFERENCE}|{_TEMPLATE}|{_TABLE}|{_QUOTES}|{_EDIT}")
_EDITS = re.compile(_EDIT)
_SIGNS = (
    ("[[", re.compile(r"\[\[[^\s\[\]\"'`$=;,][^\[\]{}<>\n\"'`$=;]{0,300}\]\]")),
    ("''", re.compile(r"'''[^'\n]{1,200}'''|''[^'\n]{1,200}''")),
    ("{{", re.compile(r"^\{\{(?![{%\-# ])[^{}]{1,5000}\}\}", re.MULTILINE)),
    ("==", re.compile(r"^(={2,4})[^=\n]{1,100}\1[ \t]*$", re.MULTILINE)),
    ("<ref", re.compile(r"<ref\b[^<>]{0,300}>")),
    ("{|", re.compile(r"^\{\|", re.MULTILINE)),
)


def _wiki(text: str) -> str:
    if ("[[" in text or "''" in text or "{{" in text) and _is_wiki(text):
        return replace(_WIKI, _plain, text)
    return replace(_EDITS, lambda m: "", text) if "[" in text and _EDITS.search(text) else text


def _is_wiki(text: str) -> bool:
    """Whether a text shows at least two kinds of wiki markup."""
    return sum(sign in text and pattern.search(text) is not None for sign, pattern in _SIGNS) >= 2


def _plain(m: re.Match[str]) -> str:
    """A link's text, or its target where it has none; nothing for all else."""
    if not m["link"]:
        return ""
    target: str = m["target"]
    return target if m["text"] is None else m["text"]


# --- width -----------------------------------------------------------------------------------------------------------

_SAME: dict[str, str] = {
    chr(c): chr(c - 0xFEE0) for c in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B), 0xFF05)
}
_LIGATURES = {
    "\ufb00": "ff",
    "\ufb01": "fi",
    "\ufb02": "fl",
    "\ufb03": "ffi",
    "\ufb04": "ffl",
    "\ufb05": "st",
    "\ufb06": "st",
}
_SIGNS_EN = {c: chr(ord(c) - 0xFEE0) for c in "，．：；！？（）＋－／"}
_EN = _SAME | _LIGATURES | _SIGNS_EN | {"\u3000": " ", "\xa0": " "}
_ASIAN = re.compile("[\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff]")
_LETTERS = re.compile(r"[^\W_]")
_LETTERS_BACK = re.compile(r"[^\W_](?=[\W_]*\Z)")
_PAIR = re.compile(r"（[^（）\n]{0,200}）")


def _radicals() -> dict[str, str]:
    import unicodedata

    out = {chr(c): unicodedata.normalize("NFKC", chr(c)) for c in range(0x2F00, 0x2FD6)}
    return out | {"\u2e9f": "母", "\u2ef3": "龟", "｡": "。", "｢": "「", "｣": "」", "､": "、"}


_ZH = _SAME | _LIGATURES | _radicals() | {"\xa0": " "}
_WIDTHS = {
    "zh": re.compile("(?m)^\u3000[\u3000 \t\xa0]*|\u3000+|[" + "".join(_ZH) + "]"),
    "en": re.compile("[" + "".join(_EN) + "]"),
}
_WIDE = {"zh": re.compile("[\u3000" + "".join(_ZH) + "]"), "en": _WIDTHS["en"]}
_TABLES = {"zh": _ZH, "en": _EN}


def width(text: str, lang: str) -> str:
    """Unicode's compatibility forms that are only another width, as NFKC writes them; by language.

    Both: full-width letters, digits and `％` become ASCII, ligatures their letters, the no-break space a blank.
    English: also the ideographic space, and full-width punctuation but for what stands beside a Chinese, Japanese or
    Korean letter (in a quotation, or a sentence of that language); brackets stay in pairs. Chinese: full-width
    punctuation stays; an ideographic space that indents a line goes, others become one blank; radicals and half-width
    `｡､｢｣` become the usual characters.
    The rest of NFKC is left out on purpose: it would turn x² into x2, ½ into 1⁄2, ① into 1, … into three dots.
    """
    if lang not in _TABLES or text.isascii():
        return text
    if "\xa0" not in text and highest(text) < 0x2E80:  # the other wide forms begin there
        return text
    if not _WIDE[lang].search(text):
        return text
    table = _TABLES[lang]

    asian = lang == "en" and _ASIAN.search(text) is not None

    def one(m: re.Match[str]) -> str:
        hit = m[0]
        if hit[0] == "\u3000" and lang == "zh":
            return "" if m.start() == 0 or m.string[m.start() - 1] == "\n" else " "
        return hit if hit in _SIGNS_EN and asian and _in_asian(m.string, m.start()) else table[hit]

    return replace(_WIDTHS[lang], one, text)


def _in_asian(text: str, at: int) -> bool:
    """Whether the letter before the sign or the one behind it is Asian; of a bracket or those of its other half."""
    if _beside_asian(text, at):
        return True
    match text[at]:
        case "（":
            pair = _PAIR.match(text, at)
            return pair is not None and _beside_asian(text, pair.end() - 1)
        case "）":
            begin = max(text.rfind(sign, max(0, at - 201), at) for sign in "（）\n")
            return begin >= 0 and text[begin] == "（" and _beside_asian(text, begin)
        case _:
            return False


def _beside_asian(text: str, at: int) -> bool:
    before = text[max(0, at - _BESIDE) : at].rpartition("\n")[2]
    after = text[at + 1 : at + 1 + _BESIDE].partition("\n")[0]
    letters = (_LETTERS_BACK.search(before), _LETTERS.search(after))
    return any(letter is not None and _ASIAN.match(letter[0]) is not None for letter in letters)


_BESIDE = 16
"""Characters in which the next letter is looked for."""


# --- script ----------------------------------------------------------------------------------------------------------

_TRADITIONAL_SHARE = 0.02
_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")


@lru_cache(maxsize=1)
def _opencc() -> tuple[Any, re.Pattern[str]]:
    """The converter, and the characters that it changes when they stand alone."""
    from opencc import OpenCC

    converter = OpenCC("t2s")
    han = [chr(c) for c in (*range(0x3400, 0x4DC0), *range(0x4E00, 0xA000))]
    changed = [c for c, d in zip(han, converter.convert("\n".join(han)).split("\n"), strict=True) if c != d]
    return converter, re.compile("[" + "".join(changed) + "]")


def simplify(text: str, lang: str) -> str:
    """Traditional Chinese in simplified characters (OpenCC's t2s, phrases first: 頭髮 發現 乾隆 -> 头发 发现 乾隆).

    Only of a Chinese document in which at least one Han character in fifty is traditional: a simplified one keeps its
    乾卦 and the names it quotes. Lines with kana are Japanese and stay. Chinese C4 converts in the same way; EvalWeb
    drops such documents instead. Each line is converted until it no longer changes, once nearly always.
    """
    if lang != "zh":
        return text
    converter, traditional = _opencc()
    if not traditional.search(text):
        return text
    count = len(traditional.findall(text))
    if count < _TRADITIONAL_SHARE * int((CLASS.take(codes(text)) == HAN).sum()):
        return text
    if not _KANA.search(text):
        return _converted(converter, text)
    return "\n".join([s if _KANA.search(s) else _converted(converter, s) for s in text.split("\n")])


def _converted(converter: Any, text: str) -> str:
    for _ in range(_ROUNDS):
        before, text = text, converter.convert(text)
        if text == before:
            break
    return text


# --- punctuation -----------------------------------------------------------------------------------------------------

_REPEATED = {"zh": re.compile(r"([，。、；：！？～…—,;!?.])\1+"), "en": re.compile(r"([!?.])\1{2,}")}
_RUNS = {"en": ("!!!", "???", "......"), "zh": ("………", "———", "......")}
_TWICE = re.compile(r"[，。、；：！？～!?,;]{2}")


def punctuation(text: str, lang: str) -> str:
    """Repeated punctuation collapsed to one sign, words never touched.

    Chinese: runs of one full-width sign, and of `, ; ! ?` after a Chinese character; `……` and `——` stay and longer ones
    become them. Both: three or more `!` or `?` after a word and before a blank become one, six or more dots three.
    What is syntax somewhere (`!!x`, `::`, `---`, `**`, `,,` in tables, `...`) stays. mini-ChatGPT and ChatLM kept only
    the first sign of any run, line breaks and blanks among them, which ruined English and code.
    """
    if lang not in _RUNS or not (any(run in text for run in _RUNS[lang]) or (lang == "zh" and _TWICE.search(text))):
        return text
    return replace(_REPEATED[lang], _once_zh if lang == "zh" else _once, text)


def _once(m: re.Match[str]) -> str:
    """A run of one sign as it should be: dots, and `!` or `?` between a word and a blank."""
    run: str = m[0]
    if run[0] == ".":
        return run if len(run) < 6 else "..."
    before, after = m.string[max(0, m.start() - 1) : m.start()], m.string[m.end() : m.end() + 1]
    return run[0] if len(run) > 2 and before.isalnum() and (not after or after.isspace()) and run[0] in "!?" else run


def _once_zh(m: re.Match[str]) -> str:
    run: str = m[0]
    if run[0] in "…—":
        return run[:2]
    if run[0] in ",;!?.":
        after_han = "\u3007" <= m.string[max(0, m.start() - 1) : m.start()] <= "\u9fff"
        return run[0] if after_han and run[0] != "." else _once(m)
    return run[0]


_PROSE_STOP = re.compile(r"[。！？；：”』」…][”’』」）)]?$")
_LIST = re.compile(r"[#>|*+-]|\d+[.、)]|\[|!\[|[（(][\d一二三四五六七八九十]+[)）]")
_LAST = 200


def full_stop(text: str, lang: str) -> str:
    """Chinese prose whose last line lacks its end mark gets `。`.

    Only where it is surely prose: the line has 15 characters or more (the length that ChatLM asks of an answer), three
    quarters of them Chinese, a comma or stop inside, is no heading, list item, quotation or table row, ends with a
    Chinese character, and the paragraph before it, if there is one, ends with an end mark. A poem without stops, a
    title or a signature stays.
    """
    if lang != "zh" or not text or not "\u3400" <= text[-1] <= "\u9fff":
        return text
    start = text.rfind("\n") + 1
    line = text[start:].strip()
    if len(line) < 15 or _LIST.match(line) or text[start] in "\t " or not ("，" in line or "。" in line):
        return text
    if 4 * len(_HAN_SIGN.findall(line)) < 3 * len(line):
        return text
    before = text[:start].rstrip()
    if before and not _PROSE_STOP.search(before[-2:]):
        return text
    if text.count("```") % 2:  # inside an open code block
        return text
    return text + "。"


_HAN_SIGN = re.compile("[\u3400-\u9fff]")


@lru_cache(maxsize=2)
def tidy(text: str) -> str:
    """`text.clean.normalise`, remembered: before all other rules, and again for what they left.

    That is blanks at line ends, blank lines, and letters that now combine.
    """
    return normalise(text)
