# ruff: noqa: E501
"""What the quality rules measure, against slow and obvious counts of the same thing."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oriole.text.rulesmeasure import Measures, measure, repeats, word_number

TEXT = st.lists(
    st.sampled_from("the cat sat on a mat don't 3.14 春天 来了 花园 ， 。 ... !! - x_y\n".split(" ")), max_size=60
).map(" ".join)


def words(m: Measures) -> list[str]:
    """The words themselves."""
    start, end = m._spans
    return [m.prose[a:b] for a, b in zip(start.tolist(), end.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("text", "lang", "expected"),
    [
        ("It's 3.14, isn’t it?", "en", ["It's", "3.14", ",", "isn’t", "it", "?"]),
        (
            "Wait... (what?!)  x_y -- U.S.A.",
            "en",
            ["Wait", "...", "(", "what", "?", "!", ")", "x_y", "--", "U.S.A", "."],
        ),
        ("两个黄鹂 鸣叫，\n好abc", "zh", ["两个", "黄鹂", "鸣叫", "，", "好", "abc"]),
        ("", "en", []),
        ("", "zh", []),
    ],
)
def test_words(text: str, lang: str, expected: list[str]) -> None:
    m = measure(text, lang)
    assert words(m) == expected
    assert m.lengths.tolist() == [len(w) for w in expected]
    assert m.numbers.tolist() == [word_number(w) for w in expected]


@settings(deadline=None)
@given(TEXT, st.sampled_from(["zh", "en"]), st.integers(2, 10))
def test_repetition_is_counted_as_by_hand(text: str, lang: str, n: int) -> None:
    m = Measures(text, lang)
    tokens = words(m)
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    share, often = m.top_ngram(n)
    if grams and (top := Counter(grams).most_common(1)[0])[1] > 1:
        assert often == top[1] and share == pytest.approx(len(" ".join(top[0])) * top[1] / len(m.prose))
    else:
        assert (share, often) == (0.0, 1)
    seen: set[tuple[str, ...]] = set()
    chars = at = 0
    while at < len(grams):
        if grams[at] in seen:
            chars += len("".join(grams[at]))
            at += n
        else:
            seen.add(grams[at])
            at += 1
    assert m.dup_ngram(n) == pytest.approx(chars / max(1, len(m.prose)))
    assert all(m.dup_ngram_bound(k) >= m.dup_ngram(n) - 1e-12 for k in range(2, n + 1))
    assert m.longest_ngram(n) == max((len(" ".join(gram)) for gram in grams), default=0)


@settings(deadline=None)
@given(st.text(st.sampled_from("ab 春\n"), max_size=80))
def test_repeated_characters(text: str) -> None:
    m = Measures(text, "zh")
    squeezed = m.prose.lower().replace(" ", "").replace("\n", "").replace("\t", "")
    grams = [squeezed[i : i + 13] for i in range(len(squeezed) - 12)]
    again = sum(v for v in Counter(grams).values() if v > 1)
    expected = again / len(grams) if len(grams) > 1 else 0.0
    assert m.repeated_characters(13) == pytest.approx(expected)


@given(st.lists(st.text(max_size=2)))
def test_repeats(items: list[str]) -> None:
    again = [x for i, x in enumerate(items) if x in items[:i]]
    assert repeats(items) == (len(again), sum(map(len, again)))


def test_prose_is_what_is_no_code() -> None:
    text = "One.\n\n```\ncode\n```\n\n    x = 1\n\n    四个空格的段落\n\n| a |\n|---|\n| 1 |\n\n====\n\n$$\nx^2\n$$\nTwo $y$ three."
    assert Measures(text, "en").lines == ["One.", "四个空格的段落", "Two  three."]
    assert Measures("~~~\nopen to the end", "en").lines == []
