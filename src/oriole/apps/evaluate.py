"""Held-out questions with accepted answers: exact match for each kind and language, and the loop rate. Greedy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from oriole.apps.api import Generation, Oriole, to_message
from oriole.errors import DataError
from oriole.log import track
from oriole.text.files import values
from oriole.text.judge import exact_match, loops

__all__ = ["NEW_TOKENS", "evaluate_questions", "read_questions"]

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


def evaluate_questions(oriole: Oriole, questions: Sequence[Mapping[str, Any]], batch: int = 128) -> dict[str, Any]:
    """Ask every question greedily and compare; the answers are those of one question at a time, only faster.

    Returns `{"exact_match": {lang: mean over kinds, …, "by_kind": {kind: {lang: share}}}, "loop_rate": share of answers
    that loop or do not end, "answers": [{"kind", "lang", "messages", "answers", "answer", "correct", "loop"}]}`.
    """
    how = Generation(temperature=0.0, max_new_tokens=NEW_TOKENS)
    sampling = how.sampling(oriole.stop_ids)
    requests = [(oriole.prompt([to_message(m) for m in q["messages"]], how), sampling) for q in questions]
    answers: list[dict[str, Any]] = [{} for _ in questions]
    with track("asking", total=len(questions), unit="questions") as bar:
        for done in oriole.engine(batch).complete(requests):
            question = questions[done.place]
            answer = oriole.tokenizer.decode(done.ids)
            answers[done.place] = {
                **question,
                "answer": answer,
                "correct": exact_match(answer, question["answers"]),
                "loop": done.finish != "stop" or loops(done.ids),
            }
            bar.update(1)
    return {
        "exact_match": _shares(answers),
        "loop_rate": round(fmean(a["loop"] for a in answers), 4) if answers else 0.0,
        "answers": answers,
    }


def _shares(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Share of correct answers by kind and language, and each language's mean over its kinds."""
    groups: dict[str, dict[str, list[bool]]] = {}
    for a in answers:
        groups.setdefault(a.get("kind", "all"), {}).setdefault(a.get("lang", ""), []).append(a["correct"])
    by_kind = {k: {lang: fmean(c) for lang, c in sorted(langs.items())} for k, langs in sorted(groups.items())}
    languages = sorted({lang for langs in by_kind.values() for lang in langs})
    macro = {lang: round(fmean(s[lang] for s in by_kind.values() if lang in s), 4) for lang in languages}
    return {**macro, "by_kind": {k: {lang: round(s, 4) for lang, s in langs.items()} for k, langs in by_kind.items()}}
