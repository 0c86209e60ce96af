"""From files of text or conversations to token shards, file by file on all cores; what `oriole data pack` does.

    OUT/<name>/              the shards of one input file, <name> being the file's without its endings
    OUT/index.json           lists them: `Shards.open(OUT)` shows them as one
    OUT/heldout/             the same of the documents held out for validation
    OUT/tokenizer/           the tokenizer that made the ids
    OUT/.done/               what has been finished, so that a second call does only what is missing or has changed

The result depends on the files' content and names, the tokenizer and the settings; not on the number of workers, the
engine, or how often the work was interrupted.
"""

import contextlib
import glob
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import Field

from oriole.config import Config
from oriole.errors import ConfigError, DataError, raise_for_os_error
from oriole.text.clean import language, normalise
from oriole.text.formats import read_chats, read_docs
from oriole.text.kinds import find_kind
from oriole.text.paths import HELDOUT, Skipped, expand, file_kind, plain_stem
from oriole.text.records import Doc
from oriole.text.shards import batches, held_out
from oriole.text.template import Chat, render
from oriole.text.tokenizer import END_OF_TEXT, Tokenizer
from oriole.text.work import Engine, Piece, new_file, run_pieces
from oriole.text.writer import SCHEMA, Writer, fingerprint, new_folder

__all__ = ["HELDOUT", "PackConfig", "chat_rows", "load_tokenizer", "pack", "pack_file", "text_rows"]

HOLDOUT = 0.005
"""The share of documents held out where nothing was said and the inputs hold no held-out files of their own."""
PAGES = ("text", "html", "pdf")
"""Kinds of files that are mostly one document each."""
GROUP_BYTES = 64 << 20


class PackConfig(Config):
    """How files become shards."""

    tokenizer: Path
    """A folder with a tokenizer.json, or a run that has one."""
    kind: Literal["auto", "text", "chat"] = "auto"
    """text: every token is trained on; chat: only the assistant's words; auto: by the first record of each file."""
    heldout: float | None = Field(None, ge=0, lt=0.5)
    """Share of documents held out for validation by a hash of their text; by default 0.005, and nothing where the
    inputs are a cleaned folder with held-out files of its own."""
    skip_bad: bool = False
    """Count and list records that cannot be read instead of stopping at the first."""
    engine: Engine = "local"
    """local: processes of this machine; ray: tasks of a Ray cluster."""
    workers: int = Field(0, ge=0)
    """Processes, or tasks at a time; 0: one for each core. 1: this process, on all cores."""


def pack(inputs: Sequence[str | Path], out: Path, config: PackConfig) -> dict[str, Any]:
    """Make or bring up to date the shards in `out` of the files that `inputs` (files, folders, globs) mean.

    Returns {"documents", "tokens", "trained_tokens", "heldout": {the same}, "files": [counts of each file],
    "skipped", "examples"}. Shards in `out` whose file is no longer named are removed.
    """
    tok = load_tokenizer(config.tokenizer)
    files = _inputs(inputs, out)
    own = any(held for _, held in files)
    if own and config.heldout:
        raise ConfigError("the inputs hold held-out files of their own, so leave out heldout=, or name single files")
    holdout = config.heldout if config.heldout is not None else (0.0 if own else HOLDOUT)
    done = out / ".done"
    if out.exists() and not done.is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists already and was not made by oriole data pack; choose another folder")
    done.mkdir(parents=True, exist_ok=True)  # from its first moment on the folder is known as ours
    tok.save(out / "tokenizer")

    sizes: dict[str, int] = {}
    pieces = []
    for name, paths, held in _named(_grouped(files)):
        stats = [(str(path.absolute()), path.stat()) for path in paths]
        sizes[name] = sum(stat.st_size for _, stat in stats)
        settings = (config.kind, holdout, held, config.skip_bad)
        made_from = [SCHEMA, tok.fingerprint(), *settings, *((p, s.st_size, s.st_mtime_ns) for p, s in stats)]
        key = xxhash.xxh3_128_hexdigest(json.dumps(made_from).encode())
        pieces.append(Piece(name, key, (list(map(str, paths)), str(out), name, str(out / "tokenizer"), *settings)))
    _forget(out, set(sizes))
    pieces.sort(key=lambda p: -sizes[p.name])  # the longest first, so that no worker is left alone with it at the end
    answers = run_pieces(pack_file, pieces, done, engine=config.engine, workers=config.workers, what="packing")
    by_name = {answer["name"]: answer for answer in answers}
    counts = [by_name[name] for name in sizes]

    result: dict[str, Any] = {"skipped": sum(c["skipped"] for c in counts), "files": counts}
    result["examples"] = list(itertools.chain.from_iterable(c["examples"] for c in counts))[:20]
    result |= _write_index(out, [c["name"] for c in counts if c["train"]], tok)
    result[HELDOUT] = _write_index(out / HELDOUT, [c["name"] for c in counts if c[HELDOUT]], tok)
    if not result["documents"]:
        raise DataError(
            f"the {len(files)} input files hold no document to write shards from; give files that hold some"
        )
    return result


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder or in a run's `tokenizer` folder."""
    inner = folder / "tokenizer"
    return Tokenizer.load(inner if (inner / "tokenizer.json").exists() else folder)


