"""Rules that say how good an answer is, with no model: right or wrong where that can be checked, and how it is said.

What is checked: exact match with accepted answers, arithmetic, the language of the question, repetition, form (it
ended, says something, and holds no debris). Rewards, the gate after a preference stage and `oriole data prefer` all
judge by `judge`; the single rules are functions of their own.
"""

import ast
import operator
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from statistics import fmean
from typing import Literal

from oriole.text.rulescode import without_code
from oriole.text.template import Message
from oriole.text.tokenizer import RESERVED

__all__ = [
    "Judgement", "arithmetic_right", "asked_value", "exact_match", "judge", "language_fits", "loops", "normalise",
    "repetition", "units", "well_formed",
]  # fmt: skip

LONGEST_NGRAM, REPEATS = 8, 4
"""What a loop is: an n-gram of at most so many tokens, so many times in a row."""

REPEATED_NGRAM = 4
"""`repetition` counts n-grams of so many units."""

LONGEST_QUESTION, LONGEST_ANSWER = 200, 2000
"""Characters of a sum that is asked for, and of an answer to it; what is longer is no sum, and no right answer."""


# --- accepted answers ------------------------------------------------------------------------------------------------

_CJK = r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]"
_SPACE_AT_CJK = re.compile(rf"(?<={_CJK}) | (?={_CJK})")
_FINAL = ".。!?,，;；:：、…~ "


def normalise(text: str) -> str:
    """What exact match compares: NFKC, case folded, spaces single (none beside Chinese), no final punctuation."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _SPACE_AT_CJK.sub("", " ".join(text.split()))
    return text.rstrip(_FINAL) or text


def exact_match(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer is one of the accepted ones, once both are normalised."""
    return normalise(answer) in {normalise(a) for a in accepted}


# --- repetition ------------------------------------------------------------------------------------------------------

_UNIT = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W\u3400-\u9fff\uf900-\ufaff]+|([^\w\s])\1*")


def loops(ids: Sequence[object]) -> bool:
    """Whether an n-gram of 1 to 8 ids repeats four times in a row."""
    for n in range(1, LONGEST_NGRAM + 1):
        run = 0  # ids in a row that equal the one n before them
        for before, now in zip(ids, ids[n:], strict=False):
            run = run + 1 if before == now else 0
            if run == n * (REPEATS - 1):
                return True
    return False


def units(text: str) -> list[str]:
    """Han characters, words, and runs of one sign: what repeats, where no tokenizer is at hand."""
    return [found[0] for found in _UNIT.finditer(text)]


