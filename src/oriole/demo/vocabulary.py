"""Running text, questions and answers about words and terms: the glossary, definitions and traits."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from oriole.demo.lexicon import Term, Trait, Word, terms, words
from oriole.demo.prose import Text, join
from oriole.demo.values import Lang


@dataclass(frozen=True)
class Split:
    """The words and terms that running text tells, those that SFT asks about, and those that it never asks about."""

    all_words: tuple[Word, ...]
    all_terms: tuple[Term, ...]
    words: tuple[Word, ...]
    held_words: tuple[Word, ...]
    terms: tuple[Term, ...]
    held_terms: tuple[Term, ...]


def split_vocabulary(
    taken: Set[str], seed: int, *, count_words: int, count_terms: int, held_words: int, held_terms: int
) -> Split:
    """`taken`: English words that may not be held out, because another kind of question shows their translation."""
    rng = random.Random(f"vocabulary {seed}")
    chosen_terms = rng.sample(terms(), min(count_terms, len(terms())))
    named = {term.en for term in chosen_terms} | taken
    first = [word for word in words() if word.en in named]
    others = [word for word in words() if word.en not in named]
    chosen_words = first + rng.sample(others, max(0, min(count_words - len(first), len(others))))
    hidden_words = set(rng.sample([word for word in chosen_words if word.en not in taken], held_words))
    hidden_terms = set(rng.sample(chosen_terms, held_terms))
    return Split(
        tuple(chosen_words),
        tuple(chosen_terms),
        tuple(word for word in chosen_words if word not in hidden_words),
        tuple(word for word in chosen_words if word in hidden_words),
        tuple(term for term in chosen_terms if term not in hidden_terms),
        tuple(term for term in chosen_terms if term in hidden_terms),
    )


# {e} is the English word, {z} the Chinese one. The first two are the forms of chat answers. English words always
# follow a space: the tokenizer then sees the same word here as in running text.
_GLOSSARY: dict[Lang, tuple[str, ...]] = {
    "en": (
        'The Chinese for {e} is "{z}".',
        'The English for "{z}" is {e}.',
        'The word {e} means "{z}".',
        '"{z}" is {e} in English.',
        'In English {e}, in Chinese "{z}"',
        "{z} - {e}",
    ),
    "zh": (
        "单词 {e} 的中文是“{z}”。",
        "“{z}”的英文是 {e}。",
        "单词 {e} 的意思是“{z}”。",
        "“{z}”用英文说是 {e}。",
        "英文 {e}，中文“{z}”",
        "{z} - {e}",
    ),
}
# The deal of forms over the passes: canonical forms twice as often.
_DEAL = (0, 1, 2, 3, 4, 5, 0, 1)


def glossary_texts(words: Sequence[Word], lang: Lang, passes: int, rng: random.Random) -> Iterator[Text]:
    """Every word pair once in each pass, six to a text, all in one form."""
    pairs = list(words)
    for number in range(passes):
        form = _GLOSSARY[lang][_DEAL[number % len(_DEAL)]]
        rng.shuffle(pairs)
        for start in range(0, len(pairs), 6):
            lines = [form.format(e=word.en, z=word.zh) for word in pairs[start : start + 6]]
            yield Text("\n".join(lines), "glossary")


_WORD_QUESTIONS: dict[tuple[Lang, Lang], tuple[str, ...]] = {  # (language of the question, of the answer)
    ("en", "zh"): (
        "How do you say the word {e} in Chinese?",
        "What is the word {e} in Chinese?",
        "What is the Chinese for {e}?",
        "Translate the word {e} into Chinese.",
    ),
    ("en", "en"): (
        'What does "{z}" mean?',
        'How do you say "{z}" in English?',
        'What is the English for "{z}"?',
        'Translate "{z}" into English.',
    ),
    ("zh", "zh"): (
        "单词 {e} 是什么意思？",
        "单词 {e} 用中文怎么说？",
        "单词 {e} 的中文是什么？",
        "请把单词 {e} 翻译成中文。",
    ),
    ("zh", "en"): ("“{z}”用英文怎么说？", "“{z}”的英文是什么？", "“{z}”翻译成英文是什么？", "请把“{z}”翻译成英文。"),
}


def ask_word(word: Word, lang: Lang, target: Lang, rng: random.Random) -> str:
    return rng.choice(_WORD_QUESTIONS[lang, target]).format(e=word.en, z=word.zh)


def answer_word(word: Word, lang: Lang, target: Lang) -> str:
    return _GLOSSARY[lang][0 if target == "zh" else 1].format(e=word.en, z=word.zh)


def word_answers(word: Word, lang: Lang, target: Lang) -> list[str]:
    bare = word.zh if target == "zh" else word.en
    stop = "。" if lang == "zh" else "."
    return [answer_word(word, lang, target), bare, bare + stop, f'"{bare}"', f"“{bare}”"]


def is_plural(term: Term) -> bool:
    """Scissors and trousers: plural words without an article."""
    return not term.article and term.plural == term.en


def noun_phrase(term: Term) -> str:
    return f"{term.article} {term.en}".strip()


_DEFINITION_QUESTIONS: dict[Lang, tuple[str, ...]] = {
    "en": ("What {is} {t}?", "Can you tell me what {t} {is}?", "Please explain what {t} {is}.", "Define {w}."),
    "zh": ("什么是{w}？", "{w}是什么？", "请解释一下什么是{w}。", "你能告诉我{w}是什么吗？"),
}


def ask_definition(term: Term, lang: Lang, rng: random.Random) -> str:
    form = rng.choice(_DEFINITION_QUESTIONS[lang])
    if lang == "zh":
        return form.format(w=term.zh)
    return form.format(t=noun_phrase(term), w=term.en, **{"is": "are" if is_plural(term) else "is"})


def definition(term: Term, lang: Lang) -> str:
    return term.definition_zh if lang == "zh" else term.definition_en


def _definition_forms(term: Term, lang: Lang) -> list[str]:
    whole = definition(term, lang)
    if lang == "zh":
        rest = whole.removeprefix(f"{term.zh}是")
        return [whole, f"{term.zh}：{rest}", f"词典上说，{whole}", f"老师说，{whole}", f"大家都知道，{whole}"]
    start = noun_phrase(term)
    head = f"{start} {'are' if is_plural(term) else 'is'} "
    rest = whole[len(head) :]
    lower = start[0] + whole[1:]
    return [
        whole,
        f"{term.en}: {rest}",
        f"The dictionary says that {lower}",
        f"The teacher explains that {lower}",
        f"Everybody knows that {lower}",
    ]


def definition_texts(terms: Sequence[Term], lang: Lang, passes: int, rng: random.Random) -> Iterator[Text]:
    """Every definition once in each pass, two or three to a text; two passes of three in the canonical form."""
    order = list(terms)
    for number in range(passes):
        rng.shuffle(order)
        for start in range(0, len(order), 3):
            form = 0 if number % 3 < 2 else rng.randrange(1, 5)
            lines = [_definition_forms(term, lang)[form] for term in order[start : start + 3]]
            yield Text("\n".join(lines) if form == 1 else join(lang, lines), "definitions")


_TRAITS_EN = {
    "eats": "{S} {eat} {E}.",
    "lives": "{S} {live} {E}.",
    "known_for": "{S} {is} known for {E}.",
    "colour": "{S} {is} {E}.",
    "grows": "{S} {grow} {E}.",
    "made_of": "{S} {is} made from {E}.",
    "when": "People often have {it} {E}.",
    "does": "{S}'s work is to {E}.",
    "place": "{S} {work} {E}.",
    "tool": "{S} {use} {E}.",
    "used_for": "{S} {is} used for {E}.",
    "taste": "{S} {taste} {E}.",
    "comes_from": "{S} {come} from {E}.",
    "you_can": "In {t} you can {E}.",
}
_TRAITS_ZH = {
    "eats": "{T}吃{Z}。",
    "lives": "{T}生活在{Z}。",
    "known_for": "{T}擅长{Z}。",
    "colour": "{T}是{Z}的。",
    "grows": "{T}长在{Z}。",
    "made_of": "{T}是用{Z}做的。",
    "when": "人们常{Z}{吃}{T}。",
    "does": "{T}的工作是{Z}。",
    "place": "{T}在{Z}工作。",
    "tool": "{T}常用{Z}。",
    "used_for": "{T}用来{Z}。",
    "taste": "{T}的味道{Z}。",
    "comes_from": "{T}来自{Z}。",
    "you_can": "在{T}可以{Z}。",
}


_DRINKS = ("water", "milk", "tea", "coffee", "juice", "cocoa", "lemonade", "soya milk", "beer", "wine")


def _have(term: Term) -> str:
    """The Chinese verb for having a food or a drink."""
    return "喝" if term.en in _DRINKS or term.zh[-1] in "汤茶" or term.zh.endswith(("汁", "奶", "豆浆", "粥")) else "吃"


def trait_sentence(term: Term, trait: Trait, lang: Lang) -> str:
    """One trait of a term as a sentence."""
    if lang == "zh":
        eat = _have(term)
        return _TRAITS_ZH[trait.attribute].format(T=term.zh, Z=trait.zh, 吃=eat)
    subject = noun_phrase(term)
    form = _TRAITS_EN[trait.attribute]
    if trait.attribute == "when":
        subject = term.plural if term.article in ("a", "an") else subject
        return f"People often have {subject} {trait.en}."
    many = is_plural(term)
    verbs = {verb: verb if many else verb + "s" for verb in ("eat", "live", "grow", "work", "use", "taste", "come")}
    capital = subject[0].upper() + subject[1:]
    return form.format(S=capital, t=subject, E=trait.en, **verbs, **{"is": "are" if many else "is"})


_TRAIT_QUESTIONS: dict[Lang, dict[str, str]] = {
    "en": {
        "eats": "What {do} {t} eat?",
        "lives": "Where {do} {t} live?",
        "known_for": "What {is} {t} known for?",
        "colour": "What colour {is} {t}?",
        "grows": "Where {do} {t} grow?",
        "made_of": "What {is} {t} made from?",
        "when": "When do people have {t}?",
        "does": "What {do} {t} do?",
        "place": "Where {do} {t} work?",
        "tool": "What {do} {t} use?",
        "used_for": "What {is} {t} used for?",
        "taste": "What {do} {t} taste like?",
        "comes_from": "Where {do} {t} come from?",
        "you_can": "What can you do in {t}?",
    },
    "zh": {
        "eats": "{t}吃什么？",
        "lives": "{t}生活在哪里？",
        "known_for": "{t}擅长什么？",
        "colour": "{t}是什么颜色的？",
        "grows": "{t}长在哪里？",
        "made_of": "{t}是用什么做的？",
        "when": "人们常在什么时候{吃}{t}？",
        "does": "{t}的工作是什么？",
        "place": "{t}在哪里工作？",
        "tool": "{t}常用什么？",
        "used_for": "{t}有什么用？",
        "taste": "{t}是什么味道？",
        "comes_from": "{t}是从哪里来的？",
        "you_can": "在{t}可以做什么？",
    },
}


def ask_trait(term: Term, trait: Trait, lang: Lang, *, pronoun: bool = False) -> str:
    """The question for a trait; with a pronoun it needs the turn before."""
    form = _TRAIT_QUESTIONS[lang][trait.attribute]
    person = term.topic == "job"
    if lang == "zh":
        eat = _have(term)
        it = "他们" if person else "那里" if term.topic == "place" else "它"
        return form.format(t=it if pronoun else term.zh, 吃=eat)
    many = is_plural(term) or (pronoun and person)
    subject = noun_phrase(term)
    if pronoun:
        subject = "they" if many else "it"
        if term.topic == "place":
            return "What can you do there?"
        if trait.attribute == "when":
            subject = "them" if is_plural(term) else "it"
    elif trait.attribute == "when" and term.article in ("a", "an"):
        subject = term.plural
    return form.format(t=subject, do="do" if many else "does", **{"is": "are" if many else "is"})


def trait_texts(terms: Sequence[Term], lang: Lang, passes: int, rng: random.Random) -> Iterator[Text]:
    """A term and its traits, in a short text; the definition stands in front of some."""
    order = [term for term in terms if term.traits]
    for _ in range(passes):
        rng.shuffle(order)
        for term in order:
            sentences = [trait_sentence(term, trait, lang) for trait in rng.sample(term.traits, len(term.traits))]
            if rng.random() < 0.3:
                sentences.insert(0, definition(term, lang))
            yield Text(join(lang, sentences), "terms")
