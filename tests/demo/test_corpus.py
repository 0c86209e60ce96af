"""The built-in corpus: its size, its splits, and its language as far as rules can read it."""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from oriole.demo import numbers, phrases_en, phrases_zh, values
from oriole.demo.corpus import SIZES, Splits, make_splits, write_corpus
from oriole.demo.dialogues import KINDS
from oriole.demo.lexicon import terms, words
from oriole.demo.prose import attributes
from oriole.demo.values import LANGS

Rows = list[dict[str, Any]]
HAN = r"\u4e00-\u9fff"
NAMES = [f"{name}_{lang}.jsonl" for name in ("pretrain", "val", "sft", "val_sft") for lang in LANGS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "corpus"
    write_corpus(path, seed=0)
    return path


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Rows]:
    names = [*NAMES, "eval.jsonl", "preference.jsonl", "val_preference.jsonl", "prompts.jsonl"]
    return {name: [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()] for name in names}


@pytest.fixture(scope="module")
def splits() -> Splits:
    return make_splits(0)


def running(files: dict[str, Rows], lang: str) -> list[str]:
    return [row["text"] for row in files[f"pretrain_{lang}.jsonl"]]


def conversations(files: dict[str, Rows]) -> list[list[dict[str, str]]]:
    rows = [row for lang in LANGS for name in ("sft", "val_sft") for row in files[f"{name}_{lang}.jsonl"]]
    return [row["conversations"] for row in rows]


def sft_turns(files: dict[str, Rows]) -> list[str]:
    """Everything that SFT, its validation and the preferences show."""
    out = [message["content"] for talk in conversations(files) for message in talk]
    for row in files["preference.jsonl"]:
        out += [message["content"] for message in row["prompt"]] + [row["chosen"], row["rejected"]]
    return out


def everything(folder: Path, files: dict[str, Rows]) -> dict[str, list[str]]:
    """All text by language, rejected answers left out (they may be wrong on purpose)."""
    out: dict[str, list[str]] = {lang: [] for lang in LANGS}
    for lang in LANGS:
        for name in ("pretrain", "val"):
            out[lang] += [row["text"] for row in files[f"{name}_{lang}.jsonl"]]
        for name in ("sft", "val_sft"):
            out[lang] += [turn["content"] for row in files[f"{name}_{lang}.jsonl"] for turn in row["conversations"]]
        out[lang] += [path.read_text("utf-8") for path in (folder / "docs" / lang).glob("*.md")]
    for row in files["eval.jsonl"]:
        out[row["lang"]] += [turn["content"] for turn in row["messages"]] + row["answers"][:1]
    return out


def test_is_as_large_as_promised(splits: Splits, files: dict[str, Rows], folder: Path) -> None:
    vocabulary = splits.vocabulary
    entities = len(splits.world.entities) + len(vocabulary.all_terms)
    facts = sum(len(entity.facts) + len(entity.kin) for entity in splits.world.entities)
    facts += sum(1 + len(term.traits) for term in vocabulary.all_terms)
    assert entities >= 300
    assert facts >= 1500
    assert len(vocabulary.all_words) >= 800
    for lang in LANGS:
        assert len(list((folder / "docs" / lang).glob("*.md"))) >= 12
        assert Counter(row["source"] for row in files[f"sft_{lang}.jsonl"]).keys() == set(KINDS)
    assert len(files["preference.jsonl"]) == SIZES.preference
    assert len(files["val_preference.jsonl"]) == SIZES.preference_validation
    assert len(files["prompts.jsonl"]) == SIZES.prompts
    characters = {lang: sum(map(len, running(files, lang))) for lang in LANGS}
    assert 0.8e6 < characters["zh"] < 1.5e6
    assert 2.0e6 < characters["en"] < 3.6e6


