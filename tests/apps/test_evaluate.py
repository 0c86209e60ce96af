"""Exact match and loop rate, against hand-made cases."""

import json
from pathlib import Path

import pytest

from oriole.apps.api import Oriole
from oriole.apps.evaluate import evaluate_questions, read_questions
from oriole.errors import DataError
from oriole.text.judge import loops


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
