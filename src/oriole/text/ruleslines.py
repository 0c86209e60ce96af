"""Rules that take single lines out of a document: boilerplate of web pages, and C4's rules about lines.

Lines of code blocks stay. What is left is the document's own lines in their order.
"""

import re
from collections.abc import Callable

from oriole.text.rulescode import fences
from oriole.text.rulesmeasure import highest

__all__ = ["boilerplate", "c4_lines"]

# C4's list (Raffel et al. 2020, JMLR 21/140, in tensorflow_datasets' c4_utils.py), and what stands on every page.
_POLICY = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
    "all rights reserved",
)  # fmt: skip
_SCRIPT = re.compile(r"enable|disabled?\b|turn(?:ed)? o|support|require|browser")
_CHINESE = re.compile(
    "版权所有|未经授权|未经许可|未经书面|转载请|不得转载|禁止转载|严禁转载|责任编辑|公众号|二维码|扫一扫|扫描关注|点击查看|点击阅读|阅读原文|阅读全文"
    "|查看更多|上一篇|下一篇|返回顶部|分享到|加入收藏|设为首页|备案号|ICP备|ICP证|公网安备"
    "|使用Cookie|使用 Cookie|隐私政策|本文来源|文章来源|网友评论"
)
_CHINESE_LINE = re.compile(
    r"版权所有|未经(?:本[站网]|本刊|书面)?(?:授权|许可|允许).{0,12}(?:转载|复制|使用)|转载请(?:注明|联系)|(?:不得|禁止|严禁)转载"
    r"|^[（(\[【]?责任编辑\s*[:：]|(?:关注|搜索|订阅).{0,12}公众号|扫(?:一扫|描).{0,10}(?:二维码|关注|下载)|(?:长按|识别).{0,6}二维码"
    r"|^(?:请)?点击(?:查看|阅读)(?:更多|全文|原文|详情)|^(?:阅读(?:原文|全文)|查看更多)\W*$|^[上下]一篇\s*[:：]|^\W*返回顶部\W*$|^分享到\W"
    r"|加入收藏.{0,6}设为首页|设为首页.{0,6}加入收藏|备案号\s*[:：]|ICP[备证]\d+|公网安备\s*\d+|使用\s?Cookie|^[^，。]{0,20}隐私政策[^，。]{0,20}$"
    r"|^[（(\[【]?(?:本文|文章)来源\s*[:：]|^\W*网友评论\W*$"
)
_CLAUSE = re.compile(
    r"\s*(?:\*\*)?(?:第[零〇一二三四五六七八九十百千\d]+[章节条款项]|[（(][一二三四五六七八九十\d]{1,4}[）)])"
)
"""How a line of a statute begins, which may well forbid to reprint something."""
_LOREM = "lorem ipsum"
_TRACES = ("cookie", "javascript", "terms of use", "privacy policy", "rights reserved", _LOREM)
_BLANK_LINES = re.compile(r"(?:(?<=\n)|\A)\n{3,}")


def boilerplate(text: str, length: int = 200) -> str:
    """The text without the lines of web pages that say nothing: at most `length` characters (Chinese: half of it).

    English: C4's policy phrases, "all rights reserved", and "javascript" beside a word such as enable, browser or
    require. C4 itself takes out every line with the word JavaScript, or with "privacy policy", however long, and so the
    paragraphs of manuals and articles about them. Chinese: the same kinds (copyright, reprint, account to follow, QR
    code, previous and next, licence number, cookies), but no clause of a statute. Lorem ipsum: the line, where C4 drops
    the document.
    """
    low = text.lower()
    english = any(p in low for p in _TRACES)
    chinese = not text.isascii() and highest(text) >= 0x4E00 and _CHINESE.search(text) is not None
    if not english and not chinese:
        return text

    def drop(line: str) -> bool:
        size = len(line)
        if size > length:
            return False
        if chinese and 2 * size <= length and _CHINESE_LINE.search(line.strip()):
            return not _CLAUSE.match(line)
        if not english:
            return False
        low = line.lower()
        return (
            any(p in low for p in _POLICY) or _LOREM in low or ("javascript" in low and _SCRIPT.search(low) is not None)
        )

    return _without(text, drop)


def c4_lines(text: str, terminal: bool, words: int, word: int = 1000) -> str:
    """C4's lines for English: with `terminal` only lines that end in `.`, `?`, `!` or a quotation mark, with fewer
    than `words` words none, and none with a word of more than `word` characters (C4: true, 3, 1000; FineWeb: false, 3,
    1000).

    They take out every heading, list item, line of verse and of code, so only the limit of `word` is on by default;
    blank lines and code blocks stay.
    """

    if not terminal and words <= 0 and not _long_word(text, word):
        return text

    def drop(line: str) -> bool:
        line = line.strip()
        if not line:
            return False
        if terminal and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
            return True
        if len(line) > word and max(map(len, line.split())) > word:
            return True
        return words > 0 and len(line.split(maxsplit=words - 1)) < words

    return _without(text, drop)


def _long_word(text: str, word: int) -> bool:
    """Whether there may be a word of more than `word` characters: it would fill an aligned piece of half that
    length."""
    half = max(1, word // 2)
    return any(len(text[at : at + half].split(maxsplit=1)) == 1 for at in range(0, len(text) - half + 1, half))


def _without(text: str, drop: Callable[[str], bool]) -> str:
    """`text` without the lines outside code blocks that `drop` names; of blank lines in a row two stay."""
    kept: list[str] = []
    at = 0
    for start, end in zip(*fences(text), strict=True):
        if at < start:
            kept += [line for line in text[at : start - 1].split("\n") if not drop(line)]
        kept.append(text[start:end])
        at = end + 1
    if at <= len(text):
        kept += [line for line in text[at:].split("\n") if not drop(line)]
    out = "\n".join(kept)
    return text if len(out) == len(text) else _BLANK_LINES.sub("\n\n", out)
