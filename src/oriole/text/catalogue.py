"""The list of public data sets that `oriole data fetch` knows: `catalogue.json`, beside this file.

Nothing in it was downloaded while it was written. It was put together from documentation and from stored copies of the
sets' own pages; `verified` says for each fact of an entry where it was read, and a fact that is not named there was
not confirmed. What nobody could tell is null, never guessed. Sizes and checksums of the files themselves come from the
hubs, at the moment of the download.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from oriole.config import Config
from oriole.errors import ConfigError, DataError
from oriole.log import human

__all__ = [
    "Entry",
    "Kind",
    "Link",
    "Recast",
    "Verified",
    "addresses",
    "catalogue",
    "describe",
    "find",
    "parse",
    "select",
    "table",
]

CATALOGUE = Path(__file__).with_name("catalogue.json")
SCHEMA = 1

Kind = Literal["text", "chat", "preference", "eval"]
Language = Literal["zh", "en"]


class Recast(Config):
    """How the records of a set become records that every reader knows. See `oriole.text.recast`."""

    to: Literal[
        "text",
        "chat",
        "turns",
        "preference",
        "human_assistant",
        "moss",
        "oasst",
        "squad",
        "choices",
        "gsm8k",
        "medquad",
    ]
    """The rule: what it makes, or the format it reads."""
    text: tuple[str, ...] = ()
    """Fields that make up a document's text, joined by line ends (`text`)."""
    ask: tuple[str, ...] = ()
    """Fields of the question (`chat`, `preference`); one that only repeats another is left out."""
    answer: str = ""
    """Field of the answer (`chat`)."""
    system: str = ""
    """Field of the system message, if any (`chat`)."""
    turns: str = ""
    """Field with the list of turns (`turns`)."""
    chosen: str = "chosen"
    """Field of the better answer (`preference`)."""
    rejected: str = "rejected"
    """Field of the worse answer (`preference`)."""


class Link(Config):
    """A file with its addresses."""

    path: str
    """Its name in the folder."""
    addresses: tuple[str, ...]
    """Where it can be had, best first; all give the same bytes."""
    size: int | None = None
    """Bytes; null where unknown."""
    sha256: str | None = None
    """Checksum; null where unknown."""


class Verified(Config):
    """Where each fact of an entry was read; null: it is from general knowledge and was not confirmed."""

    address: str | None = None
    """That the repository or the links exist under these names."""
    licence: str | None = None
    size: str | None = None
    """`bytes`, `rows` and `tokens`."""
    files: str | None = None
    """The names of files and folders in `files`."""
    checksum: str | None = None


class Entry(Config):
    """A data set."""

    name: str
    """What is typed after `oriole data fetch`."""
    title: str
    """The name under which its makers published it."""
    kind: Kind
    languages: tuple[Language, ...]
    licence: str
    """As its makers state it; `unknown` where no page tells."""
    trap: str = ""
    """What to know before using it: terms that the licence's name does not show, doubts about its origin."""
    homepage: str
    bytes: int | None = None
    """Size of the whole set, as published; null where unknown."""
    rows: int | None = None
    """Records of the whole set; null where unknown."""
    tokens: str = ""
    """Tokens, as published, where the makers count in these."""
    format: str
    """What the files hold, in a few words."""
    hub: str = ""
    """Its repository on Hugging Face (and every mirror of it): `owner/name`."""
    modelscope: str = ""
    """Its repository on ModelScope."""
    files: tuple[str, ...] = ()
    """Patterns of the files to take from the repository; empty: every data file. `files=` replaces them."""
    links: tuple[Link, ...] = ()
    """Files that lie on no hub."""
    gated: bool | None = None
    """Whether the hub asks for an account and consent; null where unknown."""
    recast: Recast | None = None
    """How its records are rewritten; null: Oriole reads its files as they are."""
    used_by: tuple[str, ...] = ()
    """Earlier systems that were trained on it."""
    verified: Verified = Field(default_factory=Verified)


@cache
def catalogue() -> dict[str, Entry]:
    """All entries by name, in the order of the file."""
    return parse(CATALOGUE.read_text(encoding="utf-8"))


