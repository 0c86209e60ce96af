"""What the records of a file are, found by trying the first one; and the text of all of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from oriole.errors import DataError
from oriole.text import pairs
from oriole.text.chatrows import spoken
from oriole.text.formats import read_chats, read_docs, read_feedback, read_preferences, read_prompts
from oriole.text.paths import Skipped, file_kind
from oriole.text.records import Doc, Feedback
from oriole.text.template import Chat, Preference, Prompt

__all__ = ["READERS", "RecordKind", "find_kind", "read_texts"]

RecordKind = Literal["text", "chat", "preference", "feedback", "prompt"]

READERS: dict[RecordKind, Callable[..., Iterable[Any]]] = {
    "chat": read_chats,
    "text": read_docs,
    "preference": read_preferences,
    "feedback": read_feedback,
    "prompt": read_prompts,
}
"""Chats before text: of `{"text"}` only what shows roles can be read as chats, but all of it as text. Prompts last: all
chats can be read as prompts."""


def find_kind(path: Path) -> RecordKind:
    """Running text, chats, preference pairs or unpaired feedback; `DataError` when the first record is none of them."""
    if file_kind(path) in ("html", "pdf"):
        return "text"
    if file_kind(path) == "text":
        return "chat" if pairs.style(path) in ("rendered", "labelled", "tabbed") else "text"
    reasons: dict[RecordKind, str] = {}
    for kind, read in READERS.items():
        try:
            next(iter(read(path)))
            return kind
        except DataError as error:
            reasons[kind] = str(error)
    if len(set(reasons.values())) == 1:  # a file that cannot be read at all
        raise DataError(reasons["text"])
    raise DataError(f"neither running text nor chats nor preferences: {reasons['text']}; {reasons['chat']}")


def read_texts(paths: Sequence[Path], skip_bad: Skipped | None = None) -> Iterator[Doc]:
    """What a tokenizer meets in the files, whatever each of them holds: of a conversation or pair all that is said.

    `skip_bad` as in `read_docs`; a file whose first record is bad is then taken for running text.
    """
    for path in paths:
        try:
            kind = find_kind(path)
        except DataError:
            if skip_bad is None:
                raise
            kind = "text"
        for record in READERS[kind](path, skip_bad=skip_bad):
            match record:
                case Doc():
                    yield record
                case Chat():
                    yield Doc(spoken(record.messages), record.lang, record.source)
                case Preference():
                    said = (*record.prompt, *record.chosen, *record.rejected)
                    yield Doc(spoken(said), record.lang, record.source)
                case Prompt():
                    yield Doc(spoken(record.messages), record.lang, record.source)
                case Feedback():
                    yield Doc(spoken((*record.prompt, *record.completion)), record.lang, record.source)
