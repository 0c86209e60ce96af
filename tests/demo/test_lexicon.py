"""The vocabulary of the demo corpus: enough of it, one-to-one, well-formed in both languages."""

import re
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from oriole.demo import lexicon
from oriole.demo.lexicon import POS, Term, terms, words

VOWEL_SOUND = re.compile(r"[aeio]|u(?!ni)|hour|honest")
ATTRIBUTES = {
    "animal": ["eats", "lives", "known_for"],
    "fruit": ["colour", "taste", "grows"],
    "vegetable": ["colour", "taste", "grows"],
    "food": ["made_of", "taste", "when"],
    "ingredient": ["comes_from", "taste", "used_for"],
    "job": ["does", "place", "tool"],
    "place": ["you_can"],
    "nature": [],
    "sky": [],
    "weather": [],
    "plant": [],
}
NAMES = ("weekday", "month", "country")


def test_there_are_enough_words_and_terms() -> None:
    assert len(words()) >= 900
    assert len(terms()) >= 420
    assert len({word.topic for word in words()}) >= 30
    count = Counter(term.topic for term in terms())
    assert count["animal"] >= 70
    assert count["fruit"] + count["vegetable"] + count["food"] + count["ingredient"] >= 70
    assert count["job"] >= 45
    assert count["place"] >= 40
    assert count["nature"] + count["sky"] + count["weather"] + count["plant"] >= 60
    assert sum(n for topic, n in count.items() if topic not in ATTRIBUTES) >= 140  # things


def test_words_are_one_to_one() -> None:
    assert len({word.en for word in words()}) == len(words())
    assert len({word.zh for word in words()}) == len(words())


def test_words_have_the_promised_form() -> None:
    for word in words():
        name = word.topic in NAMES and word.en[0].isupper()
        assert re.fullmatch(r"[a-z]+([ -][a-z]+)?", word.en[0].lower() + word.en[1:] if name else word.en), word
        assert not word.en.startswith(("a ", "an ", "the ")), word
        assert re.fullmatch(r"[\u4e00-\u9fff]{1,4}", word.zh), word
        assert word.pos in POS, word


def test_every_term_is_a_word() -> None:
    pairs = {(word.en, word.zh): word for word in words()}
    for term in terms():
        assert pairs[term.en, term.zh].pos == "noun"


@pytest.mark.parametrize("term", [pytest.param(term, id=term.en) for term in terms()])
def test_a_term_is_well_formed(term: Term) -> None:
    if term.article in ("a", "an"):
        assert term.article == ("an" if VOWEL_SOUND.match(term.en) else "a")
        assert term.plural
        assert not re.search(r"(ss|sh|ch|x)s$|[^aeiou]ys$", term.plural)
    subject = f"{term.article} {term.en}".strip()
    verb = "are" if not term.article and term.plural else "is"
    assert term.definition_en.startswith(f"{subject[0].upper()}{subject[1:]} {verb} ")
    assert 7 <= len(term.definition_en.split()) <= 14
    assert 10 <= len(term.definition_zh) <= 22
    assert term.definition_zh.startswith(f"{term.zh}是")
    assert term.definition_zh.endswith("。") and term.definition_zh.count("。") == 1
    for text in (term.definition_zh, *(trait.zh for trait in term.traits)):
        assert re.fullmatch(r"[\u4e00-\u9fff，、。]+", text)
    for trait in term.traits:
        assert not trait.en.endswith((".", ",")) and not trait.zh.endswith(("。", "，", "的"))
    for article, following in re.findall(
        r"\b(an?) ([a-z]+)", " ".join([term.definition_en, *(t.en for t in term.traits)])
    ):
        assert article == ("an" if VOWEL_SOUND.match(following) else "a"), (article, following)


def test_definitions_are_distinct() -> None:
    for attribute in ("definition_en", "definition_zh"):
        endings = Counter(re.split(r" (?:is|are) |是", getattr(term, attribute), maxsplit=1)[1] for term in terms())
        assert [text for text, count in endings.items() if count > 1] == []


def test_traits_follow_the_topic() -> None:
    for term in terms():
        assert [trait.attribute for trait in term.traits] == ATTRIBUTES.get(term.topic, ["used_for"]), term
    shapes = {"known_for": r"\w+ing\b.*", "used_for": r"\w+ing\b.*"}
    shapes |= dict.fromkeys(("lives", "grows", "place"), r"(in|on|at|near|under|among|close to) .*")
    for term in terms():
        for trait in term.traits:
            assert re.fullmatch(shapes.get(trait.attribute, r".+"), trait.en), (term.en, trait)
            assert trait.attribute != "when" or trait.zh.startswith("在"), (term.en, trait)


def test_trait_by_name() -> None:
    heron = next(term for term in terms() if term.en == "heron")
    assert heron.trait("eats").zh == "鱼和青蛙"
    with pytest.raises(KeyError, match="used_for"):
        heron.trait("used_for")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package, with an empty `data`; what it held is forgotten afterwards."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(lexicon, "terms", lexicon.terms.__wrapped__)
    monkeypatch.setattr(lexicon, "words", lexicon.words.__wrapped__)
    return folder


TERM_HEADER = "en\tzh\ttopic\tarticle\tplural\tmeasure\tdefinition_en\tdefinition_zh\tused_for_en\tused_for_zh"
SAW = "saw\t锯子\ttool\ta\tsaws\t把\tA saw is a tool that cuts wood.\t锯子是锯木头的工具。\tcutting wood\t锯木头"


def test_good_rows_are_read(data: Path) -> None:
    (data / "terms_a.tsv").write_text(f"{TERM_HEADER}\n{SAW}\n", encoding="utf-8")
    (data / "words_a.tsv").write_text("topic\tpos\ten\tzh\nverb\tverb\teat\t吃\n", encoding="utf-8")
    assert [(word.en, word.zh, word.pos) for word in lexicon.words()] == [
        ("saw", "锯子", "noun"),
        ("eat", "吃", "verb"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{SAW}\n{SAW}", "terms_a.tsv:3: 'en saw' is already in terms_a.tsv:2"),
        (SAW.replace("\tcutting wood", ""), "9 cells, expected 10"),
        (SAW.replace("A saw is", "The saw is"), "must start with 'A saw is '"),
        (SAW.replace("工具。", "工具"), "must end with 。"),
        (SAW.replace("锯木头的", "锯木头,的"), "bad Chinese text"),
        (SAW.replace("\tsaws\t", "\t\t"), "needs its plural"),
        (SAW.replace("\ta\t", "\tone\t"), "bad article"),
        (SAW.replace("saw\t", "Saw Set\t", 1), "bad English word"),
    ],
)
def test_a_bad_term_is_refused(data: Path, row: str, message: str) -> None:
    (data / "terms_a.tsv").write_text(f"{TERM_HEADER}\n{row}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        lexicon.terms()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("verb\tverb\tsaw\t看", "'en saw' is already in the terms"),
        ("tool\tnoun\thacksaw\t锯子", "'zh 锯子' is already in the terms"),
        ("verb\tdoing\teat\t吃", "unknown part of speech 'doing'"),
        ("verb\tverb\teat\tchi", "bad Chinese word"),
    ],
)
def test_a_bad_word_is_refused(data: Path, row: str, message: str) -> None:
    (data / "terms_a.tsv").write_text(f"{TERM_HEADER}\n{SAW}\n", encoding="utf-8")
    (data / "words_a.tsv").write_text(f"topic\tpos\ten\tzh\n{row}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        lexicon.words()
