"""What the records of a file are, found by trying the first one."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from oriole.errors import DataError
from oriole.text import pairs
from oriole.text.formats import read_chats, read_docs, read_feedback, read_preferences
from oriole.text.paths import file_kind

__all__ = ["READERS", "RecordKind", "find_kind"]

RecordKind = Literal["text", "chat", "preference", "feedback"]

READERS: dict[RecordKind, Callable[..., Iterable[Any]]] = {
    "chat": read_chats,
    "text": read_docs,
    "preference": read_preferences,
    "feedback": read_feedback,
}
"""Chats before text: of `{"text"}` only what shows roles can be read as chats, but all of it as text."""


def find_kind(path: Path) -> RecordKind:
    """Running text, chats, preference pairs or unpaired feedback; `DataError` when the first record is none of them."""
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
