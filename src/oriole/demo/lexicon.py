"""The vocabulary of the demo corpus: word pairs, and terms that have a definition and traits in both languages.

Data: UTF-8 tab-separated files in `data/`, one header line each, no quoting.

`words_*.tsv`     topic, pos, en, zh. One word pair a line; `pos` is one of `POS`.
`terms_*.tsv`     en, zh, topic, article, plural, measure, definition_en, definition_zh, then two columns for each
                  attribute, `<attribute>_en` and `<attribute>_zh`. All terms of a file have the same attributes.
                  `article` is "a", "an" or empty (uncountable, or plural like "scissors"); `plural` is empty for
                  uncountable nouns. `measure` is the Chinese measure word that follows a number (一只猫: 只).

Every term is a word too (a noun of the same topic); a pair stands in one file only.

How a trait fits a sentence (E: English form, Z: Chinese form):

animal     eats       E noun phrase                "A heron eats fish and frogs."       Z noun     苍鹭吃鱼和青蛙。
           lives      E prepositional phrase       "A heron lives near rivers."         Z place    苍鹭生活在河边。
           known_for  E gerund phrase              "It is known for standing still."    Z verb     它擅长一动不动地站着。
fruit,     colour     E adjective phrase           "A plum is purple."                  Z adjective李子是紫色的。(no 的)
vegetable  taste      E adjective phrase           "A plum tastes sweet and sour."      Z adjective李子的味道又甜又酸。
           grows      E prepositional phrase       "A plum grows on a tree."            Z place    李子长在树上。
food       made_of    E noun phrase                "Bread is made from flour."          Z noun     面包是用面粉做的。
           taste      E adjective phrase           "Bread tastes plain and soft."       Z adjective面包的味道清淡松软。
           when       E adverbial                  "People often have it at breakfast." Z adverbial人们常在早餐时吃面包。(在…)
job        does       E bare verb phrase           "A baker's work is to bake bread."   Z verb     面包师的工作是烤面包。
           place      E prepositional phrase       "A baker works in a bakery."         Z place    面包师在面包店工作。
           tool       E noun phrase with article   "A baker uses an oven."              Z noun     面包师常用烤箱。
things     used_for   E gerund phrase              "A saw is used for cutting wood."    Z verb     锯子用来锯木头。
place      you_can    E bare verb phrase           "In a library you can borrow books." Z verb     在图书馆可以借书。
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

POS = ("noun", "verb", "adj", "time", "number", "other")
_WORD_COLUMNS = ["topic", "pos", "en", "zh"]
_TERM_COLUMNS = ["en", "zh", "topic", "article", "plural", "measure", "definition_en", "definition_zh"]
_EN = re.compile(r"[a-z]+(?:[ '-][a-z]+)*")
_HAN = re.compile(r"[\u4e00-\u9fff]+")


@dataclass(frozen=True)
class Word:
    """A pair of words that translate each other. `en` lower case, without article; `zh` 1 to 4 characters."""

    en: str
    zh: str
    pos: str
    topic: str


@dataclass(frozen=True)
class Trait:
    """One fact about a term; the module's docstring says which sentence the two forms fit."""

    attribute: str
    en: str
    zh: str


@dataclass(frozen=True)
class Term:
    """A noun with what is needed to talk about it in both languages."""

    en: str
    zh: str
    topic: str
    article: str
    plural: str
    measure: str
    definition_en: str
    definition_zh: str
    traits: tuple[Trait, ...]

    def trait(self, attribute: str) -> Trait:
        """The trait of that name; KeyError where the term has none."""
        for trait in self.traits:
            if trait.attribute == attribute:
                return trait
        raise KeyError(f"{self.en!r} has no attribute {attribute!r}")


@lru_cache(maxsize=1)
def terms() -> tuple[Term, ...]:
    """All terms, in the order of the files. ValueError, naming file and line, where a row breaks a rule."""
    found: list[Term] = []
    seen: dict[str, str] = {}
    for where, header, row in _rows("terms_"):
        attributes = _attributes(where, header)
        term = Term(*row[:8], traits=tuple(Trait(a, *row[8 + 2 * i : 10 + 2 * i]) for i, a in enumerate(attributes)))
        _check_term(where, term)
        _claim(where, seen, "en " + term.en, "zh " + term.zh, term.definition_en, term.definition_zh)
        found.append(term)
    return tuple(found)


