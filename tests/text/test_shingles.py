"""n-grams hashed by the batch are those that a loop over tokens makes, whatever the texts beside them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oriole.text import shingles
from oriole.text.shingles import batches, grams, tokens

TEXTS = st.lists(
    st.text(st.one_of(st.sampled_from("ab 的一.\n"), st.characters()), max_size=40)
    | st.text(st.sampled_from("word 字字ab,"), max_size=200),
    max_size=12,
)


def expected(text: str, n: int) -> list[tuple[str, ...]]:
    words = [word for word, _, _ in tokens(text)]
    return [tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))] if words else []


@given(TEXTS, st.integers(1, 14))
def test_equal_hashes_are_equal_n_grams(texts: list[str], n: int) -> None:
    found = grams(texts, n)
    names: dict[int, tuple[str, ...]] = {}
    numbers: dict[tuple[str, ...], int] = {}
    for row, text in enumerate(texts):
        hashes, wanted = found.of(row).tolist(), expected(text, n)
        assert len(hashes) == len(wanted)
        for number, name in zip(hashes, wanted, strict=True):
            assert names.setdefault(number, name) == name
            assert numbers.setdefault(name, number) == number
        assert found.set_of(row).tolist() == sorted(set(hashes))
        assert found.places(row).tolist() == [begin for _, begin, _ in tokens(text)][: len(hashes)]


@given(TEXTS, st.integers(1, 14))
def test_a_hash_does_not_depend_on_the_batch(texts: list[str], n: int) -> None:
    together = grams(texts, n)
    for row, text in enumerate(texts):
        assert together.of(row).tolist() == grams([text], n).of(0).tolist()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Chess is a game, it's old!", ["chess", "is", "a", "game", "it", "s", "old"]),
        ("两个黄鹂，鸣翠柳", list("两个黄鹂鸣翠柳")),
        ("用Python3写 ＡＢＣ", ["用", "python3", "写", "abc"]),
        ("カナ한국어 ไทย", ["カ", "ナ", "한국어", "ไ", "ท", "ย"]),
        ("Ünïcode E\u0301t", ["ünïcode", "e\u0301t"]),
        ("…!?\n\t😀", []),
        ("𠀀𠀁\U000e0041", ["𠀀", "𠀁"]),
    ],
)
def test_tokens(text: str, words: list[str]) -> None:
    assert [word for word, _, _ in tokens(text)] == words
    for word, begin, end in tokens(text):
        assert len(word) == end - begin
    assert tokens(text, 0, 2) == tokens(text)[:2]


def test_short_texts_are_one_n_gram_and_empty_ones_none() -> None:
    found = grams(["", "a b", "A, B!", "a b c", "!?", "a b c d e", "a b c d e f"], 5)
    assert np.diff(found.rows).tolist() == [0, 1, 1, 1, 0, 1, 2]
    assert found.of(1) == found.of(2) != found.of(3)


def test_only_the_beginning_of_a_very_long_text_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shingles, "LONGEST", 100)
    one, other = "字" * 100 + "甲", "字" * 100 + "乙"
    assert grams([one], 5).set_of(0).tolist() == grams([other], 5).set_of(0).tolist()


def test_batches_keep_the_order_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shingles, "BATCH_CHARS", 50)
    items: list[Any] = [(n, "x" * (n % 17)) for n in range(100)]
    out = list(batches(iter(items)))
    assert [(key, text) for keys, texts in out for key, text in zip(keys, texts, strict=True)] == items
    assert len(out) > 5 and all(sum(map(len, texts)) < 50 + 17 for _, texts in out)
