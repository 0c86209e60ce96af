"""The vocabulary of the demo corpus: word pairs, and terms that have a definition and traits in both languages.

Data: UTF-8 tab-separated files in `data/`, one header line each, no quoting.

`words_*.tsv`     topic, pos, en, zh. One word pair a line; `pos` is one of `POS`.
`terms_*.tsv`     en, zh, topic, article, plural, measure, definition_en, definition_zh, then two columns for each
                  attribute, `<attribute>_en` and `<attribute>_zh`. All terms of a file have the same attributes.
                  `article` is "a", "an", "the" (the sun) or empty (uncountable, or plural like "scissors"); `plural`
                  is empty where there is none. `measure`: the measure word that follows a number (一只猫: 只).

Every term is a word too (a noun of the same topic); a pair stands in one file only.

How a trait fits a sentence: what kind of phrase the two forms are, and a sentence that takes them. Where an example
would repeat the rule above it, it is left out.

animal      eats        noun                  A heron eats [fish and frogs].           苍鹭吃[鱼和青蛙]。
            lives       preposition / place   A heron lives [near rivers and lakes].   苍鹭生活在[河边和湖边]。
            known_for   gerund / verb         A heron is known for [standing still].   苍鹭会[一动不动地站着]。
fruit and   colour      adjective (no 的)     A plum is [purple].                      李子是[紫色]的。
vegetable   taste       adjective             A plum tastes [sweet and sour].          李子的味道[又酸又甜]。
            grows       preposition / place   A plum grows [on a tree].                李子长在[树上]。
food        made_of     noun                  Bread is made from [flour and water].    面包是用[面粉和水]做的。
            taste       adjective, as above
            when        adverbial (zh: 在…)   People often have bread [at breakfast].  人们常[在早餐时]吃面包。
ingredient  comes_from  noun                  Milk comes from [cows].                  牛奶来自[奶牛]。
            taste       adjective, as above
            used_for    gerund / verb         Flour is used for [making bread].        面粉用来[做面包]。
job         does        bare verb             A baker's work is to [bake bread].        面包师的工作是[烤面包]。
            place       preposition / place   A carpenter works [in a workshop].       木匠在[木工房]工作。
            tool        noun with article     A carpenter uses [a saw and a plane].    木匠常用[锯子和刨子]。
all things  used_for    gerund / verb         A saw is used for [cutting wood].        锯子用来[锯木头]。
place       you_can     bare verb             In a library you can [borrow books].     在图书馆可以[借书]。

Terms of nature, sky, weather and plant have a definition only.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

POS = ("noun", "verb", "adj", "time", "number", "other")
_WORD_COLUMNS = ["topic", "pos", "en", "zh"]
_TERM_COLUMNS = ["en", "zh", "topic", "article", "plural", "measure", "definition_en", "definition_zh"]
_EN = re.compile(r"[A-Za-z][a-z]*(?:[ '-][a-z]+)*")
_HAN = re.compile(r"[\u4e00-\u9fff]+")


@dataclass(frozen=True)
class Word:
    """Two words that translate each other; `en` has no article and is lower case but for names (Monday, China)."""

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
        traits = tuple(Trait(name, row[8 + 2 * i], row[9 + 2 * i]) for i, name in enumerate(attributes))
        en, zh, topic, article, plural, measure, definition_en, definition_zh = row[:8]
        term = Term(en, zh, topic, article, plural, measure, definition_en, definition_zh, traits)
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
    _require(term.article in ("a", "an", "the", ""), where, f"bad article {term.article!r}")
    _require(term.article not in ("a", "an") or bool(term.plural), where, "a countable noun needs its plural")
    _require(not term.plural or _EN.fullmatch(term.plural) is not None, where, f"bad plural {term.plural!r}")
    _require(_HAN.fullmatch(term.measure) is not None, where, f"bad measure word {term.measure!r}")
    subject = f"{term.article} {term.en}".strip()
    verb = "are" if term.plural == term.en and not term.article else "is"
    start = f"{subject[0].upper()}{subject[1:]} {verb} "
    _require(term.definition_en.startswith(start), where, f"the English definition must start with {start!r}")
    _require(term.definition_en.endswith("."), where, "the English definition must end with a full stop")
    _require(
        term.definition_zh.startswith(term.zh + "是"), where, f"the Chinese definition must start with {term.zh}是"
    )
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
