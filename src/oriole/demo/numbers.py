"""Arithmetic within 100. Answers show the working, tens and units apart: 27+45=60+12=72, 72-45=32-5=27."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from oriole.demo.prose import Text
from oriole.demo.values import Lang


class Sum(NamedTuple):
    """a+b or a-b."""

    a: int
    sign: str
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b

    @property
    def question(self) -> str:
        return f"{self.a}{self.sign}{self.b}"

    @property
    def pair(self) -> tuple[int, str, int]:
        """The operand pair: a+b and b+a are one."""
        if self.sign == "+":
            return min(self.a, self.b), "+", max(self.a, self.b)
        return self.a, "-", self.b

    def worked(self) -> str:
        """The equation with one step of working, where there is one."""
        step = self.step()
        middle = f"{step.question}=" if step else ""
        return f"{self.question}={middle}{self.result}"

    def step(self) -> Sum | None:
        """What is left after the tens: a sum of tens and units, or a difference of units."""
        if self.sign == "-":
            if self.b < 10 or self.b % 10 == 0:
                return None
            return Sum(self.a - self.b // 10 * 10, "-", self.b % 10)
        if (self.a < 10 and self.b < 10) or (self.a % 10 == 0 and self.b % 10 == 0):
            return None
        step = Sum(self.a // 10 * 10 + self.b // 10 * 10, "+", self.a % 10 + self.b % 10)
        return None if step.pair == self.pair else step


@dataclass(frozen=True)
class Sums:
    """All sums within 100, those for training and those never shown."""

    train: tuple[Sum, ...]
    held_out: tuple[Sum, ...]


def split_sums(seed: int = 0, share: float = 0.1) -> Sums:
    """Held out is a tenth of the operand pairs that have working; a step of working is never held out."""
    rng = random.Random(f"sums {seed}")
    additions = [Sum(a, "+", b) for a in range(101) for b in range(a, 101 - a)]
    subtractions = [Sum(a, "-", b) for a in range(101) for b in range(a + 1)]
    train: list[Sum] = []
    held_out: list[Sum] = []
    for every in (additions, subtractions):
        hidden = set(rng.sample([each for each in every if _may_hide(each)], round(share * len(every))))
        for each in every:
            (held_out if each in hidden else train).append(each)
    return Sums(tuple(train), tuple(held_out))


def _may_hide(each: Sum) -> bool:
    if each.sign == "-":
        return each.b > 10 and each.b % 10 != 0 and each.a > each.b
    return each.b > 10 and each.a % 10 != 0 and each.b % 10 != 0


def turned(each: Sum, rng: random.Random) -> Sum:
    """The same addition, perhaps with its operands exchanged."""
    return Sum(each.b, "+", each.a) if each.sign == "+" and rng.random() < 0.5 else each


_QUESTIONS: dict[Lang, tuple[str, ...]] = {
    "en": ("{q}{s}=?", "What is {q}?", "How much is {q}?", "Please work out {q}."),
    "zh": ("{q}{s}=?", "{q}{s}等于多少？", "{q}{s}是多少？", "请算一下{s}{q}。"),
}
"""q: the sum; s: a space between it and Chinese, if it has spaces of its own."""


def ask(each: Sum, lang: Lang, rng: random.Random) -> str:
    """A question in one of its forms, every other one with spaces: 27 + 15. Which is a matter of its characters, so
    that it takes no random number, and tells nothing of the answer."""
    form = rng.choice(_QUESTIONS[lang])
    tight = form.format(q=each.question, s="")
    if zlib.crc32(tight.encode()) % 2:
        return tight
    return form.format(q=f"{each.a} {each.sign} {each.b}", s=" ")


_ASKED = re.compile(r"(\d+) ?([+-]) ?(\d+)")


def unasked(pool: Iterable[Sum], texts: Iterable[str]) -> list[Sum]:
    """The sums of the pool that stand in none of the texts, in no order of the operands."""
    asked = {Sum(int(a), sign, int(b)).pair for text in texts for a, sign, b in _ASKED.findall(text)}
    return [each for each in pool if each.pair not in asked]


def answers(each: Sum) -> list[str]:
    """The canonical answer first, then the shorter ones that are right as well."""
    return list(dict.fromkeys([each.worked(), f"{each.question}={each.result}", str(each.result)]))


_TITLES: dict[Lang, tuple[str, ...]] = {
    "en": ("Sums for today:", "From the exercise book:", "Practice:"),
    "zh": ("今天的口算：", "练习本：", "算一算："),
}


def sum_texts(sums: Sums, lang: Lang, count: int, rng: random.Random) -> Iterator[Text]:
    """Pages of worked sums, seven to a page; every third sum is a small one without working."""
    with_step = [each for each in sums.train if each.step()]
    small = [each for each in sums.train if not each.step()]
    for _ in range(count):
        lines = [rng.choice(_TITLES[lang])] if rng.random() < 0.2 else []
        for place in range(7):
            each = turned(rng.choice(small if place % 4 == 3 else with_step), rng)
            lines.append(each.worked())
        yield Text("\n".join(lines), "arithmetic")
