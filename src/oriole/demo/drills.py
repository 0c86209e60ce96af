"""Dictation: the language lab's oldest drill. Something is read out, and read back word for word.

The things read out are drawn at random, so that nothing but listening helps: it is here that a model learns to say a
name after somebody, which every answer about somebody needs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from oriole.demo.prose import Text
from oriole.demo.values import Lang

_WORDS: dict[Lang, tuple[str, ...]] = {
    "en": (
        "Read after me: {x}.\nI read: {x}.",
        "The teacher writes {x} on the board. The pupils copy: {x}.",
        "Dictation of the day: {x}. The best pupil wrote: {x}.",
        "On the list stands: {x}. At the market she asks for {x}.",
    ),
    "zh": (
        "跟我读：{x}。\n我读：{x}。",
        "老师在黑板上写：{x}。学生们抄下来：{x}。",
        "今天的听写是：{x}。写得最好的学生写道：{x}。",
        "单子上写着：{x}。到了市场，她照着念：{x}。",
    ),
}
_NAMES: dict[Lang, tuple[str, ...]] = {
    "en": (
        "The teacher calls out: {x}. They answer one after the other: {x}.",
        "Guests today: {x}. The host greets them by name: {x}.",
        "Hello, {a}! Hello, {b}! Today {a} and {b} sit side by side.",
        "On the door stands {a}. Inside waits {a}, and with {a} waits {b}.",
    ),
    "zh": (
        "老师点名：{x}。大家一个接一个地答到：{x}。",
        "今天的客人有：{x}。主人一一叫出他们的名字：{x}。",
        "你好，{a}！你好，{b}！今天{a}和{b}坐在一起。",
        "门上写着{a}。屋里等着的正是{a}，和{a}一起等的是{b}。",
    ),
}


def drill_texts(
    words: Sequence[str], names: Sequence[str], lang: Lang, count: int, rng: random.Random
) -> Iterator[Text]:
    """`count` dictations, two of words for every one of names."""
    comma = "、" if lang == "zh" else ", "
    for number in range(count):
        if number % 3 < 2:
            form, pool = rng.choice(_WORDS[lang]), words
        else:
            form, pool = rng.choice(_NAMES[lang]), names
        if number % 6 == 0:
            pool = [str(n) for n in range(101)]
        chosen = rng.sample(pool, rng.randint(2, 5))
        yield Text(form.format(x=comma.join(chosen), a=chosen[0], b=chosen[1]), "drills")
