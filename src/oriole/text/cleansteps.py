"""The two pieces of `text.pipeline`: one input through the rules, and one cleaned file without its duplicates."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from oriole.text import wiki
from oriole.text.boilerplate import Lines
from oriole.text.chatrows import Figures, chat_row, flat, preference_row
from oriole.text.clean import language
from oriole.text.decontaminate import Decontaminator
from oriole.text.files import BrokenFile, Skipped
from oriole.text.formats import read_chats, read_docs, read_preferences
from oriole.text.records import Doc
from oriole.text.rowfile import read_rows, rows_to
from oriole.text.rules import Drop, build_rules
from oriole.text.ruleschat import build_chat_rules
from oriole.text.ruleslang import identify
from oriole.text.shards import held_out
from oriole.text.shingles import batches
from oriole.text.tally import Tally, count_source
from oriole.text.template import Chat, Preference
from oriole.text.tokenizer import Tokenizer
from oriole.text.work import new_file

if TYPE_CHECKING:
    from oriole.text.pipeline import CleanConfig

__all__ = ["DECONTAMINATE", "bad_records", "chat_rules", "clean_input", "finish"]

T = TypeVar("T", Doc, Chat, Preference)

DECONTAMINATE = "decontaminate"
"""The name under which the report counts documents that share an n-gram with an evaluation file."""
LEVEL_BETWEEN, LEVEL_FINAL = 3, 9
"""zstd's levels: fast between the steps, small at the end."""


# --- the first piece -------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class _Way(Generic[T]):
    """How one kind of record goes through the rules."""

    read: Callable[[Path, Skipped | None], Iterator[T]]
    rules: Sequence[tuple[str, Callable[[T], T | Drop]]]
    text: Callable[[T], str]
    row: Callable[[T], dict[str, Any]]


def clean_input(
    name: str,
    paths: Sequence[Path],
    evaluation: Sequence[Path],
    config: "CleanConfig",
    outs: Mapping[str, Path],
    samples: Path,
) -> dict[str, Any]:
    """Write what the rules keep of an input to outs["cleaned"] and outs["heldout"]; its counts.

    A row has "text", which deduplication compares, and for chats and pairs also "row", which is written in the end.
    """
    way: _Way[Any]
    match config.kind:
        case "text":
            way = _text_way(config)
        case "chat":
            way = _chat_way(config)
        case "preference":
            way = _preference_way(config)
    tally = Tally(name, config.samples, config.seed)
    bad = Skipped() if config.skip_bad else None
    known = _decontaminator(tuple(evaluation)) if evaluation else None
    figures = Figures(config.length, _tokenizer(config.tokenizer)) if config.kind != "text" else None
    with rows_to(outs["cleaned"], LEVEL_BETWEEN) as keep, rows_to(outs["heldout"], LEVEL_BETWEEN) as set_aside:
        for item, end in _ends(way, _read(way, paths, bad), known):
            lang = end.item.lang or language(end.text)
            tally.read(group(lang), item.source, len(way.text(item)))
            if figures is not None:
                _figure(figures, item, lang)
            for rule, before, after in end.changes:
                tally.changed(rule, group(lang), item.source, before, after)
            if end.dropped is not None:
                tally.dropped(end.dropped.reason, group(lang), item.source, end.text, end.dropped.detail)
                continue
            # Another key than training's own split, which hashes the bare text: else one would empty the other.
            heldout = held_out(f"clean\0{end.text}", config.heldout)
            tally.kept(group(lang), len(end.text), heldout=heldout)
            (set_aside if heldout else keep)({"text": end.text, **way.row(replace(end.item, lang=lang))})
    with new_file(samples) as file:
        file.write(json.dumps(tally.samples.as_json(), ensure_ascii=True).encode())
    counts = dict(tally.counts)
    if bad is not None:
        counts["bad"] = bad_records(bad)
    if figures is not None:
        counts["chats"] = figures.counts
    return counts


def bad_records(bad: Skipped) -> dict[str, Any]:
    """What could not be read, as JSON."""
    return {
        "total": bad.total, "files": dict(bad.files), "examples": list(bad.examples), "converted": dict(bad.converted),
    }  # fmt: skip


