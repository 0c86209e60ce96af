"""Conversations whose last question means nothing without the turn before."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations

from oriole.demo import numbers, vocabulary
from oriole.demo.dialogues import Example, fact_answers, fact_questions
from oriole.demo.numbers import Sum, Sums
from oriole.demo.prose import answer, attributes, phrases, pronouns
from oriole.demo.values import LANGS, Lang
from oriole.demo.vocabulary import Split
from oriole.demo.world import Entity

_ADD: dict[Lang, dict[str, tuple[str, ...]]] = {
    "en": {
        "+": ("Add {b} to that.", "And plus {b}?", "Now add {b}."),
        "-": ("Take {b} away from that.", "And minus {b}?", "Now take away {b}."),
    },
    "zh": {
        "+": ("再加{b}呢？", "那再加上{b}是多少？", "再加{b}。"),
        "-": ("再减{b}呢？", "那再减去{b}是多少？", "再减{b}。"),
    },
}
_NEXT_WORD: dict[tuple[Lang, Lang], tuple[str, ...]] = {  # (language of the question, of the word)
    ("en", "en"): ("And the word {w}?", "What about {w}?", "And how about {w}?"),
    ("en", "zh"): ('And "{w}"?', 'What about "{w}"?', 'And how about "{w}"?'),
    ("zh", "en"): ("那单词 {w} 呢？", "那 {w} 呢？", "那么 {w} 呢？"),
    ("zh", "zh"): ("那“{w}”呢？", "“{w}”呢？", "那么“{w}”呢？"),
}
_TRANSLATE_IT: dict[Lang, tuple[str, ...]] = {
    "en": ("And in Chinese?", "How do you say it in Chinese?", "What is it called in Chinese?"),
    "zh": ("用英文怎么说？", "它的英文是什么？", "那英文怎么说呢？"),
}


def _same_entity(entities: Sequence[Entity], lang: Lang, rng: random.Random) -> list[Example]:
    """A second question about the same person or place, with a pronoun; one in three has three questions."""
    out = []
    for entity in entities:
        after = phrases(lang).PLACE_AFTER if entity.is_place else phrases(lang).PERSON_AFTER
        words = pronouns(entity, lang)
        for first, second in permutations(attributes(entity), 2):
            turns = [rng.choice(fact_questions(entity, first, lang)), answer(entity, first, lang)]
            asked = [second]
            if rng.random() < 0.33:
                asked.insert(0, rng.choice([each for each in attributes(entity) if each not in (first, second)]))
            for attribute in asked:
                turns.append(rng.choice(after[attribute]).format(**words))
                turns.append(answer(entity, attribute, lang))
            out.append(Example("followup", lang, tuple(turns[:-1]), fact_answers(entity, second, lang)))
    return out


def _other_entity(entities: Sequence[Entity], lang: Lang, rng: random.Random, count: int) -> list[Example]:
    """The same question about somebody else: And Chen Dahai?"""
    out = []
    for _ in range(count):
        one = rng.choice(entities)
        other = rng.choice([each for each in entities if each.is_place == one.is_place and each is not one])
        attribute = rng.choice(attributes(one))
        question = rng.choice(fact_questions(one, attribute, lang))
        again = rng.choice(phrases(lang).OTHER_AFTER).format(n=other.name.of(lang))
        turns = (question, answer(one, attribute, lang), again)
        out.append(Example("followup", lang, turns, fact_answers(other, attribute, lang)))
    return out


def _more_sums(sums: Sums, lang: Lang, rng: random.Random, count: int) -> list[Example]:
    """A sum, and then something added to its result or taken away from it."""
    hidden = {each.pair for each in sums.held_out}
    out: list[Example] = []
    while len(out) < count:
        first = numbers.turned(rng.choice(sums.train), rng)
        sign = rng.choice("+-")
        second = Sum(first.result, sign, rng.randrange(1, 10))
        if second.pair in hidden or not 0 <= second.result <= 100 or second.a == 0:
            continue
        again = rng.choice(_ADD[lang][sign]).format(b=second.b)
        turns = (numbers.ask(first, lang, rng), first.worked(), again)
        out.append(Example("followup", lang, turns, tuple(numbers.answers(second))))
    return out


def _more_words(split: Split, lang: Lang, rng: random.Random, count: int) -> list[Example]:
    """A word, and then another in the same direction."""
    out = []
    for _ in range(count):
        one, other = rng.sample(split.words, 2)
        target = rng.choice(LANGS)
        asked: Lang = "zh" if target == "en" else "en"
        again = rng.choice(_NEXT_WORD[lang, asked])
        turns = (
            vocabulary.ask_word(one, lang, target, rng),
            vocabulary.answer_word(one, lang, target),
            again.format(w=other.zh if asked == "zh" else other.en),
        )
        out.append(Example("followup", lang, turns, tuple(vocabulary.word_answers(other, lang, target))))
    return out


def _about_terms(split: Split, lang: Lang, rng: random.Random) -> list[Example]:
    """What a thing is, and then one of its traits, or its name in the other language."""
    known = {word.en: word for word in split.words}
    out = []
    for term in split.terms:
        question = vocabulary.ask_definition(term, lang, rng)
        start = (question, vocabulary.definition(term, lang))
        for trait in term.traits:
            again = vocabulary.ask_trait(term, trait, lang, pronoun=True)
            sentence = vocabulary.trait_sentence(term, trait, lang)
            out.append(Example("followup", lang, (*start, again), (sentence, sentence.rstrip(".。"))))
        if term.en in known:
            target: Lang = "en" if lang == "zh" else "zh"
            again = rng.choice(_TRANSLATE_IT[lang])
            right = vocabulary.word_answers(known[term.en], lang, target)
            out.append(Example("followup", lang, (*start, again), tuple(right)))
    return out


def followups(
    entities: Sequence[Entity], sums: Sums, split: Split, lang: Lang, train: int, examine: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Follow-ups for SFT and for the examination: combinations of what SFT knows, no combination in both."""
    rng = random.Random(f"followup {lang} {seed}")
    total = train + examine
    sorts = [
        (0.35, _same_entity(entities, lang, rng)),
        (0.2, _other_entity(entities, lang, rng, total)),
        (0.15, _more_sums(sums, lang, rng, total)),
        (0.15, _more_words(split, lang, rng, total)),
        (0.15, _about_terms(split, lang, rng)),
    ]
    out: tuple[list[Example], list[Example]] = ([], [])
    seen: set[tuple[str, ...]] = set()
    for share, pool in sorts:
        fresh = []
        for each in rng.sample(pool, len(pool)):
            if each.turns not in seen:
                seen.add(each.turns)
                fresh.append(each)
        cut = round(share * examine)
        out[1].extend(fresh[:cut])
        out[0].extend(fresh[cut : cut + round(share * train)])
    return out