# --- inputs ----------------------------------------------------------------------------------------------------------


def _inputs(inputs: Sequence[str | Path], out: Path) -> list[tuple[Path, bool]]:
    """(file, whether it is held out), sorted, each once.

    A folder may be one that `oriole data clean` made: what lies under its `heldout` is held out here, too.
    """
    found: dict[Path, tuple[Path, bool]] = {}
    ours = out.resolve()
    for given in inputs:
        folder = Path(given).expanduser()
        held = sorted(p for p in folder.rglob(HELDOUT) if _visible(p, folder) and p.is_dir() and any(p.iterdir()))
        for place in [given, *held]:
            for path in expand(place):
                if not path.resolve().is_relative_to(ours):
                    inside = path.relative_to(folder).parts if folder.is_dir() else ()
                    found.setdefault(path.resolve(), (path, HELDOUT in inside[:-1]))
    return sorted(found.values())


def _visible(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


Group = tuple[Path, ...]
"""One file, or several that each hold one document."""


def _grouped(files: Sequence[tuple[Path, bool]]) -> Iterator[tuple[Group, bool]]:
    """Files as pieces of work: the pages of a folder, which may be a hundred thousand, by the 64 MB."""
    for (_, held, pages), run in itertools.groupby(files, key=lambda f: (f[0].parent, f[1], file_kind(f[0]) in PAGES)):
        group: list[Path] = []
        size = 0
        for path, _ in run:
            group.append(path)
            size += path.stat().st_size
            if not pages or size >= GROUP_BYTES:
                yield tuple(group), held
                group, size = [], 0
        if group:
            yield tuple(group), held


def _named(groups: Iterable[tuple[Group, bool]]) -> Iterator[tuple[str, Group, bool]]:
    """(name, files, whether held out): the names of the folders, each once."""
    taken = {HELDOUT, "tokenizer", "index.json"}
    for paths, held in groups:
        stem = plain_stem(paths[0]) if len(paths) == 1 else paths[0].absolute().parent.name
        stem = (stem.lstrip(".") or "data") + (f"-{HELDOUT}" if held else "")
        names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        name = next(n for n in names if n not in taken)
        taken.add(name)
        yield name, paths, held


# --- one file --------------------------------------------------------------------------------------------------------


def pack_file(
    paths: Sequence[str],
    out: str,
    name: str,
    tokenizer: str,
    kind: Literal["auto", "text", "chat"],
    holdout: float,
    held: bool,
    skip_bad: bool,
) -> dict[str, Any]:
    """Write the shards of one file, or of one group of pages, those held out apart; what it held, as counts."""
    tok = _tokenizer(tokenizer)
    skipped = Skipped() if skip_bad else None
    found = find_kind(Path(paths[0])) if kind == "auto" else kind
    match found:
        case "text":
            rows = text_rows(read_docs(paths, skip_bad=skipped), tok)
        case "chat":
            rows = chat_rows(read_chats(paths, skip_bad=skipped), tok)
        case _:
            raise DataError(f"{paths[0]} holds {found} records; shards are made of running text and of chats")
    halves = {"train": Path(out) / name, HELDOUT: Path(out) / HELDOUT / name}
    for folder in halves.values():
        _clear(folder)
    writers: dict[str, Writer] = {}
    with contextlib.ExitStack() as stack:
        for key, ids, mask, source, lang in rows:
            half = HELDOUT if held or held_out(key, holdout) else "train"
            if half not in writers:
                writers[half] = stack.enter_context(_new_shards(halves[half], tok))
            writers[half].add(ids, mask, source, lang)
    return {
        "name": name,
        "kind": found,
        **{half: _counts(writers.get(half)) for half in halves},
        "skipped": skipped.total if skipped else 0,
        "examples": skipped.examples if skipped else [],
    }


Row = tuple[str, Sequence[int], Sequence[int] | None, str, str]
"""What decides whether a document is held out, its ids and mask, source and language."""


def text_rows(docs: Iterable[Doc], tok: Tokenizer) -> Iterator[Row]:
    """As a training stage reads running text: normalised, empty documents left out, an end mark after each."""
    for batch in batches(docs):
        texts = [normalise(doc.text) for doc in batch]
        for doc, text, ids in zip(batch, texts, tok.encode_batch(texts), strict=True):
            if text.strip():
                ids.append(END_OF_TEXT)
                yield text, ids, None, doc.source, doc.lang or language(text)


def chat_rows(chats: Iterable[Chat], tok: Tokenizer) -> Iterator[Row]:
    for chat in chats:
        ids, mask = render(chat.messages, tok, tools=chat.tools)
        contents = [m.content for m in chat.messages]
        yield "\x00".join(contents), ids, mask, chat.source, chat.lang or language("\n".join(contents))


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    """The tokenizer, loaded once in each worker."""
    return Tokenizer.load(folder)


@contextlib.contextmanager
def _new_shards(folder: Path, tok: Tokenizer) -> Iterator[Writer]:
    with new_folder(folder) as part, contextlib.closing(Writer(part, tok, langs=True)) as writer:
        yield writer
        writer.finish()


def _clear(folder: Path) -> None:
    """Remove an earlier form of the shards and what a killed worker left of them."""
    try:
        for left in [folder, *folder.parent.glob(f".{glob.escape(folder.name)}.*.part")]:
            if left.exists():
                shutil.rmtree(left)
    except OSError as error:
        raise_for_os_error(error, "removing earlier shards in", folder.parent)


def _counts(writer: Writer | None) -> dict[str, int]:
    if writer is None:
        return {}
    return {"documents": writer.docs, "tokens": writer.tokens, "trained_tokens": writer.trained}


# --- the whole -------------------------------------------------------------------------------------------------------


def _forget(out: Path, current: set[str]) -> None:
    """Take back the notes of files whose shards somebody has deleted, and remove those of files no longer named."""
    for note in (out / ".done").glob("*.json"):
        halves = {"train": out / note.stem, HELDOUT: out / HELDOUT / note.stem}
        if note.stem not in current:
            for folder in halves.values():
                _clear(folder)
            note.unlink(missing_ok=True)
            continue
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged: `run_pieces` sees to it
            result = json.loads(note.read_text(encoding="utf-8"))["result"]
            if any(result[half] and not (folder / "index.json").exists() for half, folder in halves.items()):
                note.unlink(missing_ok=True)


def _write_index(out: Path, names: Sequence[str], tok: Tokenizer) -> dict[str, int]:
    """The index that makes one of the shards in `out`; no index where there are none. The sums of their counts."""
    members = [json.loads((out / name / "index.json").read_text(encoding="utf-8")) for name in names]
    sums = {key: sum(m[key] for m in members) for key in ("documents", "tokens", "trained_tokens")}
    path = out / "index.json"
    if len({source for m in members for source in m["sources"]}) > 65_536:
        raise DataError("the data names more than 65,536 different sources; give documents of one kind one name")
    if not members:
        path.unlink(missing_ok=True)
        return sums
    index: dict[str, Any] = {
        "schema": SCHEMA,
        "tokenizer": tok.fingerprint(),
        "vocab_size": tok.vocab_size,
        **sums,
        "parts": [{"folder": name, "fingerprint": m["fingerprint"]} for name, m in zip(names, members, strict=True)],
    }
    index["fingerprint"] = fingerprint(index)
    with new_file(path) as file:
        file.write(json.dumps(index, ensure_ascii=True, indent=1).encode())
    return sums
