"""Every data format that Oriole reads becomes `Doc`, `Chat` or `Preference`, one record after another.

Running text   {"text"}; a .txt or .md file is one document, or several between `<|endoftext|>` marks
Chats          {"conversations"} or {"messages"}: lists of {"role", "content"} or ShareGPT's {"from", "value"};
               Alpaca's {"instruction", "input", "output", "history", "system"}; {"prompt", "response"},
               {"query", "response"}, {"question", "answer"}; .tsv lines of question and answer
Tools          "tools" as a list or as its JSON; calls as turns of role tool_call or function_call, as OpenAI's
               "tool_calls", or as JSON strings; results as role tool, observation or function
Reasoning      "reasoning_content" or "reasoning" of an assistant's message, or `<think>…</think>` opening it
Preferences    {"prompt", "chosen", "rejected"} as strings, messages or lists of them; {"chosen", "rejected"} lists that
               begin with the same messages; a {"conversations"} prompt with one chosen and one rejected turn

Optional everywhere: "source" (else the file's name, or the folder's for text files) and "lang".
Text is handed on as it stands; `text.clean` mends it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from oriole.errors import DataError
from oriole.text import records
from oriole.text.files import Skipped, expand, file_kind, lines, plain_stem, refuse, values
from oriole.text.records import Doc
from oriole.text.template import Chat, Message, Preference

__all__ = ["Doc", "Skipped", "expand", "read_chats", "read_docs", "read_preferences"]

T = TypeVar("T", Doc, Chat, Preference)
Paths = str | Path | Iterable[str | Path]

SEPARATOR = "<|endoftext|>"
"""Between two documents of one text file."""

LONGEST = 1 << 20
"""Characters after which a document of a text file ends at the next line end, so that no file need fit in memory."""


# --- readers ---------------------------------------------------------------------------------------------------------


def read_docs(paths: Paths, *, skip_bad: Skipped | None = None) -> Iterator[Doc]:
    """The documents of the files, in order. `skip_bad` collects records that do not fit instead of raising."""
    for path in _each(paths):
        match file_kind(path):
            case "text":
                yield from _nonempty(path, _text_docs(path, skip_bad), skip_bad)
            case "json":
                yield from _nonempty(path, _parsed(path, records.doc, skip_bad), skip_bad)
            case "tsv":
                raise DataError(f"{path} holds questions and answers; running text is read from jsonl, json, txt or md")


def read_chats(paths: Paths, *, skip_bad: Skipped | None = None) -> Iterator[Chat]:
    """The conversations of the files, in order, each with at least one assistant's turn. `skip_bad` as in read_docs.

    Tool definitions come out in OpenAI's form, whichever way they were written. The ids that tie a tool's result to its
    call are left out: the template has no place for them. A `system` turn may stand anywhere.
    """
    for path in _each(paths):
        match file_kind(path):
            case "json":
                yield from _nonempty(path, _parsed(path, records.chat, skip_bad), skip_bad)
            case "tsv":
                yield from _nonempty(path, _tsv_chats(path, skip_bad), skip_bad)
            case "text":
                raise DataError(f"{path} is running text; chats are read from jsonl, json or tsv")


def read_preferences(paths: Paths, *, skip_bad: Skipped | None = None) -> Iterator[Preference]:
    """The preference pairs of the files, in order. `skip_bad` as in read_docs."""
    for path in _each(paths):
        if file_kind(path) != "json":
            raise DataError(f"{path} holds no preference pairs; they are read from jsonl or json")
        yield from _nonempty(path, _parsed(path, records.preference, skip_bad), skip_bad)


def _each(paths: Paths) -> Iterator[Path]:
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if path.is_dir():
            raise DataError(f"{path} is a folder, not a file; name the files in it, for example {path}/*.jsonl")
        yield path


def _nonempty(path: Path, items: Iterator[T], skip_bad: Skipped | None) -> Iterator[T]:
    """The items; a file that has none, not even a bad one, is refused."""
    before = skip_bad.total if skip_bad is not None else 0
    empty = True
    for item in items:
        empty = False
        yield item
    if empty and (skip_bad is None or skip_bad.total == before):
        refuse(path, "", "holds nothing to read; give a file with data or leave it out", skip_bad)


def _parsed(path: Path, parse: Callable[[Any], T], skip_bad: Skipped | None) -> Iterator[T]:
    source = plain_stem(path)
    for where, value in values(path, skip_bad):
        try:
            item = parse(value)
        except records.Misfit as misfit:
            refuse(path, where, str(misfit), skip_bad)
            continue
        yield item if item.source else replace(item, source=source)


# --- plain files -----------------------------------------------------------------------------------------------------


def _text_docs(path: Path, skip_bad: Skipped | None) -> Iterator[Doc]:
    source = path.absolute().parent.name
    pieces: list[str] = []
    size = 0

    def doc() -> Iterator[Doc]:
        text = "".join(pieces).strip("\r\n")
        pieces.clear()
        if text.strip():
            yield Doc(text, source=source)

    for _, line in lines(path, skip_bad):
        for n, piece in enumerate(line.split(SEPARATOR)):
            if n or size >= LONGEST:
                yield from doc()
                size = 0
            pieces.append(piece)
            size += len(piece)
    yield from doc()


def _tsv_chats(path: Path, skip_bad: Skipped | None) -> Iterator[Chat]:
    source = plain_stem(path)
    for number, line in lines(path, skip_bad):
        cells = [cell.strip() for cell in line.rstrip("\r\n").split("\t")]
        if not any(cells) or (number == 1 and cells[0].lower() in records.ASK and cells[-1].lower() in records.ANSWER):
            continue
        if len(cells) != 2 or not all(cells):
            found = f"{len(cells)} cells" if all(cells) else "an empty cell"
            refuse(path, f"line {number}", f"{found}; expected a question, one tab, and an answer", skip_bad)
            continue
        yield Chat((Message("user", cells[0]), Message("assistant", cells[1])), source=source)