def repetition(text: str) -> float:
    """How much of a text repeats, from 0 to 1: 1 for a loop, else the share of 4-grams of units that occurred before.

    seq-rep-4 of Welleck et al. (arXiv:1908.04319), section 6, on Han characters and words.
    """
    found = units(text)
    if loops(found):
        return 1.0
    grams = [tuple(found[i : i + REPEATED_NGRAM]) for i in range(len(found) - REPEATED_NGRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


# --- language --------------------------------------------------------------------------------------------------------

_HAN = re.compile(r"[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_WORD = re.compile(r"[A-Za-z\u00c0-\u024f']+")
_FRAME = frozenset("what how is are does do mean say word the a of in for to please translate define about".split())
_QUOTED = re.compile('"[^"\n]*"|“[^”\n]*”|「[^」\n]*」|『[^』\n]*』|《[^》\n]*》')
_HAN_SHARE = 0.2  # as in text.clean.language
_TARGET = re.compile(
    r"(?P<zh>\b(?:in|into|to) (?:simplified |traditional )?(?:chinese|mandarin)\b|\bchinese (?:for|word|name)\b"
    r"|[用译翻成为的](?:成|为)?(?:中文|汉语)|中文(?:怎么|是什么))"
    r"|(?P<en>\b(?:in|into|to) english\b|\benglish (?:for|word|name)\b|[用译翻成为的](?:成|为)?英[文语]"
    r"|英[文语](?:怎么|是什么))",
    re.IGNORECASE,
)


def _language(text: str) -> Literal["zh", "en", ""]:
    """The language that frames a text, quotations and code left out where anything else is said; "" without letters."""
    text = without_code(text).strip() or text
    bare = _QUOTED.sub(" ", text)
    text = bare if _HAN.search(bare) or _LATIN.search(bare) else text
    han, words = len(_HAN.findall(text)), _WORD.findall(text)
    if not han:
        return "en" if words else ""
    if han <= 3 * len(words) and sum(word.lower() in _FRAME for word in words) >= 2:
        return "en"  # What is 苹果?
    return "zh" if han > _HAN_SHARE * (han + len(_LATIN.findall(text))) else "en"


def language_fits(messages: Sequence[Message], answer: str) -> bool:
    """Whether an answer is in the language that the last user's message is in, or asks for (a translation).

    An answer without letters ("72") is in every language, and so is one to messages without any.
    """
    asked = next((m.content for m in reversed(messages) if m.role == "user"), "")
    own = _language(answer)
    framed = next((lang for m in reversed(messages) if m.role == "user" and (lang := _language(m.content))), "")
    if not own or not framed:
        return True
    target = _TARGET.search(asked)
    if target is None:
        return own == framed
    wanted = target.lastgroup
    script = _HAN if wanted == "zh" else _LATIN
    return own == wanted or (own == framed and script.search(answer) is not None)


# --- form ------------------------------------------------------------------------------------------------------------

_DEBRIS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]|" + "|".join(map(re.escape, RESERVED)))


def well_formed(answer: str, *, ended: bool = True) -> bool:
    """Whether an answer says something, came to its end mark, and holds no broken characters or role marks."""
    return ended and bool(answer.strip()) and _DEBRIS.search(answer) is None


# --- arithmetic ------------------------------------------------------------------------------------------------------

_SPOKEN = (
    (re.compile(r"(?<=\d)\s*(?:[×xX*]|times|multiplied by|乘以|乘上|乘)\s*(?=[-(\d])"), "*"),
    (re.compile(r"(?<=\d)\s*(?:÷|divided by|除以)\s*(?=[-(\d])"), "/"),
    (re.compile(r"(?<=\d)\s*(?:plus|加上|加)\s*(?=[-(\d])"), "+"),
    (re.compile(r"(?<=\d)\s*(?:[−–—]|minus|减去|减)\s*(?=[-(\d])"), "-"),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
)
_NUMBER = r"\d+(?:\.\d+)?"
_EXPRESSION = re.compile(
    rf"(?<![A-Za-z_\d.)])[-(\s]*{_NUMBER}(?:[\s)]*[-+*/][-(\s]*{_NUMBER})*(?:\s*\))*(?![A-Za-z_]|\.?\d)"
)
_ASKING = re.compile(  # atomic and possessive: no word is tried in two ways
    r"(?>please|what is|what's|whats|how much is|how many is|work out|calculate|compute|evaluate|solve|find|tell me"
    r"|equals?|can you|could you|the (?:value|result|answer|sum|product) of|and|now|请问|请|帮我|你能|能|算一下|算算"
    r"|算出|计算|算|一下|等于|得|多少|几|是|结果|的|和|为|吗|呢|吧|[\s=?？!！.。,，:：;；'\"“”])*+",
    re.IGNORECASE,
)
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def asked_value(question: str) -> Fraction | None:
    """What the calculation comes to that is all a question asks for ("27+45=?", "请算一下 3×4。"), else None."""
    text = _spelled(question)
    if len(text) > LONGEST_QUESTION:
        return None
    found = [m for m in _EXPRESSION.finditer(text) if re.search(r"\d[\s)]*[-+*/]", m[0])]
    if len(found) != 1:
        return None
    rest = text[: found[0].start()] + " " + text[found[0].end() :]
    return _value(found[0][0]) if _ASKING.fullmatch(rest) else None


def arithmetic_right(question: str, answer: str) -> bool | None:
    """Whether the answer ends in the right number and every equation in it holds; None where no sum was asked."""
    expected = asked_value(question)
    if expected is None:
        return None
    text = _spelled(answer)
    if len(text) > LONGEST_ANSWER:
        return False
    found = list(_EXPRESSION.finditer(text))
    if not found or not re.fullmatch(r"[-\s]*[\d.]+\s*", found[-1][0]):
        return False
    for one, two in pairwise(found):
        if text[one.end() : two.start()].strip() == "=" and _value(one[0]) != _value(two[0]):
            return False
    return _value(found[-1][0]) == expected


def _spelled(text: str) -> str:
    """The text with its calculations in + - * / and plain digits."""
    text = unicodedata.normalize("NFKC", text)
    for pattern, sign in _SPOKEN:
        text = pattern.sub(sign, text)
    return text


def _value(expression: str) -> Fraction | None:
    """What an expression of numbers, + - * / and brackets comes to, exactly; None where it is none or divides by 0."""
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", expression.strip())  # 07 is no number to Python
    if len(plain) > LONGEST_QUESTION:
        return None
    try:
        return _evaluate(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ZeroDivisionError, ValueError, RecursionError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as value):
            return Fraction(str(value))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return Fraction(_OPERATORS[type(op)](_evaluate(left), _evaluate(right)))
        case _:
            raise ValueError("not a calculation")


# --- all together ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """What the rules say about one answer."""

    correct: bool | None
    """Whether it is right, by accepted answers or arithmetic; None where neither can say."""
    language: bool
    """It is in the language of the question."""
    repetition: float
    """0 (none) to 1 (a loop)."""
    form: bool
    """It ended, says something and holds no debris."""

    @property
    def score(self) -> float:
        """From 0 to 1: half for being right, where that can be said, and half (or all) for how it is said.

        How it is said is the mean of language, form and 1 - repetition; of an answer that is not well formed, 0:
        silence breaks no other rule.
        """
        manner = fmean((float(self.language), 1.0 - self.repetition, 1.0)) if self.form else 0.0
        return manner if self.correct is None else 0.5 * manner + 0.5 * self.correct


def judge(messages: Sequence[Message], answer: str, *, accepted: Sequence[str] = (), ended: bool = True) -> Judgement:
    """All rules about the `answer` to the last of `messages`; `accepted` are right answers, where some are known.

    `ended`: whether the end mark came within the tokens that were allowed.
    """
    asked = next((m.content for m in reversed(messages) if m.role == "user"), "")
    correct = arithmetic_right(asked, answer)
    if accepted:
        correct = exact_match(answer, accepted) or bool(correct)
    return Judgement(
        correct=correct,
        language=language_fits(messages, answer),
        repetition=repetition(answer),
        form=well_formed(answer, ended=ended),
    )