def parse(text: str) -> dict[str, Entry]:
    """The entries of a catalogue's JSON; `DataError` when one of them is not right."""
    table: dict[str, Any] = json.loads(text)
    if table.get("schema") != SCHEMA:
        raise DataError(f"the catalogue has schema {table.get('schema')}, this version reads {SCHEMA}; update Oriole")
    out: dict[str, Entry] = {}
    for record in table["sets"]:
        try:
            entry = Entry.model_validate(record)
        except ValidationError as error:
            raise DataError(f"the catalogue's entry {record.get('name')!r} is not right: {error}") from error
        if entry.name in out:
            raise DataError(f"the catalogue has two entries named {entry.name!r}")
        out[entry.name] = entry
    return out


def find(name: str, entries: dict[str, Entry]) -> Entry:
    """The entry of that name, or a `DataError` that names those most like it."""
    if name in entries:
        return entries[name]
    near = difflib.get_close_matches(name.lower(), entries, n=3, cutoff=0.4)
    near += [n for n in entries if name.lower() in n and n not in near][:3]
    hint = f"did you mean {', '.join(near)}?" if near else "`oriole data fetch` lists the known ones"
    raise DataError(f"no data set '{name}'; {hint}")


def select(wish: Mapping[str, Any]) -> list[Entry]:
    """The entries that have all the wished-for properties: `kind`, `lang`, `used_by`."""
    if unknown := wish.keys() - {"kind", "lang", "used_by"}:
        raise ConfigError(f"the list knows no '{min(unknown)}'; narrow it with kind=, lang= or used_by=")
    if "kind" in wish and wish["kind"] not in get_args(Kind):
        raise ConfigError(f"kind={wish['kind']} is none of {', '.join(get_args(Kind))}")
    return [
        e
        for e in catalogue().values()
        if wish.get("kind") in (None, e.kind)
        and (wish.get("lang") is None or wish["lang"] in e.languages)
        and (wish.get("used_by") is None or str(wish["used_by"]).lower() in map(str.lower, e.used_by))
    ]


# --- for people ------------------------------------------------------------------------------------------------------


def addresses(entry: Entry) -> list[str]:
    """The pages or files where a set lies."""
    hub = [f"https://{h}/datasets/{entry.hub}" for h in ("huggingface.co", "hf-mirror.com") if entry.hub]
    modelscope = [f"https://www.modelscope.cn/datasets/{entry.modelscope}"] if entry.modelscope else []
    return [*hub, *modelscope, *(a for link in entry.links for a in link.addresses)]


def table(entries: Iterable[Entry]) -> str:
    """The sets as lines of columns, one group for each kind."""
    lines: list[str] = []
    listed = list(entries)
    width = max((len(e.name) for e in listed), default=0)
    for kind in get_args(Kind):
        group = [e for e in listed if e.kind == kind]
        if not group:
            continue
        lines += ["", kind]
        for entry in group:
            size = _bytes(entry.bytes) if entry.bytes is not None else "?"
            rows = human(entry.rows) if entry.rows is not None else "?"
            mark = ("!" if entry.trap else " ") + ("*" if entry.gated else " ")
            languages = "+".join(entry.languages)
            licence = entry.licence + (
                "" if entry.verified.licence or entry.licence == "unknown" else " (not confirmed)"
            )
            lines.append(f"  {entry.name:{width}}  {languages:5}  {size:>8}  {rows:>6} rows  {mark} {licence}")
    return "\n".join(lines[1:])


def describe(entry: Entry) -> str:
    """All that is known of a set, for a person."""
    files = ", ".join(entry.files) or ("every data file" if not entry.links else f"{len(entry.links)} files")
    facts = {
        "name": f"{entry.name}: {entry.title}",
        "kind": f"{entry.kind}, {' and '.join(entry.languages)}",
        "licence": entry.licence + (" (asks for an account and consent on its page)" if entry.gated else ""),
        "note": entry.trap,
        "size": ", ".join(
            [
                _bytes(entry.bytes) if entry.bytes is not None else "bytes unknown",
                f"{entry.rows:,} rows" if entry.rows is not None else "rows unknown",
                *([f"{entry.tokens} tokens"] if entry.tokens else []),
            ]
        ),
        "format": entry.format,
        "taken": files,
        "rewritten": f"by the rule '{entry.recast.to}'" if entry.recast else "no",
        "page": entry.homepage,
        "mirrors": " ".join(addresses(entry)),
        "used by": ", ".join(entry.used_by),
        "verified": "; ".join(f"{k}: {v}" for k, v in entry.verified.model_dump().items() if v) or "nothing",
    }
    return "\n".join(f"{key:9}  {value}" for key, value in facts.items() if value)


def _bytes(size: int) -> str:
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{size / limit:.3g} {unit}"
    return f"{size} B"
