"""Questions and answers of the built-in corpus: facts, sums, words, sentences and definitions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from oriole.demo import numbers, sentences, vocabulary
from oriole.demo.lexicon import Term, Word
from oriole.demo.numbers import Sum
from oriole.demo.prose import answer, attributes, fact_sentence, kin_name, kin_sentence, phrases, pronouns
from oriole.demo.sentences import Sentence
from oriole.demo.values import LANGS, Lang
from oriole.demo.world import Entity

KINDS = ("greeting", "fact", "arithmetic", "word", "sentence", "definition", "followup", "unknown")


@dataclass(frozen=True)
class Example:
    """One conversation: user and assistant in turn, the user last; and the right answers, the canonical one first."""

    kind: str
    lang: Lang
    turns: tuple[str, ...]
    answers: tuple[str, ...]
    system: str = ""
    topic: str = ""  # what is asked: the attribute of a fact, the language of a word

    def prompt(self) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        roles = ("user", "assistant")
        return messages + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(self.turns)]

    def conversation(self) -> list[dict[str, str]]:
        return [*self.prompt(), {"role": "assistant", "content": self.answers[0]}]


_SYSTEM: dict[Lang, tuple[str, ...]] = {
    "en": (
        "You are Oriole, a friendly assistant.",
        "Answer briefly and correctly.",
        "You are a helpful assistant who speaks Chinese and English.",
        "If you do not know something, say so.",
    ),
    "zh": (
        "你是黄鹂，一个友好的助手。",
        "回答要简短、正确。",
        "你是一个会说中文和英文的助手。",
        "不知道的事情，就说不知道。",
    ),
}


def with_system(examples: Iterable[Example], share: float, rng: random.Random) -> list[Example]:
    """The same examples, some of them under a system prompt."""
    return [
        replace(example, system=rng.choice(_SYSTEM[example.lang])) if rng.random() < share else example
        for example in examples
    ]


def distinct(make: Callable[[], Example], count: int, taken: set[tuple[str, ...]]) -> list[Example]:
    """`count` examples whose turns are not in `taken` yet; `taken` grows. Fewer where there are no more."""
    out: list[Example] = []
    misses = 0
    while len(out) < count and misses < 2000:
        example = make()
        if example.turns in taken:
            misses += 1
            continue
        misses = 0
        taken.add(example.turns)
        out.append(example)
    return out


def fact_questions(entity: Entity, attribute: str, lang: Lang) -> list[str]:
    module = phrases(lang)
    forms: Sequence[str] = (module.PLACE_QUESTIONS if entity.is_place else module.PERSON_QUESTIONS)[attribute]
    return [form.format(n=entity.name.of(lang), **pronouns(entity, lang)) for form in forms]


def fact_answers(entity: Entity, attribute: str, lang: Lang) -> tuple[str, ...]:
    """The canonical sentence, the same with a pronoun, and the bare value."""
    value = entity.facts[attribute].of(lang)
    stop = "。" if lang == "zh" else "."
    short = fact_sentence(entity, attribute, lang, named=False)
    return tuple(dict.fromkeys([answer(entity, attribute, lang), short, value, value + stop]))


def facts(entities: Sequence[Entity], lang: Lang, per_fact: int, rng: random.Random) -> list[Example]:
    """`per_fact` questions about every fact of these entities."""
    out = []
    for entity in entities:
        for attribute in attributes(entity):
            questions = fact_questions(entity, attribute, lang)
            for question in rng.sample(questions, min(per_fact, len(questions))):
                out.append(Example("fact", lang, (question,), fact_answers(entity, attribute, lang), topic=attribute))
    return out


def kins(people: Sequence[Entity], lang: Lang, count: int, rng: random.Random) -> list[Example]:
    """Who is whose mother: a few questions about families (training families only, never in the examination)."""
    every = [(person, kin) for person in people for kin in person.kin]
    out = []
    for person, kin in rng.sample(every, min(count, len(every))):
        question = rng.choice(phrases(lang).KIN_QUESTIONS).format(n=person.name.of(lang), k=kin_name(kin, lang))
        out.append(Example("fact", lang, (question,), (kin_sentence(person, kin, lang),)))
    return out


def sums(pool: Sequence[Sum], lang: Lang, count: int, rng: random.Random) -> list[Example]:
    """Sums with and without working; distinct operand pairs as long as there are enough."""
    with_step = [each for each in pool if each.step()]
    small = [each for each in pool if not each.step()]
    few = min(len(small), count // 8)
    chosen = rng.sample(small, few) + rng.sample(with_step, min(len(with_step), count - few))
    out = []
    for each in chosen:
        each = numbers.turned(each, rng)
        out.append(Example("arithmetic", lang, (numbers.ask(each, lang, rng),), tuple(numbers.answers(each))))
    return out


def words(pool: Sequence[Word], lang: Lang, count: int, rng: random.Random) -> list[Example]:
    """Word questions, both directions in turn, every word as often as every other."""
    taken: set[tuple[str, ...]] = set()
    order: list[tuple[Word, Lang]] = []
    while len(order) < count:
        turn = [(word, LANGS[(i + len(order)) % 2]) for i, word in enumerate(rng.sample(pool, len(pool)))]
        order += turn
    out = []
    for word, target in order[:count]:

        def make(word: Word = word, target: Lang = target) -> Example:
            question = vocabulary.ask_word(word, lang, target, rng)
            return Example("word", lang, (question,), tuple(vocabulary.word_answers(word, lang, target)), topic=target)

        out += distinct(make, 1, taken)
    return out


def translations(pool: Sequence[Sentence], lang: Lang, count: int, rng: random.Random) -> list[Example]:
    """Short sentences to translate, both directions in turn."""
    out = []
    for number, each in enumerate(rng.sample(pool, count)):
        target = LANGS[number % 2]
        text = each.text.of(target)
        question = sentences.ask(each, lang, target, rng)
        out.append(Example("sentence", lang, (question,), (text, text.rstrip(".。"))))
    return out


def definitions(pool: Sequence[Term], lang: Lang, count: int, rng: random.Random) -> list[Example]:
    """What things are, every term as often as every other."""
    taken: set[tuple[str, ...]] = set()
    out: list[Example] = []
    while len(out) < count:
        before = len(out)
        for term in rng.sample(pool, len(pool)):

            def make(term: Term = term) -> Example:
                whole = vocabulary.definition(term, lang)
                question = vocabulary.ask_definition(term, lang, rng)
                return Example("definition", lang, (question,), (whole, whole.rstrip(".。")))

            out += distinct(make, 1, taken)
        if len(out) == before:
            break
    return out[:count]


def traits(pool: Sequence[Term], lang: Lang, count: int, rng: random.Random) -> list[Example]:
    """What a heron eats: single questions about traits (training terms only)."""
    every = [(term, trait) for term in pool for trait in term.traits]
    return [
        Example(
            "definition",
            lang,
            (vocabulary.ask_trait(term, trait, lang),),
            (vocabulary.trait_sentence(term, trait, lang),),
        )
        for term, trait in rng.sample(every, min(count, len(every)))
    ]
