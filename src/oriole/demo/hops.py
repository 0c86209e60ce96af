"""Questions that take several steps and are answered in one go: chains of relations in the valley, and long sums.

`Who is the brother of the best friend of Lin Xiaoyu?` is two steps, `7+5-3+8=?` three. Every single step is shown in
training; of the longer questions a share is held out, each with the chain and the person, or the sum, that it is about.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oriole.demo.prose import kin_name
from oriole.demo.values import Lang, Pair
from oriole.demo.world import World

__all__ = ["Question", "chains", "split_questions", "sums"]


@dataclass(frozen=True)
class Question:
    """One question with its answer; how many steps it takes."""

    kind: str
    """chain or sum."""
    steps: int
    text: str
    answer: str


def chains(world: World, steps: int, lang: Lang) -> Iterator[Question]:
    """Every question about somebody who is `steps` relations away, nobody being met twice on the way."""
    people = {person.name: person for person in world.people}

    def walk(way: tuple[Pair, ...], relations: tuple[str, ...]) -> Iterator[Question]:
        if len(relations) == steps:
            yield Question("chain", steps, _ask(way[0], relations, lang), way[-1].of(lang))
            return
        person = people[way[-1]]
        for relation, other in {**person.kin, "friend": person.facts["friend"]}.items():
            if other not in way:
                yield from walk((*way, other), (*relations, relation))

    for name in people:
        yield from walk((name,), ())


def _ask(name: Pair, relations: Sequence[str], lang: Lang) -> str:
    named = {"zh": "好朋友", "en": "best friend"}
    words = [named[lang] if relation == "friend" else kin_name(relation, lang) for relation in relations]
    if lang == "zh":
        return "的".join([name.zh, *words]) + "是谁？"
    return "Who is " + "".join(f"the {word} of " for word in reversed(words)) + f"{name.en}?"


def sums(steps: int, count: int, rng: random.Random, most: int = 30) -> Iterator[Question]:
    """`count` sums of so many additions and subtractions of 1 … 9, all different, that stay within 0 … `most`; fewer
    where there are not so many."""
    seen: set[str] = set()
    for _ in range(20 * count):
        if len(seen) == count:
            return
        total = rng.randint(0, most)
        text = str(total)
        for _ in range(steps):
            b = rng.randint(1, 9)
            sign = rng.choice([s for s in (1, -1) if 0 <= total + s * b <= most])
            total += sign * b
            text += f"{'+' if sign > 0 else '-'}{b}"
        if text not in seen:
            seen.add(text)
            yield Question("sum", steps, f"{text}=?", str(total))


def split_questions(
    questions: Sequence[Question], share: float, rng: random.Random
) -> tuple[list[Question], list[Question]]:
    """Those to train on and those held out: a `share` of the questions that take more than one step, by their text."""
    long = sorted({q.text for q in questions if q.steps > 1})
    hidden = set(rng.sample(long, round(share * len(long))))
    return [q for q in questions if q.text not in hidden], [q for q in questions if q.text in hidden]
