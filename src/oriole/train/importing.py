"""`oriole import`: files of token tensors (`train.imported`) to rows of JSON that every other verb reads."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import xxhash
from pydantic import Field

from oriole.config import Config
from oriole.errors import DataError, raise_for_os_error
from oriole.text.chatrows import chat_row, preference_row
from oriole.text.clean import language
from oriole.text.files import Skipped
from oriole.text.rowfile import rows_to
from oriole.text.work import Piece, run_pieces
from oriole.train.imported import SUFFIXES, TokenFile

__all__ = ["ImportConfig", "import_file", "import_files"]

SCHEMA: Final = 1
"""Changes when the same files give other rows."""
LEVEL: Final = 9
"""zstd's, as `oriole data clean` writes."""


class ImportConfig(Config):
    """The keys of `oriole import`."""

    tokenizer: Path
    """The tokenizer.json (or its folder) that made the tensors; another one is refused."""
    kind: Literal["auto", "text", "chat", "preference"] = "auto"
    """What the files hold; auto: by the names of their tensors."""
    skip_bad: bool = False
    """Count and list conversations that cannot be read back instead of stopping at the first."""
    workers: int = Field(0, ge=0)
    """Processes to use; 0 for one on each core."""


def import_files(patterns: Sequence[str], out: Path, config: ImportConfig) -> list[dict[str, Any]]:
    """Write OUT/<file>.jsonl.zst for each file; {"name", "kind", "rows", "skipped", "examples"} of each.

    Files that an earlier call has finished are passed over while neither they nor the tokenizer nor a key has changed.
    `DataError` for a file that cannot be read or that another tokenizer has made.
    """
    files = _named(_expand(patterns))
    settings = config.model_dump_json(exclude={"workers"})
    tokenizer = config.tokenizer / "tokenizer.json" if config.tokenizer.is_dir() else config.tokenizer
    made_by = _stat(tokenizer) if tokenizer.is_file() else None  # TokenFile says what is wrong with it
    pieces = []
    for name, path in files.items():
        target = out / f"{name}.jsonl.zst"
        key = xxhash.xxh3_128_hexdigest(json.dumps([SCHEMA, str(path), _stat(path), made_by, settings]).encode())
        pieces.append(Piece(name, key, (name, path, target, config), (target,)))
    done = out / ".done"
    if out.exists() and not done.is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists already and was not made by oriole import; choose another folder")
    return run_pieces(import_file, pieces, done, workers=config.workers, what="importing")


def import_file(name: str, path: Path, target: Path, config: ImportConfig) -> dict[str, Any]:
    """Write one file's rows, at least one; its counts."""
    file = TokenFile(path, config.tokenizer)
    kind = file.kind if config.kind == "auto" else config.kind
    skipped = Skipped() if config.skip_bad else None
    rows = 0
    with rows_to(target, LEVEL) as write:
        for row in _rows(file, kind, skipped):
            write(row)
            rows += 1
        if not rows:
            why = f", for example {skipped.examples[0]}" if skipped and skipped.total else ""
            raise DataError(f"{path} holds no {kind} that could be read{why}; leave it out or name its kind=")
    counts: dict[str, Any] = {"total": skipped.total, "examples": skipped.examples} if skipped else {}
    return {
        "name": name, "kind": kind, "rows": rows, "skipped": counts.get("total", 0),
        "examples": counts.get("examples", []),
    }  # fmt: skip


def _rows(file: TokenFile, kind: str, skipped: Skipped | None) -> Iterator[dict[str, Any]]:
    match kind:
        case "text":
            for doc in file.docs(skipped):
                yield {"text": doc.text, "lang": language(doc.text), "source": doc.source}
        case "chat":
            for chat in file.chats(skipped):
                yield chat_row(chat) | {"lang": language("\n".join(m.content for m in chat.messages))}
        case _:
            for pair in file.preferences(skipped):
                yield preference_row(pair) | {"lang": language("\n".join(m.content for m in pair.prompt))}


def _expand(patterns: Iterable[str]) -> list[Path]:
    """The files that paths, folders and globs mean, sorted, each once."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        given = Path(pattern).expanduser()
        if given.is_dir():
            matches = [path for path in given.rglob("*") if path.suffix.lower() in SUFFIXES]
        elif given.exists():
            matches = [given]
        else:
            matches = list(Path(given.anchor or ".").glob(str(given.relative_to(given.anchor))))
        if not matches:
            raise DataError(f"no file of token tensors at {given}; give .pt files, or a folder or glob of them")
        found |= {path.resolve(): path for path in matches}
    return sorted(found.values())


def _named(paths: Iterable[Path]) -> dict[str, Path]:
    taken: Counter[str] = Counter()
    out = {}
    for path in paths:
        taken[path.stem] += 1
        out[path.stem if taken[path.stem] == 1 else f"{path.stem}-{taken[path.stem]}"] = path
    return out


def _stat(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise_for_os_error(error, "reading", path)
    return stat.st_size, stat.st_mtime_ns
