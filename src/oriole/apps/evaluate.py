"""Held-out questions with accepted answers: exact match for each kind and language, and the loop rate. Greedy."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from oriole.apps.api import Generation, Oriole
from oriole.apps.conversation import to_message
from oriole.apps.thinking import without_thought
from oriole.errors import DataError
from oriole.infer.calibration import calibration_error
from oriole.infer.engine import Pondered
from oriole.log import track
from oriole.text.files import values
from oriole.text.judge import exact_match, loops
from oriole.text.template import Message

__all__ = ["NEW_TOKENS", "Answer", "ask", "each_answer", "evaluate_questions", "read_questions"]

NEW_TOKENS = 64
"""An answer that has no end mark within so many tokens counts as a loop."""


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """The questions of a JSON Lines file: `{"kind", "lang", "messages", "answers"}` each, the first two optional."""
    path = Path(path)
    out = []
    for where, value in values(path):
        try:
            out.append(_question(value))
        except DataError as error:
            raise DataError(f"{path}, {where}: {error}") from error
    if not out:
        raise DataError(f"{path} holds no questions; give at least one line with messages and answers")
    return out


def _question(value: Any) -> dict[str, Any]:
    match value:
        case {"messages": [*_, {"role": "user"}] as messages, "answers": [*accepted]} if accepted:
            for message in messages:
                to_message(message)
            if not all(isinstance(a, str) for a in accepted):
                raise DataError("'answers' must be strings")
            return {"kind": "all", "lang": "", **value}
        case _:
            raise DataError("expected an object with 'messages', the last one the user's, and a list 'answers'")


class Answer(NamedTuple):
    """What a model said to one prompt."""

    text: str
    tokens: int
    """Length, the end mark not counted."""
    ended: bool
    """Whether the end mark came within the tokens that were allowed."""
    loop: bool
    """It repeats, or never ended."""
    pondered: tuple[Pondered, ...] = ()
    """Of a model with a latent block: the steps and the confidence of each token, the end mark's among them."""

    @property
    def confidence(self) -> float:
        """The probability that every token of it is right, as the model sees it."""
        return math.prod(one.confidence for one in self.pondered)


def each_answer(
    oriole: Oriole,
    prompts: Sequence[Sequence[Message]],
    how: Generation,
    batch: int = 128,
    seeds: Sequence[int] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """(place of the prompt, its answer), each as soon as it is there, several side by side; the same as one by one.

    With a seed, prompt number i is answered with `how.seed + seeds[i]`, by default `how.seed + i`.
    """
    sampling = how.sampling(oriole.stop_ids)
    seeds = range(len(prompts)) if seeds is None else seeds
    requests = [
        (oriole.prompt(messages, how), sampling if how.seed is None else replace(sampling, seed=how.seed + own))
        for messages, own in zip(prompts, seeds, strict=True)
    ]
    for done in oriole.engine(batch).complete(requests):
        ended = done.finish == "stop"
        answer = without_thought(done.ids)
        text = oriole.tokenizer.decode(answer)
        text = text if len(answer) == len(done.ids) else text.lstrip()
        yield done.place, Answer(text, len(done.ids), ended, not ended or loops(done.ids), tuple(done.pondered))


def ask(
    oriole: Oriole, prompts: Sequence[Sequence[Message]], how: Generation, batch: int = 128, what: str = "asking"
) -> list[Answer]:
    """The answers to all prompts, in their order, as `each_answer` gives them."""
    answers: dict[int, Answer] = {}
    with track(what, total=len(prompts), unit="questions") as bar:
        for place, answer in each_answer(oriole, prompts, how, batch):
            answers[place] = answer
            bar.update(1)
    return [answers[place] for place in range(len(prompts))]


def evaluate_questions(oriole: Oriole, questions: Sequence[Mapping[str, Any]], batch: int = 128) -> dict[str, Any]:
    """Ask every question greedily and compare; the answers are those of one question at a time, only faster.

    Returns `{"exact_match": {lang: mean over kinds, …, "by_kind": {kind: {lang: share}}}, "loop_rate": share of answers
    that loop or do not end, "answers": [{"kind", "lang", "messages", "answers", "answer", "correct", "loop"}]}`,
    and of a model with a latent block `"reasoning": {"steps": iterations a token, "ece": calibration error of its
    confidence in answers}`.
    """
    how = Generation(temperature=0.0, max_new_tokens=NEW_TOKENS)
    said = ask(oriole, [[to_message(m) for m in q["messages"]] for q in questions], how, batch)
    answers: list[dict[str, Any]] = [
        {**question, "answer": one.text, "correct": exact_match(one.text, question["answers"]), "loop": one.loop}
        for question, one in zip(questions, said, strict=True)
    ]
    return {
        "exact_match": _shares(answers),
        **_reasoning(said, answers),
        "loop_rate": round(fmean(a["loop"] for a in answers), 4) if answers else 0.0,
        "answers": answers,
    }


def _reasoning(said: Sequence[Answer], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a model with a latent block: iterations a token, and how far its confidence in an answer is from being right
    (expected calibration error)."""
    steps = [each.steps for one in said for each in one.pondered]
    if not steps:
        return {}
    right = np.array([float(a["correct"]) for a in answers])
    error = calibration_error(np.array([one.confidence for one in said]), right)
    return {"reasoning": {"steps": round(fmean(steps), 3), "ece": round(error, 4)}}


def _shares(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Share of correct answers by kind and language, and each language's mean over its kinds."""
    groups: dict[str, dict[str, list[bool]]] = {}
    for a in answers:
        groups.setdefault(a.get("kind", "all"), {}).setdefault(a.get("lang", ""), []).append(a["correct"])
    by_kind = {k: {lang: fmean(c) for lang, c in sorted(langs.items())} for k, langs in sorted(groups.items())}
    languages = sorted({lang for langs in by_kind.values() for lang in langs})
    macro = {lang: round(fmean(s[lang] for s in by_kind.values() if lang in s), 4) for lang in languages}
    return {**macro, "by_kind": {k: {lang: round(s, 4) for lang, s in langs.items()} for k, langs in by_kind.items()}}
