"""Cleaning as a list of rules, each `Doc -> Doc | Drop`, each a switch with its published threshold.

    config = RulesConfig()                      # preset "full"; "light" mends and drops almost nothing
    rules = build_rules(config)
    result = apply_rules(Doc("…"), rules)       # the mended document, or Drop(reason, detail)

The order is fixed: characters, markup, language, width, script, punctuation, lines, masks, full stop, tidy; then the
rules that drop, cheap ones first. Mending comes first and every dropping rule sees the final text, so cleaning twice
is cleaning once. Nothing is added to a document but what `text.rulesmend` and `text.rulesmask` list.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from pydantic import model_validator

from oriole.config import Config
from oriole.errors import ConfigError, raise_for_os_error
from oriole.text import rulesfilter as filters
from oriole.text import ruleslines, rulesmask, rulesmend
from oriole.text.records import Doc
from oriole.text.ruleslang import identify
from oriole.text.rulesmeasure import Measures, measure

__all__ = ["Drop", "Rule", "RulesConfig", "apply_rules", "build_rules"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a document goes: the name of the rule, and what it saw."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Rule(Generic[T]):
    """A rule for documents or conversations, under the name that config, report and `Drop.reason` give it."""

    name: str
    function: Callable[[T], T | Drop]

    def __call__(self, item: T) -> T | Drop:
        """What is left of it: mended, as it is, or why it goes."""
        return self.function(item)


_FINEWEB2_STOP_WORDS = (
    "的",
    "年",
    "在",
    "月",
    "是",
    "和",
    "日",
    "了",
    "於",
    "·",
    "為",
    "有",
    "被",
    "人",
    "中",
    "为",
    "他",
    "與",
    "後",
    "也",
    "而",
    "由",
)
_GOPHER_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


class RulesConfig(Config):
    """Which rules run and at which threshold; 0, false, an empty list or (0, 0) switches one off.

    Sources: Gopher arXiv:2112.11446 (A.1.1 and table A1), C4 JMLR 21/140, FineWeb arXiv:2406.17557, FineWeb-2
    arXiv:2506.20920 (configs/cmn_Hani.yml), EvalWeb arXiv:2311.01149 (preprocess.py). Where a default differs from the
    published one, the field says so and why.
    """

    preset: Literal["full", "light"] = "full"
    """`full`: everything below; `light`: mending, language and length only. Keys given beside it win."""

    # Mending.
    characters: bool = True
    """Unicode NFC, line ends, control characters, blank lines (`text.clean.normalise`)."""
    html: bool = True
    """Remains of HTML: tags, comments, scripts, entities."""
    wiki: bool = True
    """Remains of wiki pages: links, templates, references, tables, `[edit]`."""
    width: bool = True
    """Full-width letters and digits, ideographic and no-break spaces, ligatures; by language."""
    simplify: bool = True
    """Traditional Chinese documents into simplified characters (OpenCC t2s); never other languages."""
    punctuation: bool = True
    """Repeated punctuation collapsed."""
    full_stop: bool = True
    """A missing `。` at the end of Chinese prose."""
    boilerplate: int = 200
    """Lines of web pages that say nothing (policy, cookies, JavaScript, copyright, QR codes), up to so many
    characters."""
    c4_terminal: bool = False
    """English lines without an end mark go. C4: true; FineWeb: false, since headings, lists, verse and code would
    go."""
    c4_line_words: int = 0
    """English lines with fewer words go. C4 and FineWeb: 3; off because headings, verse and code would go."""
    c4_word_characters: int = 1000
    """English lines with a longer word go (C4: 1000)."""
    mask_mail: bool = True
    """Mail addresses become `<EMAIL>`."""
    mask_phones: bool = True
    """Telephone numbers become `<PHONE>`."""
    mask_ids: bool = True
    """Chinese identity numbers with the right check digit become `<ID>`."""
    mask_ips: bool = True
    """Public IP addresses become `<IP>`."""

    # Length and language.
    min_characters: int = 1
    """Characters a document must have; an empty one always goes."""
    max_characters: int = 10_000_000
    """Characters a document may have."""
    languages: tuple[str, ...] = ("zh", "en")
    """Languages that stay: by script, then function words, then py3langid. Empty: any."""

    # Quality, English and Chinese.
    prose_share: float = 0.3
    """A document with a smaller share of text outside code blocks is code, which the rules below do not judge."""
    gopher_words: tuple[int, int] = (50, 100_000)
    """Words, least and most (Gopher; FineWeb-2 keeps it for Chinese)."""
    gopher_symbols: float = 0.1
    """Most `#`, and ellipses, to words (both languages)."""
    gopher_bullets: float = 0.9
    """Most lines that begin with a bullet (both languages)."""
    gopher_ellipses: float = 0.3
    """Most lines that end with an ellipsis (both languages)."""

    ngram_votes: int = 4
    """How many of the six limits on repeated 5- to 10-grams a document must be over (published: 1, which drops a
    quarter of all Chinese laws and many manuals: they repeat terms, not passages)."""

    # Quality, English.
    gopher_word_length: tuple[float, float] = (3, 10)
    """Mean word length, least and most."""
    gopher_alpha: float = 0.8
    """Least share of words with a letter."""
    gopher_stop_words: int = 2
    """Least number of the, be, to, of, and, that, have, with."""
    gopher_dup_lines: float = 0.3
    """Most lines that occurred before."""
    gopher_dup_line_characters: float = 0.2
    """Most characters in lines that occurred before."""
    gopher_dup_paragraphs: float = 0.3
    """Most paragraphs that occurred before."""
    gopher_dup_paragraph_characters: float = 0.2
    """Most characters in paragraphs that occurred before."""
    gopher_top_ngrams: tuple[float, ...] = (0.2, 0.18, 0.16)
    """Most characters in the most frequent 2-, 3-, 4-gram."""
    gopher_dup_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Most characters in repeated 5- to 10-grams."""
    c4_sentences: int = 5
    """Least number of sentences."""
    c4_curly: bool = False
    """A curly bracket outside code blocks drops the document. C4 and FineWeb: true; off because LaTeX and manuals
    go."""
    fineweb_line_ends: float = 0.12
    """Least share of lines that end in punctuation."""
    fineweb_short_lines: float = 0.67
    """Most lines of at most 30 characters."""
    fineweb_dup_characters: float = 0.1
    """Most characters in lines that occurred before. FineWeb: 0.01, which drops a quarter of the manuals; FineWeb-2
    raised it to this."""
    fineweb_new_lines: float = 0.3
    """Most line breaks to words."""

    # Quality, Chinese.
    fineweb2_word_length: tuple[float, float] = (1, 5)
    """Mean word length, least and most."""
    fineweb2_alpha: float = 0.735
    """Least share of words with a letter. FineWeb-2 counts punctuation marks among the words; here they are none."""
    fineweb2_stop_words: int = 2
    """Least number of FineWeb-2's 22 stop words."""
    fineweb2_dup_lines: float = 0.287
    """Most lines that occurred before."""
    fineweb2_top_ngrams: tuple[float, ...] = (0.256, 0.201, 0.171)
    """Most characters in the most frequent 2-, 3-, 4-gram."""
    fineweb2_dup_ngrams: tuple[float, ...] = (0.198, 0.182, 0.167, 0.154, 0.140, 0.127)
    """Most characters in repeated 5- to 10-grams."""
    fineweb2_line_ends: float = 0.106
    """Least share of lines that end in punctuation."""
    fineweb2_dup_characters: float = 0.1
    """Most characters in lines that occurred before."""
    fineweb2_new_lines: float = 0.178
    """Most line breaks to words."""
    evalweb_characters: int = 200
    """A document must have more characters than this."""
    evalweb_line_characters: float = 10
    """Least mean length of a line."""
    evalweb_han: float = 0.3
    """Least share of Han characters."""
    evalweb_repeats: float = 0.5
    """Most 13-grams of characters that occur more than once."""
    evalweb_words: str = ""
    """A file of unwanted words, one a line (EvalWeb's own list is not shipped)."""
    evalweb_words_per_line: float = 0.5
    """Most different unwanted words per line of the document."""

    @model_validator(mode="before")
    @classmethod
    def _light(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") == "light":
            return {**_LIGHT, **data}
        return data


_PREFIXES = ("gopher_", "ngram_", "c4_", "fineweb_", "fineweb2_", "evalweb_")
_PAIRS = ("gopher_words", "gopher_word_length", "fineweb2_word_length")
_LIGHT: dict[str, Any] = {
    name: (0, 0) if name in _PAIRS else type(field.default)()
    for name, field in RulesConfig.model_fields.items()
    if name.startswith(_PREFIXES)
}


def apply_rules(item: T, rules: Sequence[Rule[T]]) -> T | Drop:
    """The document or conversation after every rule, or the first rule's `Drop`."""
    for rule in rules:
        result = rule.function(item)
        if isinstance(result, Drop):
            return result
        item = result
    return item


def build_rules(config: RulesConfig) -> list[Rule[Doc]]:
    """The rules that `config` switches on, in their fixed order; `ConfigError` for a list of words that cannot be
    read."""
    return [*_mending(config), *_dropping(config)]


def _mending(c: RulesConfig) -> list[Rule[Doc]]:
    rules: list[Rule[Doc]] = []

    def add(on: object, name: str, change: Callable[[str], str]) -> None:
        if on:
            rules.append(Rule(name, partial(_mend, change)))

    def add_by_language(on: object, name: str, change: Callable[[str, str], str]) -> None:
        if on:
            rules.append(Rule(name, partial(_mend_by_language, change)))

    if c.max_characters:  # a first look, so that nothing else meets a line of hundreds of megabytes
        rules.append(Rule("max_characters", partial(_too_long, 2 * c.max_characters)))
    add(c.characters, "characters", rulesmend.tidy)
    add(c.html or c.wiki, "markup", partial(rulesmend.markup, html=c.html, wiki=c.wiki))
    rules.append(Rule("identify", _identify))
    add_by_language(c.width, "width", rulesmend.width)
    add_by_language(c.simplify, "simplify", rulesmend.simplify)
    add_by_language(c.punctuation, "punctuation", rulesmend.punctuation)
    add(c.boilerplate, "boilerplate", partial(ruleslines.boilerplate, length=c.boilerplate))
    if c.c4_terminal or c.c4_line_words or c.c4_word_characters:
        change = partial(ruleslines.c4_lines, terminal=c.c4_terminal, words=c.c4_line_words, word=c.c4_word_characters)
        rules.append(Rule("c4_lines", partial(_mend_english, change)))
    add(c.mask_mail, "mask_mail", rulesmask.mask_mail)
    numbers = partial(rulesmask.mask_numbers, phones=c.mask_phones, ids=c.mask_ids, ips=c.mask_ips)
    add(c.mask_phones or c.mask_ids or c.mask_ips, "mask_numbers", numbers)
    add(c.characters, "tidy", rulesmend.tidy)
    add_by_language(c.full_stop, "full_stop", rulesmend.full_stop)
    return rules


def _mend(change: Callable[[str], str], doc: Doc) -> Doc:
    text = change(doc.text)
    return doc if text is doc.text or text == doc.text else replace(doc, text=text)


def _mend_by_language(change: Callable[[str, str], str], doc: Doc) -> Doc:
    text = change(doc.text, doc.lang)
    return doc if text is doc.text or text == doc.text else replace(doc, text=text)


def _mend_english(change: Callable[[str], str], doc: Doc) -> Doc:
    return _mend(change, doc) if doc.lang == "en" else doc


def _identify(doc: Doc) -> Doc:
    """A document that says its language keeps it; the rule `languages` looks at the final text of all.

    One that cannot be told gets ISO 639's "und", so that what other rules take out of it does not change the answer.
    """
    return doc if doc.lang else replace(doc, lang=identify(doc.text) or "und")


def _too_long(most: int, doc: Doc) -> Doc | Drop:
    return Drop("max_characters", f"{len(doc.text)} characters") if len(doc.text) > most else doc


def _length(least: int, most: int, doc: Doc) -> Doc | Drop:
    size = len(doc.text)
    if size < least or not doc.text.strip():
        return Drop("min_characters", f"{size} characters")
    return Drop("max_characters", f"{size} characters") if most and size > most else doc


def _languages(wanted: tuple[str, ...], doc: Doc) -> Doc | Drop:
    """A text too short to tell stays in the language it says, if that is wanted."""
    found = identify(doc.text) or doc.lang
    if found in wanted and (doc.lang in wanted):
        return doc
    return Drop("languages", found or "not known")


_Why = Callable[[Measures], str]


def _judge(name: str, why: _Why, langs: tuple[str, ...], prose_share: float, doc: Doc) -> Doc | Drop:
    if doc.lang not in langs:
        return doc
    m = measure(doc.text, doc.lang)
    if len(m.prose) < prose_share * len(doc.text):
        return doc
    reason = why(m)
    return Drop(name, reason) if reason else doc


def _dropping(c: RulesConfig) -> list[Rule[Doc]]:
    rules = [Rule("length", partial(_length, c.min_characters, c.max_characters))]
    if c.languages:
        rules.append(Rule("languages", partial(_languages, c.languages)))
    both, en, zh = ("zh", "en"), ("en",), ("zh",)

    def add(langs: tuple[str, ...], name: str, make: Callable[..., str], *more: Any) -> None:
        value = getattr(c, name)
        if value and value != (0, 0):
            values = value if isinstance(value, tuple) and "ngrams" not in name else (value,)
            values = (*values, c.ngram_votes) if "dup_ngrams" in name else values
            why = cast(_Why, _With(make, (*more, *values)))
            rules.append(Rule(name, partial(_judge, name, why, langs, c.prose_share)))

    add(zh, "evalweb_characters", filters.evalweb_length)
    add(zh, "evalweb_line_characters", filters.evalweb_lines)
    add(zh, "evalweb_han", filters.evalweb_han)
    if c.evalweb_words and c.evalweb_words_per_line:
        why = cast(_Why, _With(filters.evalweb_words, (_word_list(c.evalweb_words), c.evalweb_words_per_line)))
        rules.append(Rule("evalweb_words", partial(_judge, "evalweb_words", why, zh, c.prose_share)))
    add(both, "gopher_bullets", filters.bullets)
    add(both, "gopher_ellipses", filters.ellipses)
    add(en, "gopher_dup_lines", filters.dup_lines)
    add(en, "gopher_dup_line_characters", filters.dup_line_characters)
    add(en, "gopher_dup_paragraphs", filters.dup_paragraphs)
    add(en, "gopher_dup_paragraph_characters", filters.dup_paragraph_characters)
    add(zh, "fineweb2_dup_lines", filters.dup_lines)
    add(en, "c4_sentences", filters.c4_sentences)
    if c.c4_curly:
        rules.append(Rule("c4_curly", partial(_judge, "c4_curly", filters.c4_curly, en, c.prose_share)))
    add(en, "fineweb_line_ends", filters.line_ends)
    add(en, "fineweb_short_lines", filters.short_lines)
    add(en, "fineweb_dup_characters", filters.dup_characters)
    add(zh, "fineweb2_line_ends", filters.line_ends)
    add(zh, "fineweb2_dup_characters", filters.dup_characters)
    add(both, "gopher_words", filters.num_words)
    add(both, "gopher_symbols", filters.symbols)
    add(en, "gopher_word_length", filters.word_length)
    add(en, "gopher_alpha", filters.alpha_words)
    add(en, "fineweb_new_lines", filters.new_lines)
    add(zh, "fineweb2_word_length", filters.word_length)
    add(zh, "fineweb2_alpha", filters.alpha_words)
    add(zh, "fineweb2_new_lines", filters.new_lines)
    add(en, "gopher_stop_words", filters.stop_words, _GOPHER_STOP_WORDS)
    add(zh, "fineweb2_stop_words", filters.stop_words, _FINEWEB2_STOP_WORDS)
    add(en, "gopher_top_ngrams", filters.top_ngrams)
    add(en, "gopher_dup_ngrams", filters.dup_ngrams)
    add(zh, "fineweb2_top_ngrams", filters.top_ngrams)
    add(zh, "fineweb2_dup_ngrams", filters.dup_ngrams)
    add(zh, "evalweb_repeats", filters.evalweb_repeats)
    return rules


@dataclass(frozen=True, slots=True)
class _With:
    """A filter with its thresholds: `functools.partial` binds from the left, but the measures come first."""

    function: Callable[..., str]
    thresholds: tuple[Any, ...]

    def __call__(self, m: Measures) -> str:
        return self.function(m, *self.thresholds)


def _word_list(path: str) -> re.Pattern[str]:
    try:
        words = [s for line in Path(path).read_text(encoding="utf-8").splitlines() if (s := line.strip())]
    except UnicodeDecodeError as error:
        raise ConfigError(f"the list of words {path} is not UTF-8; convert it") from error
    except OSError as error:
        raise_for_os_error(error, "reading the list of words", path)
    if not words:
        raise ConfigError(f'the list of words {path} is empty; give one word a line, or evalweb_words=""')
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))
