"""Which files a pattern means, and what they hold: lines of text or JSON records, one after another, never all at once.

Plain or compressed (.gz .bz2 .xz), UTF-8 with or without a byte order mark. Whatever is wrong with a file is one
`DataError` that names the file, the line where there is one, and what to do.
"""

import bz2
import codecs
import contextlib
import difflib
import glob
import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, final

from oriole.errors import DataError, raise_for_os_error

__all__ = ["Skipped", "expand", "file_kind", "lines", "plain_stem", "refuse", "values"]

Kind = Literal["json", "tsv", "text"]

_COMPRESSED = (".gz", ".bz2", ".xz")
_READABLE = "jsonl, json, tsv, txt or md, plain or as .gz, .bz2 or .xz"
_CHUNK = 1 << 20
_EXAMPLES = 20
_LISTED = 6


@final
@dataclass
class Skipped:
    """What was left out because it could not be read: how much, where, and the first twenty reasons."""

    total: int = 0
    files: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, path: Path, reason: str) -> None:
        """Count one bad record of `path`."""
        self.total += 1
        self.files[str(path)] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(reason)


def refuse(path: Path, where: str, why: str, skip_bad: Skipped | None) -> None:
    """Raise a `DataError` about one record, or count it in `skip_bad` when that is given."""
    reason = f"{path}, {where}: {why}" if where else f"{path} {why}"
    if skip_bad is None:
        raise DataError(reason)
    skip_bad.add(path, reason)


# --- names -----------------------------------------------------------------------------------------------------------


def file_kind(path: Path) -> Kind:
    """What a file holds, by its name; `DataError` for a kind that is not read."""
    match _plain_name(path).suffix.lower():
        case ".jsonl" | ".ndjson" | ".json":
            return "json"
        case ".tsv":
            return "tsv"
        case ".txt" | ".md" | ".markdown":
            return "text"
        case ".zst":
            raise DataError(f"{path} is compressed with zstd, which is not read yet; unpack it or use .xz or .gz")
        case _:
            raise DataError(f"{path} is of no kind that is read; give {_READABLE}")


def plain_stem(path: Path) -> str:
    """`data/pretrain_zh.jsonl.xz` -> `pretrain_zh`."""
    return _plain_name(path).stem