def test_is_the_same_for_the_same_seed(folder: Path, tmp_path: Path) -> None:
    def digest(root: Path) -> dict[str, str]:
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    write_corpus(tmp_path / "again", seed=0)
    assert digest(tmp_path / "again") == digest(folder)
    write_corpus(tmp_path / "other", seed=1)
    assert digest(tmp_path / "other")["eval.jsonl"] != digest(folder)["eval.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_names_are_one_to_one(splits: Splits) -> None:
    for lang in LANGS:
        names = [entity.name.of(lang) for entity in splits.world.entities]
        assert len(set(names)) == len(names)
        given = (
            [n.split("·")[0] if "·" in n else n[1:] for n in names[: len(splits.world.people)]] if lang == "zh" else []
        )
        assert len(set(given)) == len(given)


@pytest.mark.parametrize("attribute", ["home", "job", "food", "animal", "hobby", "birthday", "friend"])
def test_no_value_of_a_person_is_frequent(splits: Splits, attribute: str) -> None:
    for people in (splits.world.people, [person for person in splits.world.people if person.held_out]):
        counts = Counter(person.facts[attribute] for person in people)
        assert max(counts.values()) <= max(3, 0.08 * len(people))
    assert len({person.facts[attribute] for person in splits.world.people}) >= 30


@pytest.mark.parametrize("attribute", ["river", "hill", "product", "founded", "festival", "flag"])
def test_no_value_of_a_place_is_frequent(splits: Splits, attribute: str) -> None:
    counts = Counter(place.facts[attribute] for place in splits.world.places)
    assert max(counts.values()) <= 0.08 * len(splits.world.places)


def test_examination_has_enough_of_every_kind_and_no_question_twice(files: dict[str, Rows]) -> None:
    counts = Counter((row["kind"], row["lang"]) for row in files["eval.jsonl"])
    assert set(counts) == {(kind, lang) for kind in KINDS for lang in LANGS}
    assert min(counts.values()) >= 150
    for lang in LANGS:
        asked = [
            tuple(turn["content"] for turn in row["messages"] if turn["role"] != "system")
            for row in files["eval.jsonl"]
            if row["lang"] == lang
        ]
        assert len(set(asked)) == len(asked)
    assert all(row["messages"][-1]["role"] == "user" and row["answers"] for row in files["eval.jsonl"])


def test_no_examined_conversation_is_trained(files: dict[str, Rows]) -> None:
    def key(messages: list[dict[str, str]]) -> tuple[str, ...]:
        return tuple(turn["content"] for turn in messages if turn["role"] != "system")

    trained = {key(talk[:-1]) for talk in conversations(files)} | {key(r["prompt"]) for r in files["preference.jsonl"]}
    examined = {key(row["messages"]) for row in files["eval.jsonl"]}
    assert not trained & examined
    held_out = {key(row["prompt"]) for row in files["val_preference.jsonl"]}
    assert held_out and held_out <= examined, "held-out pairs are about questions of the examination"


def test_no_prompt_was_asked_in_fine_tuning_or_is_examined(splits: Splits, files: dict[str, Rows]) -> None:
    def sums(texts: list[str]) -> set[tuple[int, str, int]]:
        found = (match for text in texts for match in re.findall(r"(\d+) ?([+-]) ?(\d+)", text))
        return {numbers.Sum(int(a), sign, int(b)).pair for a, sign, b in found}

    rows = files["prompts.jsonl"]
    assert Counter(row["lang"] for row in rows) == dict.fromkeys(LANGS, SIZES.prompts // 2)
    assert all(set(row) == {"messages", "source", "lang"} and len(row["messages"]) == 1 for row in rows)
    prompts = [row["messages"][0]["content"] for row in rows]
    asked = sums([turn["content"] for talk in conversations(files) for turn in talk])
    examined = {each.pair for each in splits.sums.held_out}
    assert len(sums(prompts)) == len(prompts), "each once"
    assert not sums(prompts) & asked and not sums(prompts) & examined


def test_sft_never_asks_about_held_out_people_and_places(splits: Splits, files: dict[str, Rows]) -> None:
    asked = [turn["content"] for talk in conversations(files) for turn in talk if turn["role"] == "user"]
    asked += [turn["content"] for row in files["preference.jsonl"] for turn in row["prompt"] if turn["role"] == "user"]
    text = "\n".join(asked)
    for entity in splits.world.entities:
        if entity.held_out:
            assert entity.name.en not in text, entity.name
            assert entity.name.zh not in text, entity.name


def test_fact_examination_is_about_held_out_people_and_places(splits: Splits, files: dict[str, Rows]) -> None:
    for row in files["eval.jsonl"]:
        named = [e for e in splits.world.entities if e.name.of(row["lang"]) in row["messages"][-1]["content"]]
        if row["kind"] == "fact":
            assert named and named[0].held_out
        if row["kind"] == "followup":
            assert not any(entity.held_out for entity in named)


@pytest.mark.parametrize("lang", LANGS)
def test_every_held_out_fact_is_told_often_and_never_asked(splits: Splits, files: dict[str, Rows], lang: str) -> None:
    told: dict[str, list[str]] = defaultdict(list)
    for text in running(files, lang):
        for entity in splits.world.entities:
            if entity.name.of(lang) in text:
                told[entity.name.en].append(text)
    module = phrases_zh if lang == "zh" else phrases_en
    for entity in splits.world.entities:
        for attribute in attributes(entity):
            texts = [text for text in told[entity.name.en] if entity.facts[attribute].of(lang) in text]
            assert len(texts) >= 25, (entity.name, attribute)
        if entity.held_out:
            forms = module.PLACE_QUESTIONS if entity.is_place else module.PERSON_QUESTIONS
            whole = "\n".join(told[entity.name.en])
            for group in forms.values():
                for form in group:
                    assert form.format(n=entity.name.of(lang), h="his", he="he") not in whole
                    assert form.format(n=entity.name.of(lang), h="her", he="she") not in whole


def test_every_fact_has_eight_wordings() -> None:
    for module in (phrases_en, phrases_zh):
        for table in (module.PERSON, module.PLACE):
            assert all(len(set(forms)) >= 8 for forms in table.values())


def test_held_out_sums_appear_nowhere(splits: Splits, folder: Path, files: dict[str, Rows]) -> None:
    hidden = {each.pair for each in splits.sums.held_out}
    assert len(hidden) >= 300
    text = "\n".join(sft_turns(files) + [t for lang in LANGS for t in running(files, lang)])
    text += "\n".join(row["text"] for lang in LANGS for row in files[f"val_{lang}.jsonl"])
    found = {numbers.Sum(int(a), sign, int(b)).pair for a, sign, b in re.findall(r"(\d+) ?([+-]) ?(?=(\d+))", text)}
    assert not found & hidden
    followups = [row for row in files["eval.jsonl"] if row["kind"] == "followup"]
    talk = "\n".join(turn["content"] for row in followups for turn in row["messages"])
    shown = {numbers.Sum(int(a), sign, int(b)).pair for a, sign, b in re.findall(r"(\d+) ?([+-]) ?(?=(\d+))", talk)}
    assert not shown & hidden


def test_every_sum_is_right(files: dict[str, Rows]) -> None:
    texts = [text for lang in LANGS for text in running(files, lang)]
    texts += [turn["content"] for talk in conversations(files) for turn in talk]
    texts += [answer for row in files["eval.jsonl"] for answer in row["answers"]]
    lines = [line for text in texts for line in text.splitlines() if re.fullmatch(r"\d+[+-]\d+=[\d+=-]+\d", line)]
    assert len(lines) > 10_000
    for line in set(lines):
        results = set()
        for part in line.split("="):
            a, sign, b = re.fullmatch(r"(\d+)(?:([+-])(\d+))?", part).groups()  # type: ignore[union-attr]
            results.add(int(a) + int(b or 0) * (-1 if sign == "-" else 1))
        assert len(results) == 1, line


def test_held_out_words_are_only_in_the_glossary(splits: Splits, files: dict[str, Rows]) -> None:
    hidden = splits.vocabulary.held_words
    assert len(hidden) >= 150
    turns = sft_turns(files)
    by_source: dict[str, Rows] = defaultdict(list)
    for lang in LANGS:
        for row in files[f"pretrain_{lang}.jsonl"]:
            by_source[row["source"]].append(row)
    glossary, lessons = (
        [line for row in by_source[source] for line in row["text"].splitlines()] for source in ("glossary", "lessons")
    )
    for word in hidden:
        en = re.escape(word.en)
        english = re.compile(rf"\b{en}\b")
        chinese = re.compile(rf"(?<![{HAN}]){word.zh}(?![{HAN}])")
        ask = re.compile(
            rf'[“"]{word.zh}[”"]|\bword {en}(?= in |[.?])|单词 {en} (?=[{HAN}])|Chinese for {en}(?: is|[?])'
        )
        for lines, fewest, most in ((glossary, 15, 1000), (lessons, 0, 0)):
            near = [line for line in lines if word.zh in line and word.en in line]
            assert fewest <= sum(bool(english.search(line) and chinese.search(line)) for line in near) <= most, word
        assert not any(ask.search(turn) for turn in turns if word.zh in turn or word.en in turn), word


def test_held_out_definitions_are_only_in_running_text(splits: Splits, files: dict[str, Rows]) -> None:
    turns = set(sft_turns(files))
    for term in splits.vocabulary.held_terms:
        assert not {term.definition_en, term.definition_zh} & turns
        for lang, whole in (("en", term.definition_en), ("zh", term.definition_zh)):
            assert sum(whole in text for text in running(files, lang) if whole[-8:] in text) >= 8, term.en


def test_held_out_sentences_appear_nowhere(splits: Splits, files: dict[str, Rows]) -> None:
    shown = set(sft_turns(files))
    lines = {line for lang in LANGS for text in running(files, lang) for line in text.splitlines()}
    lines |= {re.sub(r"^.*?[:：] ?", "", turn) for turn in shown} | shown
    for sentence in splits.sentences:
        if sentence.held_out:
            assert sentence.text.en not in lines
            assert sentence.text.zh not in lines
    asked = {row["answers"][0] for row in files["eval.jsonl"] if row["kind"] == "sentence"}
    assert asked <= {text for each in splits.sentences if each.held_out for text in each.text}


def test_unknown_questions_are_about_nobody_of_the_world(splits: Splits, files: dict[str, Rows]) -> None:
    trained = Counter(turn["content"] for talk in conversations(files) for turn in talk if turn["role"] == "user")
    pattern = re.compile("|".join(re.escape(e.name.zh) + "|" + re.escape(e.name.en) for e in splits.world.entities))
    strange = 0
    for row in files["eval.jsonl"]:
        if row["kind"] == "unknown":
            strange += pattern.search(row["messages"][-1]["content"]) is None
            assert row["messages"][-1]["content"] not in trained
    assert strange >= 250


def test_english_articles_agree(folder: Path, files: dict[str, Rows]) -> None:
    text = "\n".join(everything(folder, files)["en"])
    for before, word in re.findall(r"\b([Aa]n?) ([A-Za-z]+)", text):
        vowel = word[0].lower() in "aeio" or word.lower().startswith(("um", "un", "ug", "up", "us", "ur", "ul", "hour"))
        if word.lower().startswith(("uni", "use", "usu", "one", "eu", "ewe", "ukul")):
            vowel = False
        assert (before.lower() == "an") == vowel, f"{before} {word}"


def test_punctuation_is_clean(folder: Path, files: dict[str, Rows]) -> None:
    texts = everything(folder, files)
    for lang in LANGS:
        whole = "\n".join(texts[lang])
        bad = [r"[，。！？；：、]{2,}", r"[,;:]{2,}", r"\.\.", r"[{}]", r" {2,}", r" [,.;!?]", r"[ \t]\n"]
        bad += [
            rf"(?<=[{HAN}])[,;!?](?=[{HAN}])",
            rf"(?<=[{HAN}])\.(?!\w)(?<!\"\.)(?=[{HAN}])",
            r"的的",
            r"(?<!现)在在",
            r"年年[^糕]",
        ]
        for pattern in bad:
            found = re.search(pattern, whole)
            assert found is None, (lang, pattern, whole[found.start() - 30 : found.end() + 30])


def test_english_sentences_begin_with_a_capital(files: dict[str, Rows]) -> None:
    for text in running(files, "en"):
        found = re.search(r"(?<=[a-z][.!?] )[a-z]\w+", text)
        assert found is None, text


def test_preferences_differ_from_the_right_answer(files: dict[str, Rows]) -> None:
    for name in ("preference.jsonl", "val_preference.jsonl"):
        rows = files[name]
        assert all(row["chosen"] != row["rejected"] and row["rejected"] for row in rows)
        assert max(Counter(row["rejected"] for row in rows).values()) < 0.2 * len(rows)


def test_values_are_named_as_in_the_glossary() -> None:
    chinese = {word.en: word.zh for word in words()} | {term.plural: term.zh for term in terms() if term.plural}
    for pair in (*values.JOBS, *values.FOODS, *values.ANIMALS):
        assert chinese.get(pair.en, pair.zh) == pair.zh


def test_dates_are_days_of_the_year() -> None:
    assert sum(values.MONTH_DAYS) == 365
    assert values.date(5, 3) == ("3 May", "5月3日")


def test_every_other_sum_is_asked_with_spaces_whatever_its_numbers() -> None:
    rng = random.Random(0)
    train = numbers.split_sums().train
    for lang in LANGS:
        asked = [(each, numbers.ask(each, lang, rng)) for each in train]
        spaced = [each for each, question in asked if f"{each.a} {each.sign} {each.b}" in question]
        tight = [each for each, question in asked if each.question in question]
        assert len(spaced) + len(tight) == len(train) and 0.45 < len(spaced) / len(train) < 0.55
        means = [sum(each.result % 2 for each in group) / len(group) for group in (spaced, tight)]
        assert abs(means[0] - means[1]) < 0.06, "the spaces tell something of the answer"
