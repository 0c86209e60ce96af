"""Better and worse answers to questions, for preference optimisation."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from oriole.demo.dialogues import Example
from oriole.demo.smalltalk import DONT_KNOW
from oriole.demo.values import Lang

Record = dict[str, object]
_HAN = re.compile(r"[\u4e00-\u9fff]")


def _wrong_number(text: str, rng: random.Random) -> str:
    """The same sum with another result."""
    head, _, tail = text.rpartition("=")
    right = int(tail)
    wrong = max(0, right + rng.choice((-10, -2, -1, 1, 2, 10)))
    return f"{head}={wrong if wrong != right else right + 1}"


def _other_answer(example: Example, pool: Sequence[Example], rng: random.Random) -> str | None:
    """A wrong answer of the right sort: for facts and words the right sentence with another value in it."""
    right = example.answers[0]
    same = [each for each in pool if each.topic == example.topic and each.answers[0] != right]
    place = {"fact": 2, "word": 1}.get(example.kind)
    if place is None:
        same = [each for each in same if _same_script(each.answers[0], right)]
        return rng.choice(same).answers[0] if same else None
    if not example.topic or not same:
        return None
    wrong = right.replace(example.answers[place], rng.choice(same).answers[place])
    wrong = re.sub(r"\ban? (?=[aeio])", "an ", re.sub(r"\ban (?=[^aeio])", "a ", wrong))
    return None if wrong == right else wrong


def _same_script(one: str, other: str) -> bool:
    return bool(_HAN.search(one)) == bool(_HAN.search(other))


def _rejections(
    example: Example, pool: Sequence[Example], twin: Callable[[Example], str | None], rng: random.Random
) -> list[str]:
    """Every way in which an answer to this question may be worse."""
    right = example.answers[0]
    gap = "" if example.lang == "zh" else " "
    out = [gap.join([right] * 3)]
    if example.kind == "arithmetic":
        return [_wrong_number(right, rng), _wrong_number(right, rng), *out]
    if example.kind == "unknown":
        rude = "别烦我。" if example.lang == "zh" else "Leave me alone."
        return [rude, rng.choice([each for each in pool if each.kind == "fact"]).answers[0]]
    # As often the worse side as the better one: a model that mostly hears that it is wrong stops saying so where it is
    # right (docs/log.md).
    if example.kind != "greeting" and rng.random() < 0.3:
        out.append(DONT_KNOW[example.lang][0])
    same = [each for each in pool if each.kind == example.kind and len(each.turns) == len(example.turns)]
    wrong = _other_answer(example, same, rng)
    if wrong:
        out += [wrong, wrong]
    foreign = twin(example)
    if foreign and foreign != right:
        out.append(foreign)
    return out


def preferences(questions: dict[Lang, list[Example]], count: int, seed: int, split: str = "") -> list[Record]:
    """`count` records over both languages: prompt, chosen and rejected answer to questions of these.

    Another `split` of them is drawn by other random numbers.
    """
    rng = random.Random(f"preference {split}{seed}")
    wrong_language: dict[tuple[str, Lang], str] = {
        ("greeting", "en"): "你好！",
        ("greeting", "zh"): "Hello!",
        ("fact", "en"): "请用中文问我。",
        ("fact", "zh"): "Please ask me in English.",
        ("definition", "en"): "请用中文问我。",
        ("definition", "zh"): "Please ask me in English.",
    }
    out: list[Record] = []
    for examples in questions.values():
        single = [each for each in examples if len(each.turns) == 1]
        for example in rng.sample(single, min(len(single), count // 2)):
            worse = _rejections(example, single, lambda each: wrong_language.get((each.kind, each.lang)), rng)
            rejected = rng.choice([text for text in worse if text not in example.answers])
            out.append(
                {
                    "prompt": example.prompt(),
                    "chosen": example.answers[0],
                    "rejected": rejected,
                    "source": example.kind,
                }
            )
    rng.shuffle(out)
    return out
