"""Writes the built-in corpus: running text, chats, an examination, preferences, prompts, documents, in two languages.

Held out are a hundredth of the running text, some chats, and preference pairs on questions of the examination.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from oriole.demo import dialogues, little, numbers, preferences, prose, sentences, smalltalk, vocabulary
from oriole.demo.dialogues import Example
from oriole.demo.drills import drill_texts
from oriole.demo.followups import followups
from oriole.demo.guides import guides
from oriole.demo.prose import Text
from oriole.demo.values import LANGS, Lang
from oriole.demo.world import World, build_world


@dataclass(frozen=True)
class Sizes:
    """Every knob of the corpus. All numbers are for one language unless they say otherwise."""

    # the world and its vocabulary, shared by both languages
    families: int = 28  # of three people each
    words: int = 830  # word pairs in the glossary, those of terms and sentences among them
    terms: int = 340  # things with a definition
    # running text: how often everything is told
    portrait: int = 30  # passes over all facts of people and places, as short texts
    medley: int = 1  # passes over the same facts, single sentences side by side
    card: int = 1  # passes as index cards
    compound: int = 1  # passes over people, several facts in one sentence
    family: int = 3  # passes over family ties
    glossary: int = 18  # passes over all word pairs
    definition: int = 20  # passes over all definitions
    trait: int = 2  # passes over the traits of all terms
    sums: int = 900  # pages of seven worked sums
    parallel: int = 600  # pages of two translated sentences
    calendar: int = 5  # passes over the calendar
    weather: int = 100  # reports
    stories: int = 120  # stories
    drills: int = 2200  # dictations: something read out and read back
    lessons: int = 800  # pages of three SFT questions with their answers (training entities only)
    validation: float = 0.01  # share of the texts set aside as val_*.jsonl
    # SFT: rows by kind
    per_fact: int = 2  # questions about every fact of a training entity
    kin: int = 80
    arithmetic: int = 1000
    word: int = 1100
    sentence: int = 600
    definition_rows: int = 500
    trait_rows: int = 150
    followup: int = 600
    unknown: int = 260
    greeting: int = 450
    system: float = 0.06  # share of conversations with a system prompt
    sft_validation: int = 120  # rows set aside as val_sft_*.jsonl
    # the examination and the splits
    exam: int = 180  # questions by kind
    held_entities: float = 0.25  # share of families and of places that SFT never asks about
    held_words: int = 180
    held_terms: int = 160
    held_sums: float = 0.1
    held_sentences: float = 0.15
    # the rest, both languages together
    preference: int = 8000
    preference_validation: int = 600  # on questions of the examination
    prompts: int = 3000  # questions without answers: sums that neither SFT nor the examination asks
    guides: int = 14  # documents in each language


SIZES = Sizes()


@dataclass(frozen=True)
class Splits:
    """The world and what of it is held out, the same for both languages."""

    world: World
    sums: numbers.Sums
    vocabulary: vocabulary.Split
    sentences: list[sentences.Sentence]


def make_splits(seed: int = 0, sizes: Sizes = SIZES) -> Splits:
    return Splits(
        build_world(seed, sizes.held_entities, sizes.families),
        numbers.split_sums(seed, sizes.held_sums),
        vocabulary.split_vocabulary(
            sentences.grammar_words(),
            seed,
            count_words=sizes.words,
            count_terms=sizes.terms,
            held_words=sizes.held_words,
            held_terms=sizes.held_terms,
        ),
        sentences.all_sentences(seed, sizes.held_sentences),
    )


def lesson_texts(examples: list[Example], count: int, rng: random.Random) -> Iterator[Text]:
    """Pages of questions with their answers, from the conversations of SFT: nothing that is held out."""
    pool = [each for each in examples if len(each.turns) == 1 and each.kind in ("fact", "definition", "word")]
    for _ in range(count):
        yield Text("\n".join(f"{each.turns[0]}\n{each.answers[0]}" for each in rng.sample(pool, 3)), "lessons")


def running_text(splits: Splits, train: list[Example], lang: Lang, seed: int, sizes: Sizes = SIZES) -> list[Text]:
    """All running text of a language, shuffled; `train`: the conversations of SFT, for the pages of lessons."""
    rng = random.Random(f"text {lang} {seed}")
    spoken = [each.zh if lang == "zh" else each.en for each in splits.vocabulary.all_words]
    names = [*smalltalk.acquaintances(lang), *(each.name.of(lang) for each in splits.world.entities)]
    texts = [
        *prose.world_texts(
            splits.world,
            lang,
            rng,
            portrait=sizes.portrait,
            medley=sizes.medley,
            card=sizes.card,
            compound=sizes.compound,
            family=sizes.family,
        ),
        *vocabulary.glossary_texts(splits.vocabulary.all_words, lang, sizes.glossary, rng),
        *vocabulary.definition_texts(splits.vocabulary.all_terms, lang, sizes.definition, rng),
        *vocabulary.trait_texts(splits.vocabulary.all_terms, lang, sizes.trait, rng),
        *numbers.sum_texts(splits.sums, lang, sizes.sums, rng),
        *sentences.parallel_texts(splits.sentences, sizes.parallel, rng),
        *little.little_texts(lang, rng, calendar=sizes.calendar, weather=sizes.weather, stories=sizes.stories),
        *drill_texts(spoken, names, lang, sizes.drills, rng),
        *lesson_texts(train, sizes.lessons, rng),
    ]
    rng.shuffle(texts)
    return texts


def chats(splits: Splits, lang: Lang, seed: int, sizes: Sizes = SIZES) -> tuple[list[Example], list[Example]]:
    """The conversations of SFT, shuffled, and the examination, by kind."""
    rng = random.Random(f"chats {lang} {seed}")
    known = [entity for entity in splits.world.entities if not entity.held_out]
    hidden = [entity for entity in splits.world.entities if entity.held_out]
    people = [entity for entity in known if not entity.is_place]
    words = splits.vocabulary
    pairs = [each for each in splits.sentences if not each.held_out]
    secret = [each for each in splits.sentences if each.held_out]
    train: list[Example] = [
        *dialogues.facts(known, lang, sizes.per_fact, rng),
        *dialogues.kins(people, lang, sizes.kin, rng),
        *dialogues.sums(splits.sums.train, lang, sizes.arithmetic, rng),
        *dialogues.words(words.words, lang, sizes.word, rng),
        *dialogues.translations(pairs, lang, sizes.sentence, rng),
        *dialogues.definitions(words.terms, lang, sizes.definition_rows, rng),
        *dialogues.traits(words.terms, lang, sizes.trait_rows, rng),
    ]
    fact_exam = dialogues.facts(hidden, lang, 1, rng)
    exam: list[Example] = [
        *rng.sample(fact_exam, min(sizes.exam, len(fact_exam))),
        *dialogues.sums(splits.sums.held_out, lang, sizes.exam, rng),
        *dialogues.words(words.held_words, lang, sizes.exam, rng),
        *dialogues.translations(secret, lang, sizes.exam, rng),
        *dialogues.definitions(words.held_terms, lang, sizes.exam, rng),
    ]
    for more_train, more_exam in (
        smalltalk.unknowns(splits.world, known, lang, sizes.unknown, sizes.exam, seed),
        followups(known, splits.sums, words, lang, sizes.followup, sizes.exam, seed),
        smalltalk.greet(lang, sizes.greeting, sizes.exam, seed),
    ):
        train += more_train
        exam += more_exam
    train = dialogues.with_system(train, sizes.system, rng)
    exam = dialogues.with_system(exam, sizes.system, rng)
    rng.shuffle(train)
    exam.sort(key=lambda example: dialogues.KINDS.index(example.kind))
    return train, exam


def new_sums(splits: Splits, asked: Iterable[Example], seed: int, count: int) -> Iterator[Example]:
    """Questions about sums that nobody has `asked`, the languages in turn, for models that learn from own answers."""
    rng = random.Random(f"prompts {seed}")
    pool = numbers.unasked(splits.sums.train, (turn for each in asked for turn in (*each.turns, *each.answers)))
    for number, each in enumerate(rng.sample([s for s in pool if s.step()], count)):
        each, lang = numbers.turned(each, rng), LANGS[number % len(LANGS)]
        yield Example("arithmetic", lang, (numbers.ask(each, lang, rng),), tuple(numbers.answers(each)))


def write_corpus(folder: Path, seed: int = 0, sizes: Sizes = SIZES) -> None:
    """Write all files of the corpus into `folder`: the same bytes for the same seed, and all of them or none."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        _write_all(draft, seed, sizes)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_all(folder: Path, seed: int, sizes: Sizes) -> None:
    splits = make_splits(seed, sizes)
    train: dict[Lang, list[Example]] = {}
    exams: dict[Lang, list[Example]] = {}
    asked: list[Example] = []
    for lang in LANGS:
        rows, questions = chats(splits, lang, seed, sizes)
        texts = running_text(splits, rows, lang, seed, sizes)
        cut = round(sizes.validation * len(texts))
        for name, part in (("val", texts[:cut]), ("pretrain", texts[cut:])):
            _jsonl(folder / f"{name}_{lang}.jsonl", ({"text": text, "source": source} for text, source in part))
        exams[lang] = questions
        train[lang] = rows[sizes.sft_validation :]
        asked += rows
        for name, examples in (("val_sft", rows[: sizes.sft_validation]), ("sft", train[lang])):
            lines = ({"conversations": each.conversation(), "source": each.kind} for each in examples)
            _jsonl(folder / f"{name}_{lang}.jsonl", lines)
        for file, text in guides(splits.world, lang, sizes.guides, seed).items():
            path = folder / "docs" / lang / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    exam_lines = (
        {"kind": each.kind, "lang": each.lang, "messages": each.prompt(), "answers": list(each.answers)}
        for each in itertools.chain.from_iterable(exams.values())
    )
    _jsonl(folder / "eval.jsonl", exam_lines)
    _jsonl(folder / "preference.jsonl", preferences.preferences(train, sizes.preference, seed))
    held_out = preferences.preferences(exams, sizes.preference_validation, seed, split="validation ")
    _jsonl(folder / "val_preference.jsonl", held_out)
    prompts = new_sums(splits, asked, seed, sizes.prompts)
    _jsonl(folder / "prompts.jsonl", ({"messages": e.prompt(), "source": e.kind, "lang": e.lang} for e in prompts))


def _jsonl(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
