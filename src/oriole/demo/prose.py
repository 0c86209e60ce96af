"""Running text about people and places: the same facts, told many times in many ways."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

from oriole.demo import phrases_en, phrases_zh
from oriole.demo.values import Lang, article
from oriole.demo.world import PERSON_ATTRIBUTES, PLACE_ATTRIBUTES, Entity, World


class Text(NamedTuple):
    """One document of running text and the family it belongs to."""

    text: str
    source: str


def phrases(lang: Lang) -> ModuleType:
    return phrases_zh if lang == "zh" else phrases_en


def join(lang: Lang, sentences: Sequence[str]) -> str:
    return ("" if lang == "zh" else " ").join(sentences)


def attributes(entity: Entity) -> tuple[str, ...]:
    return PLACE_ATTRIBUTES if entity.is_place else PERSON_ATTRIBUTES


def pronouns(entity: Entity, lang: Lang) -> dict[str, str]:
    """The words that stand for an entity: {he} subject, {h} possessive, {him} object."""
    if lang == "zh":
        he = "这里" if entity.is_place else "她" if entity.female else "他"
        return {"he": he, "h": he + "的", "him": he}
    if entity.is_place:
        return {"he": "it", "h": "its", "him": "the town"}
    return dict(zip(("he", "h", "him"), ("she", "her", "her") if entity.female else ("he", "his", "him"), strict=True))


def fields(entity: Entity, lang: Lang, *, named: bool) -> dict[str, str]:
    """What a wording of phrases_en or phrases_zh needs, with the name or with a pronoun."""
    words = pronouns(entity, lang)
    name = entity.name.of(lang)
    if named:
        who = {"S": name, "s": name, "P": name + "'s", "p": name + "'s", "o": name}
    elif entity.is_place:
        town = "这里" if lang == "zh" else "the town"
        who = {"S": town.capitalize(), "s": town, "P": "Its", "p": "its", "o": town}
    else:
        who = {
            "S": words["he"].capitalize(),
            "s": words["he"],
            "P": words["h"].capitalize(),
            "p": words["h"],
            "o": words["him"],
        }
    return {**words, **who, "n": name}


def fact_sentence(entity: Entity, attribute: str, lang: Lang, *, wording: int = 0, named: bool = True) -> str:
    """One fact in one of its wordings; wording 0 is the form that chat answers use."""
    module = phrases(lang)
    templates: tuple[str, ...] = (module.PLACE if entity.is_place else module.PERSON)[attribute]
    if named and wording == 0 and attribute in module.NAMED:
        templates = (module.NAMED[attribute],)
    value = entity.facts[attribute].of(lang)
    words = fields(entity, lang, named=named)
    return templates[wording % len(templates)].format(**words, v=value, av=article(value))


def answer(entity: Entity, attribute: str, lang: Lang) -> str:
    """The canonical answer to a question about a fact."""
    return fact_sentence(entity, attribute, lang)


class Wordings:
    """Deals the wordings of every fact in turn, so that each is used, and the canonical one every third time."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.count: dict[tuple[str, str, Lang], int] = {}
        self.start: dict[tuple[str, str, Lang], int] = {}

    def next(self, entity: Entity, attribute: str, lang: Lang) -> int:
        key = (entity.name.en, attribute, lang)
        count = self.count.get(key, 0)
        self.count[key] = count + 1
        start = self.start.setdefault(key, self.rng.randrange(100))
        module = phrases(lang)
        size = len((module.PLACE if entity.is_place else module.PERSON)[attribute])
        if (count + start) % 3 == 0:
            return 0
        return 1 + (start + count - (count + start) // 3) % (size - 1)


def _opening(entity: Entity, lang: Lang, rng: random.Random) -> str:
    module = phrases(lang)
    openings: tuple[str, ...] = module.PLACE_OPENINGS if entity.is_place else module.PERSON_OPENINGS
    return rng.choice(openings).format(n=entity.name.of(lang))


def portrait(entity: Entity, chosen: Sequence[str], lang: Lang, wordings: Wordings) -> str:
    """A short text about one entity: the name first, then the name or a pronoun."""
    rng = wordings.rng
    sentences = []
    named = True
    if rng.random() < 0.35:
        sentences.append(_opening(entity, lang, rng))
        named = rng.random() < 0.25
    for attribute in chosen:
        wording = wordings.next(entity, attribute, lang)
        sentences.append(fact_sentence(entity, attribute, lang, wording=wording, named=named))
        named = attribute == "friend" or rng.random() < 0.6  # a pronoun after a friend could mean the friend
    return join(lang, sentences)


def portraits(world: World, lang: Lang, passes: int, wordings: Wordings) -> Iterator[Text]:
    """In every pass each entity is described once, its facts in a new order, in one text or over two."""
    rng = wordings.rng
    for _ in range(passes):
        for entity in world.entities:
            order = rng.sample(attributes(entity), len(attributes(entity)))
            cut = rng.choice((len(order) // 2, (len(order) + 1) // 2))
            parts = (order,) if rng.random() < 0.5 else (order[:cut], order[cut:])
            for part in parts:
                yield Text(portrait(entity, part, lang, wordings), "places" if entity.is_place else "people")


def medleys(world: World, lang: Lang, passes: int, wordings: Wordings) -> Iterator[Text]:
    """Facts of unrelated people and places side by side, each with its full name."""
    rng = wordings.rng
    facts = [(entity, attribute) for entity in world.entities for attribute in attributes(entity)]
    for _ in range(passes):
        rng.shuffle(facts)
        for start in range(0, len(facts), 4):
            sentences = [
                fact_sentence(entity, attribute, lang, wording=wordings.next(entity, attribute, lang))
                for entity, attribute in facts[start : start + 4]
            ]
            yield Text(join(lang, sentences), "medley")


def cards(world: World, lang: Lang, passes: int, rng: random.Random) -> Iterator[Text]:
    """Index cards: one line per fact."""
    module = phrases(lang)
    for _ in range(passes):
        for entity in world.entities:
            order = rng.sample(attributes(entity), len(attributes(entity)))
            titles = module.CARD_TITLES["place" if entity.is_place else "person"]
            lines = [rng.choice(titles).format(n=entity.name.of(lang))]
            lines += [module.CARD[attribute].format(v=entity.facts[attribute].of(lang)) for attribute in order]
            yield Text("\n".join(lines), "cards")


def compounds(world: World, lang: Lang, passes: int, rng: random.Random) -> Iterator[Text]:
    """Several facts of a person in one sentence, two people to a text."""
    module = phrases(lang)
    for _ in range(passes):
        people = rng.sample(world.people, len(world.people))
        friends = {person.name: person for person in world.people}
        sentences = []
        for person in people:
            words = {key: value.of(lang) for key, value in person.facts.items()}
            words |= fields(person, lang, named=True)
            friend = friends[person.facts["friend"]]
            words["h_friend"] = pronouns(friend, lang)["h"]
            for templates in module.COMPOUND:
                sentences.append(rng.choice(templates).format(**words, ajob=article(words["job"])))
        rng.shuffle(sentences)
        for start in range(0, len(sentences), 3):
            yield Text(join(lang, sentences[start : start + 3]), "compound")


def kin_sentence(person: Entity, kin: str, lang: Lang, *, wording: int = 0, named: bool = True) -> str:
    template: str = phrases(lang).KIN[kin][wording % len(phrases(lang).KIN[kin])]
    return template.format(**fields(person, lang, named=named), v=person.kin[kin].of(lang))


def kin_name(kin: str, lang: Lang) -> str:
    return phrases_zh.KIN_NAMES[kin] if lang == "zh" else kin


def family_texts(world: World, lang: Lang, passes: int, rng: random.Random) -> Iterator[Text]:
    """Who belongs to whom."""
    for number in range(passes):
        for person in world.people:
            sentences = []
            for kin in rng.sample(sorted(person.kin), len(person.kin)):
                wording = 0 if number % 3 == 0 else rng.randrange(4)
                sentences.append(kin_sentence(person, kin, lang, wording=wording, named=rng.random() < 0.6))
            if person.name.of(lang) not in sentences[0]:
                sentences.insert(0, _opening(person, lang, rng))
            yield Text(join(lang, sentences), "family")


def world_texts(
    world: World, lang: Lang, rng: random.Random, *, portrait: int, medley: int, card: int, compound: int, family: int
) -> Iterator[Text]:
    """All running text about the world's people and places, by number of passes of each sort."""
    wordings = Wordings(rng)
    yield from portraits(world, lang, portrait, wordings)
    yield from medleys(world, lang, medley, wordings)
    yield from cards(world, lang, card, rng)
    yield from compounds(world, lang, compound, rng)
    yield from family_texts(world, lang, family, rng)
