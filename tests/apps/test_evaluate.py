"""Exact match and loop rate, against hand-made cases."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oriole.apps.api import Oriole
from oriole.apps.evaluate import evaluate_questions, exact_match, loops, normalise, read_questions
from oriole.errors import DataError


@pytest.mark.parametrize(
    "answer, accepted, right",
    [
        ("Paris.", "paris", True),
        ("  Paris \n", "Paris", True),
        ("New   York!", "new york", True),
        ("NewYork", "New York", False),
        ("ＡＢＣ１２", "abc12", True),
        ("北京。", "北京", True),
        ("北京 ！", "北京", True),
        ("3 个苹果", "3个苹果", True),
        ("三个苹果", "3个苹果", False),
        ("The capital is Paris.", "Paris", False),
        ("", "Paris", False),
        ("?!", "?!", True),
        ("3.5", "35", False),
        ("a, b", "a b", False),
    ],
)
def test_exact_match(answer: str, accepted: str, right: bool) -> None:
    assert exact_match(answer, ["something else", accepted]) is right
    assert exact_match(accepted, [answer]) is right


@given(st.text(max_size=40))
def test_normalise_is_stable_and_blind_to_what_does_not_count(text: str) -> None:
    once = normalise(text)
    assert normalise(f"  {text}\n") == once
    if once.strip(".。!?,;:、…~ "):
        assert normalise(text + "。") == normalise(text + " !") == once


def slow_loops(ids: list[int]) -> bool:
    return any(
        ids[i : i + n] * 4 == ids[i : i + 4 * n] for n in range(1, 9) for i in range(len(ids) - 4 * n + 1)
    )  # fmt: skip


@given(st.lists(st.integers(0, 2), max_size=40))
def test_loops_match_the_definition(ids: list[int]) -> None:
    assert loops(ids) is slow_loops(ids)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 5))
def test_four_times_is_a_loop_and_three_times_of_distinct_ids_is_not(ngram: list[int], shift: int) -> None:
    before = list(range(100, 100 + shift))
    assert loops([*before, *ngram * 4, 99])
    distinct = list(range(len(ngram)))
    assert not loops([*before, *distinct * 3, 99])
    assert not loops(list(range(9)) * 5), "nine ids are no n-gram of at most eight"


def question(kind: str, lang: str, text: str, answers: list[str]) -> dict[str, object]:
    return {"kind": kind, "lang": lang, "messages": [{"role": "user", "content": text}], "answers": answers}


def test_answers_are_those_of_generate_and_shares_are_counted_by_hand(oriole: Oriole) -> None:
    texts = ["sing", "窗", "blue sky", "白鹭上青天", "two", "船"]
    own = [oriole.generate(t, temperature=0.0, max_new_tokens=64) for t in texts]
    questions = [
        question("a", "en", texts[0], [own[0]]),
        question("a", "zh", texts[1], ["no", own[1]]),
        question("a", "en", texts[2], ["no"]),
        question("a", "zh", texts[3], [own[3]]),
        question("b", "en", texts[4], ["no"]),
        question("b", "zh", texts[5], [own[5]]),
    ]
    result = evaluate_questions(oriole, questions, batch=4)
    assert [a["answer"] for a in result["answers"]] == own
    assert [a["correct"] for a in result["answers"]] == [True, True, False, True, False, True]
    assert result["exact_match"] == {
        "en": 0.25,
        "zh": 1.0,
        "by_kind": {"a": {"en": 0.5, "zh": 1.0}, "b": {"en": 0.0, "zh": 1.0}},
    }
    assert json.loads(json.dumps(result)) == result


def test_an_answer_without_an_end_counts_as_a_loop(oriole: Oriole) -> None:
    ended, endless = 0, 0
    questions = [question("a", "en", f"sing {i}", ["x"]) for i in range(40)]
    result = evaluate_questions(oriole, questions)
    for a in result["answers"]:
        ids = oriole.tokenizer.encode(a["answer"])
        if a["loop"]:
            endless += 1
        else:
            ended += 1
            assert len(ids) < 64 and not loops(ids)
    assert result["loop_rate"] == round(endless / 40, 4) > 0
    stopping = Oriole(oriole.folder)
    stopping.stop_ids = tuple(range(500))  # every id ends it: an empty answer, and no loop
    assert evaluate_questions(stopping, questions)["loop_rate"] == 0.0


def test_read_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    good = question("a", "zh", "几点了？", ["三点"])
    path.write_text(json.dumps(good, ensure_ascii=False) + "\n\n" + json.dumps(good) + "\n", encoding="utf-8")
    assert read_questions(path) == [good, good]
    for bad in (
        {"messages": []},
        {"messages": [{"role": "user", "content": "a"}], "answers": []},
        {"messages": [{"role": "assistant", "content": "a"}], "answers": ["b"]},
        {"messages": [{"role": "user", "content": "a"}], "answers": [1]},
        {"messages": [{"role": "user"}], "answers": ["b"]},
        ["a"],
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"q\.jsonl, line 2: "):
            read_questions(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no questions"):
        read_questions(path)