def _read(way: _Way[T], paths: Iterable[Path], bad: Skipped | None) -> Iterator[T]:
    """The records of the files; where bad ones are skipped, so is the rest of a file that cannot be read on."""
    for path in paths:
        try:
            yield from way.read(path, bad)
        except BrokenFile as error:  # a wiki dump; the other readers count theirs
            if bad is None:
                raise
            bad.add(path, f"{error} (the rest of the file is left out)")


@final
@dataclass(frozen=True)
class _End(Generic[T]):
    """What has become of a record."""

    item: T
    text: str
    changes: list[tuple[str, str, str]]
    """(rule, text before, text after) of each change."""
    dropped: Drop | None


def _ends(way: _Way[T], items: Iterable[T], known: Decontaminator | None) -> Iterator[tuple[T, _End[T]]]:
    """Each record as it was read, and what has become of it."""
    through = ((item, _through(way, item)) for item in items)
    if known is None:
        yield from through
        return
    for found, _ in batches((both, both[1].text) for both in through):
        hits = iter(known.hits([end.text for _, end in found if end.dropped is None]))
        for item, end in found:
            hit = next(hits) if end.dropped is None else None
            yield item, end if hit is None else replace(end, dropped=Drop(DECONTAMINATE, hit))


def _through(way: _Way[T], item: T) -> _End[T]:
    """The record as the rules leave it, up to the one that drops it."""
    text = way.text(item)
    changes: list[tuple[str, str, str]] = []
    for name, rule in way.rules:
        result = rule(item)
        if isinstance(result, Drop):
            return _End(item, text, changes, Drop(name, result.detail))
        if result is not item:
            after = way.text(result)
            if after != text:
                changes.append((name, text, after))
            item, text = result, after
    return _End(item, text, changes, None)


def group(lang: str) -> str:
    """The language as the report counts it: "zh", "en" or "other"."""
    return lang if lang in ("zh", "en") else "other"


@lru_cache(maxsize=1)
def _decontaminator(files: tuple[Path, ...]) -> Decontaminator:
    """Built once in each worker."""
    return Decontaminator(files)


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer | None:
    return Tokenizer.load(Path(folder)) if folder else None


# --- kinds -----------------------------------------------------------------------------------------------------------


SAFE = ("characters", "width", "simplify", "mask_mail", "mask_numbers")
"""Rules for documents that also mend messages: they leave alone what a message may be about, such as markup."""


def _text_way(config: "CleanConfig") -> _Way[Doc]:
    def read(path: Path, bad: Skipped | None) -> Iterator[Doc]:
        return wiki.read_dump(path) if wiki.is_dump(path) else read_docs(path, skip_bad=bad)

    return _Way(
        read, [(rule.name, rule) for rule in build_rules(config.rules)], lambda doc: doc.text,
        lambda doc: {"lang": doc.lang, "source": doc.source},
    )  # fmt: skip


def _chat_way(config: "CleanConfig") -> _Way[Chat]:
    def read(path: Path, bad: Skipped | None) -> Iterator[Chat]:
        return wiki.read_questions(path, config.seed) if wiki.is_dump(path) else read_chats(path, skip_bad=bad)

    return _Way(
        read, chat_rules(config), lambda chat: flat(chat.messages),
        lambda chat: {"lang": chat.lang, "source": chat.source, "row": chat_row(chat)},
    )  # fmt: skip


def _preference_way(config: "CleanConfig") -> _Way[Preference]:
    return _Way(
        lambda path, bad: read_preferences(path, skip_bad=bad),
        [(name, partial(_on_pair, rule)) for name, rule in chat_rules(config)],
        lambda pair: flat((*pair.prompt, *pair.chosen, *pair.rejected)),
        lambda pair: {"lang": pair.lang, "source": pair.source, "row": preference_row(pair)},
    )  # fmt: skip


def chat_rules(config: "CleanConfig") -> list[tuple[str, Callable[[Chat], Chat | Drop]]]:
    """(name, rule) for conversations: those that mend their messages, then those that drop them."""
    mending = [(rule.name, partial(_on_messages, rule)) for rule in build_rules(config.rules) if rule.name in SAFE]
    return [("identify", _identify), *mending, *((rule.name, rule) for rule in build_chat_rules(config.chat))]


