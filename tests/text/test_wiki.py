"""MediaWiki dumps: what is an article, what of its markup is text, and what may be asked about it."""

import bz2
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oriole.errors import DataError
from oriole.text.wiki import (
    ANSWER_CHARS,
    QUESTIONS,
    Entry,
    is_dump,
    plain,
    question,
    read_dump,
    read_entries,
    read_questions,
)

Page = tuple[str, int, str]

ORIOLE = """{{Infobox bird|name=Oriole|image={{!}}x}}
[[File:Oriole.jpg|thumb|A ''golden'' [[oriole]] in a tree]]
'''Golden oriole''' ({{lang|la|Oriolus}}, {{IPA|x}}) is a [[bird]] of the [[Oriolidae|oriole family]].<ref>Smith
(1999), {{cite book|title=Birds}}</ref> It sings &ndash; loudly.<!-- check --> See [http://x.org the page].

== Habitat ==
It lives in:
* willows
* [[poplar]]s
** near ''rivers''
{| class="wikitable"
! Year !! Birds
|-
| 1999 || 12
|}

== Nothing ==
=== Nothing here ===
{{foo}}

== Weight ==
It is <math>m = 0.1\\,kg</math>.<br/>Use <code>x = 1</code>:
<syntaxhighlight lang="python">
def f(x=''):
    return x
</syntaxhighlight>

== References ==
<references/>
=== Books ===
* Smith
[[Category:Birds]]
[[de:Pirol]]
"""
ORIOLE_PLAIN = """Golden oriole is a bird of the oriole family. It sings – loudly. See the page.

Habitat

It lives in:
- willows
- poplars
- near rivers

Weight

It is $m = 0.1\\,kg$.
Use x = 1:

def f(x=''):
    return x"""
HUANGLI = """{{鸟类|名=黄鹂}}
'''黄鹂'''（{{lang|la|Oriolus}}），是-{zh-hans:黄鹂科;zh-hant:黃鸝科}-的一[[属]][[鸟|鸟类]]，叫声十分好听，常见于河边的柳树上。{{来源}}-{H|zh:鸟}-

== 分布 ==
* 亚洲
* 欧洲

== 参考文献 ==
{{reflist}}
"""

_MARKS = "{ } [ ] | = ' < > * # ; : - {{ }} [[ ]] '' <ref> </ref> {| |} -{ }- <br> &amp; &#2; 鸟 bird File: \x02 \x03"
MARKS = [*_MARKS.split(" "), " ", "\n", "\n== a ==\n"]


def dump(name: str, pages: list[Page]) -> str:
    """The XML of a small dump of the wiki `name`, as MediaWiki's export writes it."""
    body = "".join(
        f"<page><title>{escape(title)}</title><ns>{ns}</ns><id>{n}</id>"
        + ('<redirect title="Oriole" />' if text.startswith("#") else "")
        + f"<revision><id>{n}</id><timestamp>2024-01-01T00:00:00Z</timestamp>"
        f"<contributor><username>A</username><id>1</id></contributor><model>wikitext</model>"
        f'<format>text/x-wiki</format><text bytes="{len(text)}" xml:space="preserve">{escape(text)}</text>'
        "<sha1>x</sha1></revision></page>"
        for n, (title, ns, text) in enumerate(pages, 1)
    )
    return (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en"><siteinfo>'
        f"<sitename>Wikipedia</sitename><dbname>{name}</dbname><base>http://x.org</base><generator>MediaWiki</generator>"
        '<case>first-letter</case><namespaces><namespace key="0" case="first-letter" />'
        '<namespace key="1" case="first-letter">Talk</namespace></namespaces></siteinfo>'
        f"{body}</mediawiki>"
    )


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str, list[Page]], Path]:
    """Write a dump as Wikimedia does: several bz2 streams, one after another."""

    def write(name: str, pages: list[Page]) -> Path:
        raw = dump(name, pages).encode()
        path = tmp_path / f"{name}-20240101-pages-articles-multistream.xml.bz2"
        third = len(raw) // 3
        path.write_bytes(b"".join(map(bz2.compress, (raw[:third], raw[third : 2 * third], raw[2 * third :]))))
        return path

    return write


def test_only_articles_are_read(make: Callable[[str, list[Page]], Path]) -> None:
    path = make(
        "enwiki",
        [
            ("Oriole", 0, ORIOLE),
            ("Orioles", 0, "#REDIRECT [[Oriole]]"),
            ("Talk:Oriole", 1, "A long discussion of orioles."),
            ("Oriole (disambiguation)", 0, "'''Oriole''' may be a bird or a ship."),
            ("Pirol", 0, "'''Pirol''' may refer to:\n* a bird\n{{Disambig}}"),
            ("Empty", 0, "{{stub}}"),
            ("Willow", 0, "A '''willow''' is a tree & a home <small>of orioles</small>."),
        ],
    )
    assert is_dump(path)
    assert [doc.text for doc in read_dump(path)] == [
        f"Oriole\n\n{ORIOLE_PLAIN}",
        "Willow\n\nA willow is a tree & a home of orioles.",
    ]
    assert {(doc.lang, doc.source) for doc in read_dump(path)} == {("en", "enwiki")}


