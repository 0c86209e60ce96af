"""Light cleaning that can do no harm: words, line breaks, code, indentation and punctuation stay as they are.

Filtering and deduplication, which drop whole documents, are other steps; nothing here drops a visible character.
"""

import re
import unicodedata

__all__ = ["language", "normalise"]

_NEW_LINE = re.compile("\r\n|[\r\v\f\x85]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")  # any of the three above
_PLAIN = bytes([9, 10, *range(32, 127)])  # in ASCII text a fast way to see that nothing is odd
_BLANKS = " \t\u00a0\u3000"
_BLANK_END = re.compile(f"\n(?<=[{_BLANKS}]\n)")  # begins with a fixed character, so the search is fast
_BLANK_LINES = re.compile("(?:(?<=\n)|\\A)\n{3,}")

_HAN = re.compile("[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LETTER = re.compile(r"[^\W\d_]")
_HAN_SHARE = 0.2
_SAMPLE = 1024


def normalise(text: str) -> str:
    """The text in Unicode's NFC with tidy lines. `normalise(normalise(x)) == normalise(x)`.

    Every kind of line end becomes a line feed; control characters other than tab and line feed, and byte order marks,
    go; white space at the end of lines goes; of several blank lines in a row two stay. A lone surrogate, which has no
    UTF-8, becomes U+FFFD. Spaces between words, indentation and full-width punctuation are not touched (NFC, unlike
    NFKC, keeps the latter).
    """
    if text.encode().translate(None, _PLAIN) if text.isascii() else _ODD.search(text):
        text = _SURROGATE.sub("\ufffd", _CONTROL.sub("", _NEW_LINE.sub("\n", text)))
    text = unicodedata.normalize("NFC", text)  # after the controls: what stood on both sides of one may combine
    if text[-1:] in _BLANKS or _BLANK_END.search(text):
        text = "\n".join([line.rstrip(_BLANKS) for line in text.split("\n")])
    return _BLANK_LINES.sub("\n\n", text) if "\n\n\n" in text else text


def language(text: str) -> str:
    """ "zh" where more than a fifth of the letters are Han characters, else "en".

    A fifth, because Chinese manuals hold much code and many English names: one Han character says as much as several
    Latin letters. Of long texts the beginning, middle and end are looked at.
    """
    if len(text) > 3 * _SAMPLE:
        middle = (len(text) - _SAMPLE) // 2
        text = text[:_SAMPLE] + text[middle : middle + _SAMPLE] + text[-_SAMPLE:]
    letters = len(_LETTER.findall(text))
    return "zh" if letters and len(_HAN.findall(text)) > _HAN_SHARE * letters else "en"