def _identify(chat: Chat) -> Chat:
    return chat if chat.lang else replace(chat, lang=identify(flat(chat.messages)))


def _on_messages(rule: Callable[[Doc], Doc | Drop], chat: Chat) -> Chat:
    """A rule for documents on what people and the assistant say; calls and results of tools stay as they are."""

    def mended(text: str) -> str:
        result = rule(Doc(text, chat.lang))
        return text if isinstance(result, Drop) else result.text

    messages = []
    for message in chat.messages:
        content = message.content if message.role == "tool" else mended(message.content)
        reasoning = mended(message.reasoning) if message.reasoning else message.reasoning
        same = content == message.content and reasoning == message.reasoning
        messages.append(message if same else replace(message, content=content, reasoning=reasoning))
    changed = any(new is not old for new, old in zip(messages, chat.messages, strict=True))
    return replace(chat, messages=tuple(messages)) if changed else chat


def _on_pair(rule: Callable[[Chat], Chat | Drop], pair: Preference) -> Preference | Drop:
    """A rule for conversations on both of a pair's; only what it says of the chosen one drops it.

    The rejected answer may be bad in every way: that is what it is there for.
    """
    prompt, chosen = pair.prompt, pair.chosen
    good = rule(Chat((*prompt, *chosen), source=pair.source, lang=pair.lang))
    if isinstance(good, Drop):
        return good
    if len(good.messages) == len(prompt) + len(chosen):
        prompt, chosen = good.messages[: len(prompt)], good.messages[len(prompt) :]
    bad = rule(Chat((*pair.prompt, *pair.rejected), source=pair.source, lang=pair.lang))
    rejected = pair.rejected
    if not isinstance(bad, Drop) and len(bad.messages) == len(prompt) + len(rejected):
        rejected = bad.messages[len(prompt) :]
    if chosen == rejected:
        return Drop("alike", "chosen and rejected are the same")
    mended = replace(pair, prompt=prompt, chosen=chosen, rejected=rejected, lang=good.lang)
    return pair if mended == pair else mended


def _figure(figures: Figures, item: Doc | Chat | Preference, lang: str) -> None:
    match item:
        case Chat():
            figures.add(item.messages, item, lang)
        case Preference():
            figures.add((*item.prompt, *item.chosen), None, lang)


# --- the last piece --------------------------------------------------------------------------------------------------


def finish(path: Path, target: Path, drops: Mapping[int, str], lines: Path | None) -> dict[str, Any]:
    """Write the rows of a cleaned file that are no duplicates to `target`; counts of both, by language and source.

    `lines` names the boilerplate lines to take out of the texts. A file of nothing is not written.
    """
    counts: dict[str, Any] = {"kept": {}, "duplicates": {}, "sources": {}, "lines": 0}
    boilerplate = _boilerplate(lines) if lines is not None else None
    target.unlink(missing_ok=True)
    rows = _without(path, drops, boilerplate, counts)
    first = next(rows, None)
    if first is not None:
        with rows_to(target, LEVEL_FINAL) as write:
            write(first)
            for row in rows:
                write(row)
    return counts


def _without(
    path: Path, drops: Mapping[int, str], boilerplate: Lines | None, counts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(read_rows(path)):
        lang, source, text = group(row["lang"]), row["source"], row["text"]
        reason = drops.get(number)
        if reason is not None:
            _add(counts["duplicates"].setdefault(reason, {}), lang, len(text))
            continue
        if boilerplate is not None:
            text, gone = boilerplate.strip(text, path, number)
            counts["lines"] += gone
        _add(counts["kept"], lang, len(text))
        count_source(counts["sources"], source, len(text))
        yield row.get("row") or {"text": text, "lang": row["lang"], "source": source}


def _add(table: dict[str, list[int]], key: str, chars: int) -> None:
    documents, characters = table.get(key, (0, 0))
    table[key] = [documents + 1, characters + chars]


@lru_cache(maxsize=1)
def _boilerplate(path: Path) -> Lines:
    return Lines.read(path)
