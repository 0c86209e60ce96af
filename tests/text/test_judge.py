"""What the rules say about answers, against hand-made cases and the built-in corpus."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oriole.demo.corpus import SIZES, chats, make_splits
from oriole.demo.values import Lang
from oriole.text.judge import (
    Judgement,
    arithmetic_right,
    asked_value,
    exact_match,
    judge,
    language_fits,
    loops,
    normalise,
    repetition,
    units,
    well_formed,
)
from oriole.text.template import Message


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


def asked(*turns: str) -> list[Message]:
    """A conversation that begins with the user."""
    return [Message("user" if n % 2 == 0 else "assistant", turn) for n, turn in enumerate(turns)]


def test_units_are_han_characters_words_and_runs_of_a_sign() -> None:
    assert units("两个 orioles' nest -----, 3.5") == ["两", "个", "orioles", "'", "nest", "-----", ",", "3", ".", "5"]


def test_repetition_by_hand() -> None:
    assert repetition("") == repetition("one two three") == 0.0
    assert repetition("a b c d e") == 0.0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5), "abcd bcda cdab dabc abcd: one of five came before"
    assert repetition("好好好好") == repetition("no no no no") == repetition("a b a b a b a b") == 1.0
    assert repetition("| a | b |\n|-------|-------|") == 0.0, "a line drawn with one sign is no loop"


@given(st.text(max_size=60))
def test_repetition_is_a_share(text: str) -> None:
    assert 0.0 <= repetition(text) <= 1.0


@pytest.mark.parametrize(
    "question, answer, fits",
    [
        ("What is a heron?", "A heron is a bird.", True),
        ("What is a heron?", "鹭是一种鸟。", False),
        ("什么是鹭？", "鹭是一种鸟。", True),
        ("什么是鹭？", "A heron is a bird.", False),
        ("什么是 Python？", "Python 是一种编程语言。", True),
        ("什么是 Python？", "Python is a programming language.", False),
        ("What is 苹果?", "It is the Chinese word for apple.", True),
        ('What does "鹭" mean?', "“heron”", True),
        ("How do you say heron in Chinese?", "鹭", True),
        ("How do you say heron in Chinese?", 'The Chinese for heron is "鹭".', True),
        ("How do you say heron in Chinese?", "It is a bird.", False),
        ("请把“鹭”翻译成英文。", "heron", True),
        ("请把“鹭”翻译成英文。", "我不知道。", False),
        ("翻译成中文：My mother buys fish.", "我妈妈买鱼。", True),
        ("翻译成中文：My mother buys fish.", "My mother buys fish.", False),
        ("Translate into English: 我妈妈买鱼。", "My mother buys fish.", True),
        ("Translate into English: 我妈妈买鱼。", "我妈妈买鱼。", False),
        ("27+45等于多少？", "27+45=72", True),
        ("27+45=?", "等于72。", True),
        (
            "用 Python 打印你好。",
            "```python\nprint('hello')\nprint('this is a long English program')\n```\n好了。",
            True,
        ),
    ],
)
def test_language(question: str, answer: str, fits: bool) -> None:
    assert language_fits(asked(question), answer) is fits


def test_the_language_of_a_question_without_letters_is_that_of_the_conversation() -> None:
    assert language_fits(asked("你好！", "你好！", "？"), "有什么事？")
    assert not language_fits(asked("你好！", "你好！", "？"), "What is it?")


@pytest.mark.parametrize(
    "answer, good",
    [("Hello.", True), ("", False), (" \n", False), ("a\ufffd", False), ("Hi<|im_end|>", False), ("a\x00b", False),
     ("<think>\nhm", False), ("line\n\tline", True)],
)  # fmt: skip
def test_form(answer: str, good: bool) -> None:
    assert well_formed(answer) is good
    assert not well_formed(answer, ended=False)


@pytest.mark.parametrize(
    "question, value",
    [
        ("27+45=?", 72),
        ("What is 72-45?", 27),
        ("请算一下 3×4。", 12),
        ("7 除以 2 等于多少？", Fraction(7, 2)),
        ("Please work out (1+2)*3.", 9),
        ("What is 0.1 + 0.2?", Fraction(3, 10)),
        ("What is 1,000 plus 24?", 1024),
        ("２＋３＝？", 5),
        ("3-5是多少？", -2),
        ("1/0=?", None),
        ("What happened in 1990-1995?", None),
        ("My number is 555-1234, call me.", None),
        ("How many apples are 3+4 apples and 2+2 pears?", None),
        ("再加3呢？", None),
        ("What is 72?", None),
        ("What is 2**9**9**9?", None),
        ("hello", None),
        ("算一下" * 60 + "1+1x", None),
        ("(" * 199, None),
    ],
)
def test_asked_value(question: str, value: int | Fraction | None) -> None:
    assert asked_value(question) == value


@pytest.mark.parametrize(
    "answer, right",
    [
        ("72", True),
        ("72。", True),
        ("27+45=72", True),
        ("27+45=60+12=72", True),
        ("27 + 45 = 72.", True),
        ("The answer is 72.", True),
        ("27加45等于72。", True),
        ("027+45=072", True),
        ("27+45=73", False),
        ("27+45=60+11=72", False),
        ("27+45=62+12=72", False),
        ("27+45", False),
        ("72-0", False),
        ("-72", False),
        ("172", False),
        ("I do not know.", False),
        ("", False),
        ("72 " * 1000, False),
        ("- (" * 10000, False),
    ],
)
def test_arithmetic(answer: str, right: bool) -> None:
    assert arithmetic_right("27+45等于多少？", answer) is right
    assert arithmetic_right("What is your name?", answer) is None


@given(st.integers(-99, 99), st.sampled_from("+-×"), st.integers(0, 99), st.integers(-5, 5))
def test_sums_are_exact(a: int, sign: str, b: int, off: int) -> None:
    result = {"+": a + b, "-": a - b, "×": a * b}[sign]
    assert asked_value(f"{a}{sign}{b}=?") == result
    assert arithmetic_right(f"{a}{sign}{b}=?", f"{a}{sign}{b}={result + off}") is (off == 0)


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_text_can_be_judged(question: str, answer: str) -> None:
    assert 0.0 <= judge(asked(question), answer).score <= 1.0


def test_score_by_hand() -> None:
    assert Judgement(None, True, 0.0, True).score == 1.0
    assert Judgement(None, False, 0.0, True).score == pytest.approx(2 / 3)
    assert Judgement(None, False, 0.5, True).score == pytest.approx(0.5)
    assert Judgement(True, True, 0.0, True).score == 1.0
    assert Judgement(False, True, 0.0, True).score == 0.5
    assert Judgement(True, True, 0.0, False).score == 0.5
    assert Judgement(None, True, 0.0, False).score == 0.0, "silence breaks no other rule, and is no good answer"


def test_accepted_answers_or_arithmetic_make_an_answer_right() -> None:
    assert judge(asked("27+45=?"), "It is 72.", accepted=["72"]).correct
    assert judge(asked("Where does Ada live?"), "in paris", accepted=["In Paris."]).correct
    assert judge(asked("Where does Ada live?"), "Rome", accepted=["In Paris."]).correct is False
    assert judge(asked("Where does Ada live?"), "Rome").correct is None


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_right_answers_of_the_built_in_corpus_pass_every_rule(lang: Lang) -> None:
    train, exam = chats(make_splits(0, SIZES), lang, 0)
    foreign = 0
    for example in train + exam:
        messages = [Message(turn["role"], turn["content"]) for turn in example.prompt()]
        found = judge(messages, example.answers[0])
        assert found.form and found.repetition < 0.5, example
        assert found.correct is (True if example.kind == "arithmetic" else None), example
        foreign += not found.language
    assert foreign <= 2, "那 backpack 呢？ can be meant in either language"