def _plain_name(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path


def expand(patterns: str | Path | Iterable[str | Path], root: Path | None = None) -> list[Path]:
    """The files that paths, folders and globs mean, sorted, each once; relative ones start from `root` where given.

    A folder means every readable file in it at any depth, hidden ones left out; `**` in a glob crosses folders.
    `DataError` when a pattern matches nothing.
    """
    found: dict[Path, Path] = {}
    for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
        given = Path(pattern).expanduser()
        full = root / given if root is not None else given
        if full.is_file():
            matches = [full]
        elif full.is_dir():
            matches = _inside(full)
        else:
            hits = [Path(root or "", hit) for hit in glob.glob(str(given), root_dir=root, recursive=True)]
            matches = [file for hit in hits for file in ([hit] if hit.is_file() else _inside(hit))]
            if not matches:
                raise DataError(_nothing_matches(full))
        for path in matches:
            found.setdefault(path.resolve(), path)
    if not found:
        raise DataError(f"no files were named; give files, folders or globs of {_READABLE}")
    return sorted(found.values())


def _inside(folder: Path) -> list[Path]:
    matches = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        with contextlib.suppress(DataError):
            if not hidden and path.is_file() and file_kind(path):
                matches.append(path)
    if not matches:
        raise DataError(f"{folder} holds no file that can be read{_contents(folder)}; give {_READABLE}")
    return matches


def _nothing_matches(pattern: Path) -> str:
    parent = pattern.parent
    while glob.has_magic(parent.name):
        parent = parent.parent
    if not parent.is_dir():
        return f"no file or folder {pattern}: {parent} does not exist; check the path"
    what = "nothing matches" if glob.has_magic(str(pattern)) else "no file or folder"
    return f"{what} {pattern}{_contents(parent, pattern.name)}; check the name"


def _contents(folder: Path, like: str = "") -> str:
    """A few names in the folder, those most like `like` first."""
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    if not names:
        return f" ({folder} is empty)"
    near = difflib.get_close_matches(like, names, n=_LISTED, cutoff=0.3) if like else []
    shown = [*near, *(name for name in names if name not in near)][:_LISTED]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f" ({folder} holds {', '.join(shown)}{more})"


# --- contents --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The unpacked bytes of a file; everything that can go wrong with them becomes a `DataError`."""
    suffix = path.suffix.lower()
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{path} is empty; give a file with data or leave it out")
        match suffix:
            case ".gz":
                file: IO[bytes] | gzip.GzipFile = gzip.open(path)
            case ".bz2":
                file = bz2.open(path)
            case ".xz":
                file = lzma.open(path)
            case _:
                file = open(path, "rb")
        with file:
            yield file
    except EOFError as error:
        raise DataError(f"{path} is cut short: its {suffix} data ends too early; copy or download it again") from error
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is no valid {suffix} file; copy or download it again, or mend its name") from error
    except FileNotFoundError as error:
        raise DataError(f"no file {path}; check the path") from error
    except OSError as error:
        if error.errno is None and suffix in _COMPRESSED:  # how bz2 reports what it cannot read
            raise DataError(f"{path} is no valid {suffix} file; copy or download it again, or mend its name") from error
        raise_for_os_error(error, "reading", path)


def _not_utf8(raw: bytes) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "the file is UTF-16; save it as UTF-8"
    try:
        raw.decode("gb18030")
        return "not UTF-8, perhaps GB18030 (GBK); convert the file: iconv -f gb18030 -t utf-8"
    except UnicodeDecodeError:
        return "not UTF-8; save the file as UTF-8 or mend the line"


def lines(path: Path, skip_bad: Skipped | None = None) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its line end) of each line."""
    with _opened(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                refuse(path, f"line {number}", _not_utf8(raw), skip_bad)
                continue
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def values(path: Path, skip_bad: Skipped | None = None) -> Iterator[tuple[str, Any]]:
    """(place, value) of each JSON value: one a line, or the items of an array, or objects that span lines.

    In a file of lines a bad line can be skipped; inside an array nothing after a syntax error can be trusted, so there
    it is always raised.
    """
    if _is_spread_out(path):
        yield from _spread_out(path)
        return
    for number, line in lines(path, skip_bad):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            refuse(path, f"line {number}", f"not valid JSON ({_reason(error)}); mend or remove the line", skip_bad)
            continue
        yield f"line {number}", value


def _is_spread_out(path: Path) -> bool:
    """Whether JSON values may span lines: an array, or a .json file whose first line is no JSON of its own."""
    with _opened(path) as file:
        head = file.read(1 << 16).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if head.startswith("["):
        return True
    if _plain_name(path).suffix.lower() != ".json":
        return False
    try:
        json.loads(head.partition("\n")[0])
        return False
    except (ValueError, RecursionError):
        return True


def _spread_out(path: Path) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder()
    chunks = _chunks(path)
    buffer, pos, line, count, depth = "", 0, 1, 0, 0
    while True:
        while pos < len(buffer) and buffer[pos] in " \t\r\n,[]":
            line += buffer[pos] == "\n"
            depth += (buffer[pos] == "[") - (buffer[pos] == "]")
            pos += 1
        if pos == len(buffer):
            buffer, pos = next(chunks, ""), 0
            if buffer:
                continue
            if depth:
                raise DataError(f"{path} is cut short: its list is not closed; copy or download it again")
            return
        try:
            value, end = decoder.raw_decode(buffer, pos)
        except (ValueError, RecursionError) as error:
            # A record that the buffer cuts fails at its end or inside a string; then read on, twice as much each time.
            if isinstance(error, json.JSONDecodeError):
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16
                more = "".join(islice(chunks, 1 + len(buffer) // _CHUNK)) if cut else ""
                if more:
                    buffer, pos = buffer[pos:] + more, 0
                    continue
                line += buffer.count("\n", pos, error.pos)
            raise DataError(f"{path}, line {line}: not valid JSON ({_reason(error)}); mend the file") from error
        count += 1
        yield f"line {line}, record {count}", value
        line += buffer.count("\n", pos, end)
        pos = end


def _chunks(path: Path) -> Iterator[str]:
    """The text of a file, about a million characters at a time."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    with _opened(path) as file:
        while True:
            raw = file.read(_CHUNK)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                bad = bytes(error.object)
                line += bad.count(b"\n", 0, error.start)
                context = bad[bad.rfind(b"\n", 0, error.start) + 1 :].partition(b"\n")[0]
                raise DataError(f"{path}, line {line}: {_not_utf8(context)}") from error
            line += text.count("\n")
            if text:
                yield text
            if not raw:
                return


def _reason(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            return error.msg.lower()
        case RecursionError():
            return "nested too deeply"
        case _:
            return str(error)
