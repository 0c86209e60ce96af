"""Every data format that Oriole reads becomes `Doc`, `Chat`, `Preference`, `Prompt` or `Feedback`, record after record.

Running text   {"text"}; a .txt or .md file is one document, or several between `<|endoftext|>` marks or after `[EOS]`;
               .html and .pdf; {"title", "summary", "sections"} of Baidu-baike
Chats          {"conversations"} or {"messages"}: lists of {"role", "content"} or ShareGPT's {"from", "value"};
               Alpaca's {"instruction", "input", "output", "history", "system"}; {"prompt", "response"},
               {"prompt", "completion"}, {"query", "response"}, {"question", "answer"}, {"q", "a"}; titles with
               descriptions (baike_qa2019, webtext2019zh, medical sets); BELLE's `Human: … Assistant: …`; .tsv lines of
               question and answer; .txt with `问：…答：…`, `Q: … A: …`, a tab, or question?answer on a line
Rendered       ChatML, `##提问:…##回答:…[EOS]`, KHAOSZ's `<|user|>…`, `<s>role…</s>` in {"text"} or in a .txt file
Tools          "tools" as a list or as its JSON; calls as turns of role tool_call or function_call, as OpenAI's
               "tool_calls", or as JSON strings; results as role tool, observation or function
Reasoning      "reasoning_content" or "reasoning" of an assistant's message, or `<think>…</think>` opening it
Preferences    {"prompt", "chosen", "rejected"} as strings, messages or lists of them; {"chosen", "rejected"} lists that
               begin with the same messages; a {"conversations"} prompt with one chosen and one rejected turn; with
               a "margin" where it is known how much better the chosen one is
Prompts        {"prompt"}; {"messages"} that end with the user's, with a list of right "answers" where known; chats and
               preference pairs, without their last answers
Feedback       {"prompt", "completion", "label"}; any chat with "kto_tag"

Records stand in .jsonl or .json, or in the rows of .csv, .tsv, .parquet and .arrow under the same names; files with
other spellings are read through LLaMA-Factory's `dataset_info.json`. Optional everywhere: "source" (else the file's
name, or the folder's for text files) and "lang". Text is handed on as it stands; `text.clean` mends it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from oriole.errors import DataError, ResourceError
from oriole.text import pairs, records, tables
from oriole.text.files import BrokenFile, Skipped, expand, file_kind, lines, plain_stem, refuse, values
from oriole.text.llamafactory import DataSet, data_sets, is_description
from oriole.text.pages import pdf_pages, read_html
from oriole.text.records import Doc, Feedback
from oriole.text.template import Chat, Message, Preference, Prompt

__all__ = [
    "Doc", "Feedback", "Skipped", "expand", "read_chats", "read_docs", "read_feedback", "read_preferences",
    "read_prompts",
]  # fmt: skip

T = TypeVar("T", Doc, Chat, Preference, Feedback, Prompt)
Paths = str | Path | Iterable[str | Path]

SEPARATOR = "<|endoftext|>"
"""Between two documents of one text file."""

LONGEST = 1 << 20
"""Characters after which a document of a text file ends at the next line end, so that no file need fit in memory."""

_RECORDS = ("json", "csv", "tsv", "parquet", "arrow")


# --- readers ---------------------------------------------------------------------------------------------------------


def read_docs(paths: Paths, *, skip_bad: Skipped | None = None) -> Iterator[Doc]:
    """The documents of the files, in order.

    `skip_bad` collects records that do not fit instead of raising; of a file that is damaged it takes what comes before
    the damage, and goes on with the next. Files that are not there at all are an error always.
    """

    def some(path: Path, described: DataSet | None) -> Iterator[Doc]:
        match file_kind(path):
            case "html":
                yield Doc(read_html(path, skip_bad), source=path.absolute().parent.name)
            case "pdf":
                yield from _joined_pages(path)
            case "text" if pairs.style(path) != "json":
                yield from _text_docs(path, skip_bad)
            case "tsv" if "text" not in tables.header(path) and described is None:
                raise DataError(f"{path} holds questions and answers; running text is read from jsonl, json, txt or md")
            case _:
                yield from _parsed(path, described, records.docs, skip_bad)

    return _read(paths, "doc", some, skip_bad)


def read_chats(paths: Paths, *, skip_bad: Skipped | None = None) -> Iterator[Chat]:
    """The conversations of the files, in order, each with at least one assistant's turn. `skip_bad` as in read_docs.

    Tool definitions come out in OpenAI's form, whichever way they were written. The ids that tie a tool's result to its
    call are left out: the template has no place for them. A `system` turn may stand anywhere.
    """

    def some(path: Path, described: DataSet | None) -> Iterator[Chat]:
        match file_kind(path):
            case "text":
                yield from _text_chats(path, described, skip_bad)
            case "tsv" if described is None and len(records.KNOWN.intersection(tables.header(path))) < 2:
                yield from _tsv_chats(path, skip_bad)
            case "html" | "pdf":
                raise DataError(f"{path} is running text; chats are read from jsonl, json, csv, tsv, parquet or txt")
            case _:
                yield from _parsed(path, described, lambda value: [records.chat(value)], skip_bad)

    return _read(paths, "chat", some, skip_bad)


def read_preferences(paths: Paths, *, skip_bad: Skipped | None = None) -> Iterator[Preference]:
    """The preference pairs of the files, in order. `skip_bad` as in read_docs."""

    def some(path: Path, described: DataSet | None) -> Iterator[Preference]:
        if file_kind(path) not in _RECORDS:
            raise DataError(f"{path} holds no preference pairs; they are read from jsonl, json, csv or parquet")
        return _parsed(path, described, lambda value: [records.preference(value)], skip_bad)

    return _read(paths, "preference", some, skip_bad)


def read_feedback(paths: Paths, *, skip_bad: Skipped | None = None) -> Iterator[Feedback]:
    """Single answers with a mark, good or not, in order. `skip_bad` as in read_docs."""

    def some(path: Path, described: DataSet | None) -> Iterator[Feedback]:
        if file_kind(path) not in _RECORDS:
            raise DataError(f"{path} holds no feedback; it is read from jsonl, json, csv or parquet")
        return _parsed(path, described, lambda value: [records.feedback(value)], skip_bad)

    return _read(paths, "feedback", some, skip_bad)


def read_prompts(paths: Paths, *, skip_bad: Skipped | None = None) -> Iterator[Prompt]:
    """What the files ask, in order: prompts alone, and chats and preference pairs without their last answers.

    A chat's last answer, the chosen one of a pair, or a record's list of "answers" are the right ones. `skip_bad` as in
    read_docs.
    """

    def some(path: Path, described: DataSet | None) -> Iterator[Prompt]:
        if file_kind(path) in _RECORDS:
            yield from _parsed(path, described, lambda value: [records.prompt(value)], skip_bad)
            return
        for chat in read_chats(path, skip_bad=skip_bad):
            yield records.prompt_of(chat)

    return _read(paths, "prompt", some, skip_bad)


# --- files -----------------------------------------------------------------------------------------------------------


def _read(
    paths: Paths, wanted: str, some: Callable[[Path, DataSet | None], Iterator[T]], skip_bad: Skipped | None
) -> Iterator[T]:
    """What `some` finds in each file; a file without anything, not even a bad record, is refused."""
    for path, described in _each(paths, wanted):
        before = skip_bad.total if skip_bad is not None else 0
        empty = True
        try:
            for item in some(path, described):
                empty = False
                yield item
        except (BrokenFile, ResourceError) as error:
            if skip_bad is None:
                raise
            skip_bad.add(path, f"{error} (the rest of the file is left out)")
        if empty and (skip_bad is None or skip_bad.total == before):
            refuse(path, "", "holds nothing to read; give a file with data or leave it out", skip_bad)


def _each(paths: Paths, wanted: str) -> Iterator[tuple[Path, DataSet | None]]:
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if path.is_dir():
            raise DataError(f"{path} is a folder, not a file; name the files in it, for example {path}/*.jsonl")
        if not is_description(path):
            if not path.exists():
                raise DataError(f"no file {path}; check the path")
            yield path, None
            continue
        sets = data_sets(path)
        fitting = [one for one in sets if one.holds == wanted]
        if not fitting:
            held = ", ".join(f"'{one.name}' ({one.holds})" for one in sets[:8])
            raise DataError(f"{path} describes no {wanted} data; it has {held}")
        for one in fitting:
            yield from ((file, one) for file in one.files)


def _values(path: Path, skip_bad: Skipped | None) -> Iterator[tuple[str, Any]]:
    """(place, record) of each record of a file, whatever it is written in."""
    match file_kind(path):
        case "json" | "text":
            return values(path, skip_bad)
        case _:
            return tables.rows(path, records.KNOWN, skip_bad)


def _parsed(
    path: Path, described: DataSet | None, parse: Callable[[Any], list[T]], skip_bad: Skipped | None
) -> Iterator[T]:
    source = described.name if described is not None else plain_stem(path)
    for where, value in _values(path, skip_bad):
        try:
            items = parse(value if described is None else described.record(value))
        except records.Misfit as misfit:
            refuse(path, where, str(misfit), skip_bad)
            continue
        for item in items:
            yield item if item.source else replace(item, source=source)


# --- plain files -----------------------------------------------------------------------------------------------------


def _text_docs(path: Path, skip_bad: Skipped | None) -> Iterator[Doc]:
    source = path.absolute().parent.name
    pieces: list[str] = []
    size = 0

    def doc() -> Iterator[Doc]:
        text = "".join(pieces).strip("\r\n").removeprefix("<|beginoftext|>")
        pieces.clear()
        if text.strip():
            yield Doc(text, source=source)

    for _, line in lines(path, skip_bad):
        ended = line.rstrip()
        if ended.endswith("[EOS]"):
            line = ended.removesuffix("[EOS]") + SEPARATOR
        for n, piece in enumerate(line.split(SEPARATOR)):
            if n or size >= LONGEST:
                yield from doc()
                size = 0
            pieces.append(piece)
            size += len(piece)
    yield from doc()


def _joined_pages(path: Path) -> Iterator[Doc]:
    """A PDF as one document, or as several of about a million characters."""
    source = path.absolute().parent.name
    held: list[str] = []
    for page in pdf_pages(path):
        held.append(page)
        if sum(map(len, held)) >= LONGEST:
            yield Doc("\n".join(held), source=source)
            held.clear()
    if held:
        yield Doc("\n".join(held), source=source)


def _text_chats(path: Path, described: DataSet | None, skip_bad: Skipped | None) -> Iterator[Chat]:
    """The chats of a .txt or .md file in any of the ways that people write them."""
    source = plain_stem(path)
    match how := pairs.style(path):
        case "json":
            yield from _parsed(path, described, lambda value: [records.chat(value)], skip_bad)
        case "rendered":
            for number, text in pairs.rendered_chats(path, skip_bad):
                try:
                    yield replace(records.chat({"text": text}), source=source)
                except records.Misfit as misfit:
                    refuse(path, f"line {number}", str(misfit), skip_bad)
        case "labelled" | "joined":
            for _, (ask, answer) in pairs.pairs(path, how, skip_bad):
                yield Chat((Message("user", ask), Message("assistant", answer)), source=source)
        case "tabbed" if len(records.KNOWN.intersection(tables.header(path))) >= 2:
            yield from _parsed_rows(path, skip_bad)
        case "tabbed":
            yield from _tsv_chats(path, skip_bad)
        case "prose":
            raise DataError(
                f"{path} is running text; chats are read from jsonl, json, csv, tsv, parquet, or txt with 问：/答："
            )


def _parsed_rows(path: Path, skip_bad: Skipped | None) -> Iterator[Chat]:
    """The rows of a table with named columns that is called .txt."""
    for where, row in tables.rows(path, records.KNOWN, skip_bad):
        try:
            yield replace(records.chat(row), source=row.get("source") or plain_stem(path))
        except records.Misfit as misfit:
            refuse(path, where, str(misfit), skip_bad)


def _tsv_chats(path: Path, skip_bad: Skipped | None) -> Iterator[Chat]:
    """Lines of a question, a tab and an answer."""
    source = plain_stem(path)
    for number, cells in tables.tsv_cells(path, skip_bad):
        if not any(cells):
            continue
        if len(cells) != 2 or not all(cells):
            found = f"{len(cells)} cells" if all(cells) else "an empty cell"
            refuse(path, f"line {number}", f"{found}; expected a question, one tab, and an answer", skip_bad)
            continue
        yield Chat((Message("user", cells[0]), Message("assistant", cells[1])), source=source)
