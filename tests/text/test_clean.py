"""Light cleaning: what must go, what must never be touched, and that doing it twice changes nothing."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oriole.text.clean import language, normalise

# Text near the edges: controls, marks, blanks and line ends are common in it, surrogates included.
MESSY = st.text(
    st.one_of(
        st.sampled_from(
            "\n\n\n\r\t \u3000\u00a0\v\f\x00\x1b\x7f\x85\x9f\ufeff\u200d\u0301\u0308e\u1100\u1161，。 ab春"
        ),
        st.characters(),
        st.integers(0xD800, 0xDFFF).map(chr),
    )
)


@pytest.mark.parametrize(
    "text",
    [
        "Chess is a glass board. cats, dogs",  # an earlier system made "Chesisa，glasboard.catsdogs" of it
        "Chess is a glass board.  Two spaces; it's fine -- really: 1,000.50!",
        "def f(x):\n    if x:\n\treturn {'a': [1, 2]}  # 注释，全角。\n\n\nclass A:\n    pass\n",
        "　　段首的全角空格，和“引号”、《书名》；１２３ＡＢＣ都不变。",
        "春天来了。\n\n第二段 with English 混排, ok?",
        "👩\u200d👧 家",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "",
    ],
)
def test_good_text_is_not_touched(text: str) -> None:
    assert normalise(text) == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\r\nb\rc\r\r\nd", "a\nb\nc\n\nd"),
        ("page one\fpage two\vthree\x85four", "page one\npage two\nthree\nfour"),
        ("\ufeffa\x00b\x1b[0m\x7fc\u0080", "ab[0mc"),
        ("\ufeffa\ufeff", "a"),
        ("a \t\nb\u3000\u00a0\n  c  ", "a\nb\n  c"),
        ("a\n\n\n\n\n\nb", "a\n\n\nb"),
        ("a\n \n\t\n  \n \nb", "a\n\n\nb"),
        ("\n\n\n\na", "\n\na"),
        ("e\u0301 Å", "é Å"),
        ("e\x00\u0301", "é"),
        ("a\ud800b", "a\ufffdb"),
    ],
)
def test_what_goes(text: str, clean: str) -> None:
    assert normalise(text) == clean


@given(MESSY)
@example("\n\r\n\x00\n \n\n")
def test_twice_is_once(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


@given(MESSY)
def test_the_result_is_tidy(text: str) -> None:
    clean = normalise(text)
    clean.encode("utf-8")  # raises for a lone surrogate
    assert unicodedata.is_normalized("NFC", clean)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in clean) and "\ufeff" not in clean
    lines = clean.split("\n")
    assert not any(line.endswith((" ", "\t")) for line in lines)
    assert all(any(lines[i : i + 3]) for i in range(len(lines) - 3))  # the last may be the end of the last line


@given(MESSY)
def test_no_visible_character_is_lost(text: str) -> None:
    def visible(s: str) -> str:
        return "".join(c for c in s if not c.isspace() and c != "\ufeff" and unicodedata.category(c) != "Cc")

    whole = "".join("\ufffd" if unicodedata.category(c) == "Cs" else c for c in text)
    without = "".join(c for c in whole if c in "\n\t\r\v\f\x85\ufeff" or unicodedata.category(c) != "Cc")
    expected = unicodedata.normalize("NFC", without.replace("\ufeff", ""))
    assert visible(normalise(text)) == visible(expected)


@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=1), min_size=1))
def test_single_spaces_between_words_stay(words: list[str]) -> None:
    assert normalise(" ".join(words)) == " ".join(words)


@pytest.mark.parametrize(
    ("text", "lang"),
    [
        ("两个黄鹂鸣翠柳", "zh"),
        ("Two orioles sing in the green willows.", "en"),
        ("使用 `SHOW CONFIG` 语句查看 TiDB 集群的配置。", "zh"),
        ("黄鹂 oriole", "zh"),
        ("黄鹂 oriole bird", "en"),
        ("The word 黄鹂 means oriole in Chinese, as everyone knows.", "en"),
        ("黃鸝 𠀀", "zh"),
        ("12 + 34 = 46 ?!", "en"),
        ("", "en"),
        ("a" * 20_000 + "春" * 8_000, "zh"),
        ("春天" + "long English text " * 3_000, "en"),
    ],
)
def test_language(text: str, lang: str) -> None:
    assert language(text) == lang