@lru_cache(maxsize=1)
def words() -> tuple[Word, ...]:
    """All word pairs, terms first. ValueError, naming file and line, where a row breaks a rule."""
    found = [Word(term.en, term.zh, "noun", term.topic) for term in terms()]
    seen = {key: "the terms" for word in found for key in ("en " + word.en, "zh " + word.zh)}
    for where, header, row in _rows("words_"):
        _require(header == _WORD_COLUMNS, where, f"the columns must be {_WORD_COLUMNS}")
        topic, pos, en, zh = row
        _require(pos in POS, where, f"unknown part of speech {pos!r}")
        _require(bool(topic), where, "no topic")
        _check_pair(where, en, zh)
        _claim(where, seen, "en " + en, "zh " + zh)
        found.append(Word(en, zh, pos, topic))
    return tuple(found)


def _rows(prefix: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """(file:line, header, cells) of every row of every data file whose name starts with `prefix`, files by name."""
    folder = resources.files(__package__) / "data"
    files = [f for f in folder.iterdir() if f.name.startswith(prefix) and f.name.endswith(".tsv")]
    for file in sorted(files, key=lambda f: f.name):
        header, *lines = file.read_text(encoding="utf-8").splitlines()
        columns = header.split("\t")
        for number, line in enumerate(lines, 2):
            cells = line.split("\t")
            where = f"{file.name}:{number}"
            _require(len(cells) == len(columns), where, f"{len(cells)} cells, expected {len(columns)}")
            _require(all(c == c.strip() for c in cells), where, "a cell has blanks at its ends")
            yield where, columns, cells


def _attributes(where: str, header: list[str]) -> list[str]:
    _require(header[:8] == _TERM_COLUMNS, where, f"the first columns must be {_TERM_COLUMNS}")
    names = [name.removesuffix("_en") for name in header[8::2]]
    _require(header[8:] == [n + end for n in names for end in ("_en", "_zh")], where, "attributes need _en and _zh")
    return names


def _check_pair(where: str, en: str, zh: str) -> None:
    _require(_EN.fullmatch(en) is not None and en.count(" ") <= 1, where, f"bad English word {en!r}")
    _require(_HAN.fullmatch(zh) is not None and len(zh) <= 4, where, f"bad Chinese word {zh!r}")


def _check_term(where: str, term: Term) -> None:
    _check_pair(where, term.en, term.zh)
    _require(bool(term.topic), where, "no topic")
    _require(term.article in ("a", "an", ""), where, f"bad article {term.article!r}")
    _require(not term.article or bool(term.plural), where, "a countable noun needs its plural")
    _require(not term.plural or _EN.fullmatch(term.plural) is not None, where, f"bad plural {term.plural!r}")
    _require(_HAN.fullmatch(term.measure) is not None, where, f"bad measure word {term.measure!r}")
    subject = f"{term.article} {term.en}".strip()
    verb = "are" if term.plural == term.en and not term.article else "is"
    start = f"{subject[0].upper()}{subject[1:]} {verb} "
    _require(term.definition_en.startswith(start), where, f"the English definition must start with {start!r}")
    _require(term.definition_en.endswith("."), where, "the English definition must end with a full stop")
    _require(term.definition_zh.startswith(term.zh + "是"), where, f"the Chinese definition must start with {term.zh}是")
    _require(term.definition_zh.endswith("。"), where, "the Chinese definition must end with 。")
    for chinese in (term.definition_zh, *(t.zh for t in term.traits)):
        _require(re.fullmatch(r"[\u4e00-\u9fff，、。]+", chinese) is not None, where, f"bad Chinese text {chinese!r}")
    for english in (term.definition_en, *(t.en for t in term.traits)):
        _require(re.fullmatch(r"[A-Za-z ,.'-]+", english) is not None, where, f"bad English text {english!r}")


def _claim(where: str, seen: dict[str, str], *keys: str) -> None:
    for key in keys:
        _require(key not in seen, where, f"{key!r} is already in {seen.get(key)}")
        seen[key] = where


def _require(condition: bool, where: str, message: str) -> None:
    if not condition:
        raise ValueError(f"lexicon data, {where}: {message}")
