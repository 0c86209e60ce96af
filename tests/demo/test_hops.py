"""Questions of several steps: the answers are what the world and arithmetic say, and what is held out was not shown."""

import random

import pytest

from oriole.demo.hops import chains, split_questions, sums
from oriole.demo.prose import kin_name
from oriole.demo.values import Lang
from oriole.demo.world import build_world


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_chain_is_walked_step_by_step_to_somebody_new(lang: Lang) -> None:
    world = build_world(0, 0.0, 6)
    names = {p.name.of(lang): p for p in world.people}
    by_name = {p.name: p for p in world.people}
    words = {kin_name(kin, lang): kin for kin in ("father", "mother", "brother", "sister", "son", "daughter")}
    words["best friend" if lang == "en" else "好朋友"] = "friend"
    every = list(chains(world, 3, lang))
    for q in every:
        if lang == "en":
            plain = q.text.removeprefix("Who is the ").removesuffix("?").replace(" of the ", " of ")
            *relations, name = plain.split(" of ")
            relations.reverse()
        else:
            name, *relations = q.text.removesuffix("是谁？").split("的")
        person, met = names[name], {name}
        for word in relations:
            pair = {**person.kin, "friend": person.facts["friend"]}[words[word]]
            person = by_name[pair]
            met.add(pair.of(lang))
        assert person.name.of(lang) == q.answer and len(met) == 4 and q.steps == 3
    assert len({q.text for q in every}) == len(every) > 100


def test_sums_are_right_and_stay_small() -> None:
    every = list(sums(3, 200, random.Random(1)))
    assert len({q.text for q in every}) == 200
    for q in every:
        assert eval(q.text.removesuffix("=?")) == int(q.answer) and 0 <= int(q.answer) <= 30
        assert sum(q.text.count(sign) for sign in "+-") == 3
    assert len(list(sums(1, 10_000, random.Random(1)))) < 600  # there are no more


def test_single_steps_are_never_held_out() -> None:
    every = [q for steps in (1, 2) for q in sums(steps, 300, random.Random(2))]
    shown, hidden = split_questions(every, 0.2, random.Random(0))
    assert len(hidden) == 60 and {q.steps for q in hidden} == {2}
    assert not {q.text for q in shown} & {q.text for q in hidden} and len(shown) == len(every) - 60
