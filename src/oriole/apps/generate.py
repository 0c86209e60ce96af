"""Answer a file of questions: JSON Lines in, the same records with an answer out; stopped work goes on."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from oriole.apps.api import Generation, Oriole, Placement
from oriole.apps.conversation import to_message
from oriole.config import apply_overrides, parse_overrides, validate
from oriole.errors import ConfigError, DataError, ModelError, raise_for_os_error
from oriole.log import say, track
from oriole.text.files import values
from oriole.text.template import Message

__all__ = ["GenerateSettings", "answer_file", "generate_file"]

QUESTION_KEYS = ("messages", "question", "query", "prompt")
"""Where a record's question is looked for, in this order, unless `question_key` says."""


class GenerateSettings(Generation, Placement):
    """The keys of `oriole generate`."""

    input: Path
    """A file of JSON Lines with a question in each record."""
    output: Path
    """Where the records go, each with its answer; a file that is there already is continued."""
    question_key: str = ""
    """The key of the question, a string or a list of messages; empty: messages, question, query or prompt."""
    answer_key: str = "answer"
    """The key of the answer in the output."""
    thought_key: str = "thought"
    """The key of what the model thought in a `<think>` block, in records where it did."""
    system: str | None = None
    """A system prompt for every question given as a string."""
    batch_size: int = Field(32, ge=1)
    """Answers that are generated side by side."""


def generate_file(path: str | Path, settings: Sequence[str] = ()) -> int:
    """`oriole generate PATH input=… output=…`: `answer_file` with the model at `path`; how many were answered now."""
    given: dict[str, Any] = {}
    apply_overrides(given, parse_overrides(settings))
    how = validate(GenerateSettings, given, "oriole generate")
    total = _check_input(how)  # a mistake in the last line is better met before the model is loaded
    return answer_file(Oriole(path).place(how), how, total)


def answer_file(oriole: Oriole, how: GenerateSettings, total: int | None = None) -> int:
    """Answer the records of `how.input` that `how.output` does not hold yet; how many that were.

    The output has the records in the order of the input, whole lines only, each written as soon as it and all before it
    are answered; so it may be stopped at any time. `DataError` when the output belongs to another input.
    """
    oriole.require_chat()
    total = _check_input(how) if total is None else total
    done = _continue_after(how)
    if done == total:
        say(f"all {total:,} questions of {how.input} are answered in {how.output}; nothing to do", "green")
        return 0
    records = _records(how)
    for _ in range(done):
        next(records)
    try:
        with how.output.open("a", encoding="utf-8") as file, track("answering", total, "questions", done) as bar:
            for record in _answered(oriole, records, how):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                bar.update(1)
    except OSError as error:
        raise_for_os_error(error, "writing", how.output)
    return total - done


@dataclass(frozen=True)
class _Record:
    where: str
    value: dict[str, Any]
    messages: list[Message]


def _answered(oriole: Oriole, records: Iterator[_Record], how: GenerateSettings) -> Iterator[dict[str, Any]]:
    """The records with their answers, in their order."""
    open_: dict[int, dict[str, Any]] = {}  # place -> record, from the first unfinished one on
    texts: dict[int, str] = {}
    thoughts: dict[int, str] = {}
    ended: set[int] = set()

    def prompts() -> Iterator[list[int]]:
        for place, record in enumerate(records):
            open_[place], texts[place] = record.value, ""
            try:
                yield oriole.prompt(record.messages, how)
            except ModelError as error:
                raise ModelError(f"{how.input}, {record.where}: {error}") from error

    following = 0
    for place, piece in oriole.answers(prompts(), how, how.batch_size):
        if piece.thought:
            thoughts[place] = thoughts.get(place, "") + piece.text
        else:
            texts[place] += piece.text
        if piece.last:
            ended.add(place)
        while following in ended:
            ended.remove(following)
            thought = {how.thought_key: thoughts.pop(following)} if following in thoughts else {}
            yield {**open_.pop(following), **thought, how.answer_key: texts.pop(following)}
            following += 1


def _check_input(how: GenerateSettings) -> int:
    """The number of records, all of which can be used."""
    if how.input.resolve() == how.output.resolve():
        raise ConfigError(f"input and output are both {how.input}; give the output another name")
    total = sum(1 for _ in _records(how))
    if not total:
        raise DataError(f"{how.input} holds no questions; give at least one line")
    return total


def _records(how: GenerateSettings) -> Iterator[_Record]:
    for where, value in values(how.input):
        try:
            yield _Record(where, value, _messages(value, how))
        except DataError as error:
            raise DataError(f"{how.input}, {where}: {error}") from error


def _messages(value: Any, how: GenerateSettings) -> list[Message]:
    if not isinstance(value, dict):
        raise DataError("not a JSON object; expected one record a line")
    for name, made in (("answer_key", how.answer_key), ("thought_key", how.thought_key)):
        if made in value:
            raise DataError(f"the record has '{made}' already; choose another key with {name}=…")
    keys = (how.question_key,) if how.question_key else QUESTION_KEYS
    key = next((k for k in keys if k in value), None)
    if key is None:
        raise DataError(
            f"no question: none of {', '.join(keys)} is among its keys ({', '.join(value) or 'none'}); "
            "name the key with question_key=…"
        )
    question = value[key]
    if isinstance(question, str) and question.strip():
        return [*([Message("system", how.system)] if how.system else []), Message("user", question)]
    if isinstance(question, list) and question:
        messages = [to_message(m) for m in question]
        if messages[-1].role in ("user", "tool"):
            return messages
    raise DataError(f"'{key}' must be a question, as text or as a list of messages that ends with the user's")


def _continue_after(how: GenerateSettings) -> int:
    """How many records the output holds already; cuts off a last line that was not written to its end."""
    if not how.output.exists():
        how.output.parent.mkdir(parents=True, exist_ok=True)
        return 0
    done = whole = 0
    records = _records(how)
    try:
        with how.output.open("r+b") as file:
            for line in file:
                record = next(records, None)
                if record is not None and _is_torn(line, record.value):
                    break
                if record is None or _question_of(line, how) != record.value:
                    raise DataError(
                        f"{how.output}, line {done + 1}, does not answer record {done + 1} of {how.input}; it was made "
                        "from another input: choose another output, or remove it"
                    )
                done += 1
                whole += len(line)
            file.truncate(whole)
    except OSError as error:
        raise_for_os_error(error, "reading", how.output)
    return done


def _is_torn(line: bytes, record: dict[str, Any]) -> bool:
    """Whether it is the beginning of the record's output line: what a crash or a full disk leaves at the end."""
    begins = json.dumps(record, ensure_ascii=False).encode()[:-1]
    return not line.endswith(b"\n") and (begins.startswith(line) or line.startswith(begins))


def _question_of(line: bytes, how: GenerateSettings) -> Any:
    """An output line as it was in the input, None if it is no such line."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.pop(how.answer_key, None), str):
        return None
    record.pop(how.thought_key, None)
    return record