def test_chinese_markup(make: Callable[[str, list[Page]], Path]) -> None:
    (doc,) = read_dump(make("zhwiki", [("黄鹂", 0, HUANGLI), ("黄莺", 0, "#重定向 [[黄鹂]]")]))
    assert (doc.lang, doc.source) == ("zh", "zhwiki")
    assert doc.text == (
        "黄鹂\n\n黄鹂，是黄鹂科的一属鸟类，叫声十分好听，常见于河边的柳树上。\n\n分布\n\n- 亚洲\n- 欧洲"
    )


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("a [[b|c]] [[:Category:D]] [[fr:E]] [[File:F.png|x [[y]] z]]", "a c Category:D"),
        ("-{zh-tw:計算機;zh-cn:计算机}-", "计算机"),
        ("-{A|zh-hans:软件;zh-hant:軟體}-和-{单独}-", "软件和单独"),
        ("x -{T|标题}- y", "x y"),
        ("a{{b|{{c}}}} {{{d|e}}} f", "a f"),
        ("&#2;&#2;&nbsp;a &lt;b&gt; &#x4e2d;", "a <b> 中"),
        ("# one\n#* two\n: three", "- one\n- two\nthree"),
        ("''a'' '''b''' '''''c''''' d's", "a b c d's"),
        ("== H ==\n\n== I ==\ntext", "I\n\ntext"),
        ("text\n== H ==\n", "text"),
        ("x<ref>y", "x<ref>y"),  # never closed: what it is cannot be known
        ("__NOTOC__\nx", "x"),
        ("", ""),
    ],
)
def test_plain(markup: str, text: str) -> None:
    assert plain(markup) == text


@settings(max_examples=150)
@given(st.lists(st.sampled_from(MARKS)).map("".join))
def test_any_markup_becomes_something(markup: str) -> None:
    text = plain(markup)
    assert text == text.strip() and not any(c in text for c in "\x00\x02\x03")
    assert "\n\n\n" not in text


def test_a_broken_dump_is_named(make: Callable[[str, list[Page]], Path], tmp_path: Path) -> None:
    path = make("enwiki", [("Oriole", 0, ORIOLE), ("Willow", 0, "A '''willow''' is a tree.")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"enwiki.*no whole MediaWiki dump.*copy or download it again"):
        list(read_dump(path))
    path.write_bytes(bz2.compress(bz2.decompress(whole)[:-400]))
    with pytest.raises(DataError, match="no whole MediaWiki dump"):
        list(read_dump(path))
    other = tmp_path / "feed.xml"
    other.write_text("<rss><item/></rss>")
    assert not is_dump(other) and not is_dump(tmp_path / "missing.xml.bz2") and not is_dump(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"feed\.xml is no whole MediaWiki dump"):
        list(read_dump(other))
    path.write_bytes(b"not bz2 at all, but long enough to be looked at")
    assert not is_dump(path)
    with pytest.raises(DataError, match="copy or download it again"):
        list(read_dump(path))


def test_memory_does_not_grow_with_the_dump(make: Callable[[str, list[Page]], Path]) -> None:
    """mwxml alone keeps an empty element for each page that it has read."""

    def peak(pages: int) -> int:
        path = make("enwiki", [(f"Oriole {n}", 0, "A '''bird'''." + " It sings." * 20) for n in range(pages)])
        next(read_entries(path))  # modules and caches are loaded
        tracemalloc.start()
        assert sum(1 for _ in read_entries(path)) == pages
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(1200) < peak(100) + 200_000


def test_questions(make: Callable[[str, list[Page]], Path]) -> None:
    assert sum(map(len, QUESTIONS.values())) == 20
    assert all(form.count("{}") == 1 for forms in QUESTIONS.values() for form in forms)
    path = make("enwiki", [("Oriole (bird)", 0, ORIOLE), ("List of birds", 0, ORIOLE), ("Wren", 0, "A bird.")])
    (chat,) = read_questions(path, seed=3)
    asked, answer = chat.messages
    assert (asked.role, answer.role, chat.lang, chat.source) == ("user", "assistant", "en", "enwiki")
    assert asked.content in {form.format("Oriole") for form in QUESTIONS["en"]}
    assert answer.content == ORIOLE_PLAIN.split("\n\n")[0]
    assert list(read_questions(path, seed=3)) == [chat]
    entries = [Entry(f"鸟{n}", "这是一种会唱歌的小鸟，" * 4 + "很好听。", "zhwiki", "zh") for n in range(200)]
    chats = [question(entry) for entry in entries]
    forms = {chat.messages[0].content.replace(e.title, "{}") for chat, e in zip(chats, entries, strict=True) if chat}
    assert forms == set(QUESTIONS["zh"])


@pytest.mark.parametrize("stop", ["。", ". "])
def test_a_long_answer_ends_with_a_sentence(stop: str) -> None:
    long = Entry("Oriole", ("a long sentence about birds" + stop) * 60, "enwiki", "en")
    chat = question(long)
    assert chat is not None
    answer = chat.messages[1].content
    assert ANSWER_CHARS - 40 < len(answer) <= ANSWER_CHARS and answer.endswith(stop.strip())
    assert question(Entry("Oriole", "no end " * 200, "enwiki", "en")) is None
    assert question(Entry("Pirol", "Ein Vogel, der singt und in Bäumen lebt.", "dewiki", "")) is None
