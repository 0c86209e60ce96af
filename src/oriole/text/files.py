"""What a file holds: lines of text or JSON records, one after another, never all at once.

Plain or compressed (.gz .bz2 .xz .zst). UTF-8 with or without a byte order mark; UTF-16, GB18030, Big5 and Latin-1 are
told from the bytes, read as that, and reported. Whatever is wrong with a record is one `DataError` that names the file,
the line and what to do; `skip_bad` counts it instead. What is wrong with a whole file is a `BrokenFile`.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import math
import re
import zlib
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, final

from oriole.errors import DataError, raise_for_os_error
from oriole.log import say
from oriole.text.encodings import NAMES, SAMPLE, detect
from oriole.text.paths import COMPRESSED, BrokenFile, Skipped, expand, file_kind, plain_name, plain_stem, refuse

__all__ = [
    "BrokenFile", "Skipped", "expand", "file_kind", "head", "lines", "opened", "plain_stem", "refuse", "values",
]  # fmt: skip

LONGEST_LINE = 32 << 20
"""Bytes of a line, and of one record: a longer one is refused, so that memory stays bounded whatever the file is."""

BOMB_BYTES, BOMB_RATIO = 1 << 30, 1000
"""A file that unpacks to more than both, bytes and bytes for each packed byte, is taken for a zip bomb. Text packs
three- to tenfold."""

_CHUNK = 1 << 20
_STEP = 1 << 14
_WIDE = re.compile(b"[\x80-\xff]")


# --- bytes -----------------------------------------------------------------------------------------------------------


class _Source(Protocol):
    def readinto(self, buffer: Any, /) -> int | None: ...


@final
class _Guarded(io.RawIOBase):
    """The bytes of a file as they are unpacked, refused when there are so many that only a zip bomb explains it."""

    def __init__(self, source: _Source, path: Path) -> None:
        self._source, self._path = source, path
        self._packed = path.suffix.lower() in COMPRESSED
        self._limit = max(BOMB_BYTES, BOMB_RATIO * path.stat().st_size) if self._packed else math.inf
        self._count = 0
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._fill(memoryview(buffer)) if self._packed else self._source.readinto(buffer) or 0
        self._count += count
        if self._count > self._limit:
            raise BrokenFile(f"{self._path} unpacks to more than {BOMB_RATIO} times its size; it looks like a zip bomb")
        return count

    def _fill(self, buffer: memoryview) -> int:
        """Fill in small steps, so that little of what comes before damage is lost with it."""
        if self._error is not None:
            raise self._error
        count = 0
        while count < len(buffer):
            try:
                more = self._source.readinto(buffer[count : count + _STEP]) or 0
            except Exception as error:
                if not count:
                    raise
                self._error = error  # for the next call
                break
            if not more:
                break
            count += more
        return count


@final
class _Utf8(io.RawIOBase):
    """Bytes of text as UTF-8, whatever they were in; the encoding is decided at the first byte that is not ASCII."""

    def __init__(self, source: io.RawIOBase, path: Path, skip_bad: Skipped | None) -> None:
        self._source, self._path, self._skip_bad = source, path, skip_bad
        self._decoder: codecs.IncrementalDecoder | None = None
        self._decided = self._started = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        ended = False
        while not self._ready and not ended:
            block = self._source.read(_CHUNK) or b""
            ended = not block
            if not self._decided:
                block = self._decide(block)
            self._ready = block if self._decoder is None else self._decoded(block)
        count = min(len(self._ready), len(buffer))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decide(self, block: bytes) -> bytes:
        """Choose the encoding where the block gives reason to; the block, with what else was read to choose."""
        first, self._started = not self._started, True
        if block.isascii() and not (first and b"\0" in block):
            return block
        self._decided = True
        wide = _WIDE.search(block)
        start = wide.start() if wide and wide.start() > SAMPLE // 2 else 0
        if len(block) - start < SAMPLE:
            block += self._source.read(SAMPLE) or b""
        codec = detect(block[start : start + SAMPLE])
        if codec not in (None, "utf-8"):
            self._decoder = codecs.getincrementaldecoder(codec)("oriole-mark")
            report(self._path, NAMES[codec])
            if self._skip_bad is not None:
                self._skip_bad.converted[str(self._path)] = NAMES[codec]
        return block

    def _decoded(self, block: bytes) -> bytes:
        assert self._decoder is not None
        return self._decoder.decode(block, final=not block).encode("utf-8", "surrogatepass")


@cache
def report(path: Path, encoding: str) -> None:
    """Say once that a file was not UTF-8."""
    say(f"{path} is {encoding}, not UTF-8; read as that", "yellow")


@contextlib.contextmanager
def opened(path: Path, skip_bad: Skipped | None = None) -> Iterator[io.BufferedReader]:
    """The unpacked text of a file as UTF-8; everything that can go wrong with it becomes a `DataError`."""
    suffix = path.suffix.lower()
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise BrokenFile(f"{path} is empty; give a file with data or leave it out")
        with _unpacked(path, suffix) as file:
            yield io.BufferedReader(_Utf8(_Guarded(file, path), path, skip_bad), _CHUNK)
    except EOFError as error:
        raise _cut_short(path, suffix) from error
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise _no_archive(path, suffix) from error
    except FileNotFoundError as error:
        raise DataError(f"no file {path}; check the path") from error
    except OSError as error:
        if error.errno is None and suffix in COMPRESSED:  # how bz2 and Arrow's zstd report what they cannot read
            if "runcated" in str(error):
                raise _cut_short(path, suffix) from error
            raise _no_archive(path, suffix) from error
        raise_for_os_error(error, "reading", path)


def _unpacked(path: Path, suffix: str) -> contextlib.AbstractContextManager[Any]:
    match suffix:
        case ".gz":
            return gzip.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
            import pyarrow

            # Not the zstandard library: its stream takes a file that is cut short for a whole one.
            stream: contextlib.AbstractContextManager[Any] = pyarrow.CompressedInputStream(str(path), "zstd")
            return stream
        case _:
            return open(path, "rb", buffering=0)


def _cut_short(path: Path, suffix: str) -> BrokenFile:
    return BrokenFile(f"{path} is cut short: its {suffix} data ends too early; copy or download it again")


def _no_archive(path: Path, suffix: str) -> BrokenFile:
    return BrokenFile(f"{path} is no valid {suffix} file; copy or download it again, or mend its name")


# --- lines -----------------------------------------------------------------------------------------------------------


def _not_utf8(raw: bytes) -> str:
    try:
        raw.decode("gb18030")
        return "not UTF-8, perhaps GB18030 (GBK); convert the file: iconv -f gb18030 -t utf-8"
    except UnicodeDecodeError:
        return "not UTF-8; save the file as UTF-8 or mend the line"


def lines(path: Path, skip_bad: Skipped | None = None, filler: str | None = None) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its line end) of each line; `filler` stands in for a line that was skipped."""
    with opened(path, skip_bad) as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE and not raw.endswith(b"\n"):
                _pass_over_line(file)
                why = f"longer than {LONGEST_LINE >> 20} MB; cut it into records of a line each, or remove it"
            elif b"\0" in raw:
                why = "holds NUL bytes, so it is no text; mend or remove the line"
            else:
                try:
                    text = raw.decode("utf-8")
                    yield number, text.removeprefix("\ufeff") if number == 1 else text
                    continue
                except UnicodeDecodeError:
                    why = _not_utf8(raw)
            refuse(path, f"line {number}", why, skip_bad)
            if filler is not None:
                yield number, filler


def _pass_over_line(file: IO[bytes]) -> None:
    while (more := file.readline(_CHUNK)) and not more.endswith(b"\n"):
        pass


def head(path: Path, size: int = 1 << 16) -> str:
    """The beginning of a file's text, about `size` bytes of it, whole lines where it has any."""
    with opened(path) as file:
        raw = file.read(size)
    text = raw.decode("utf-8", "replace").removeprefix("\ufeff")
    return text if len(raw) < size or "\n" not in text else text[: text.rindex("\n") + 1]


# --- JSON ------------------------------------------------------------------------------------------------------------


@final
class _Json:
    """A JSON decoder that notices keys that stand twice in one object, which Python's passes over."""

    def __init__(self) -> None:
        self._doubled: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self.decode = self._decoder.decode
        self.raw_decode = self._decoder.raw_decode

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [key for key, _ in pairs]
            self._doubled = next(key for key in names if names.count(key) > 1)
        return record

    def doubled(self) -> str | None:
        """The fault of what was decoded since the last call."""
        key, self._doubled = self._doubled, None
        return None if key is None else f"the key {key!r} stands twice in one object; keep one of them"


def values(path: Path, skip_bad: Skipped | None = None) -> Iterator[tuple[str, Any]]:
    """(place, value) of each JSON value: one a line, or the items of an array, or objects that span lines.

    In a file of lines a bad line can be skipped; inside an array nothing after a syntax error can be trusted, so there
    it ends the file.
    """
    if _is_spread_out(path):
        yield from _spread_out(path, skip_bad)
        return
    decoder = _Json()
    for number, line in lines(path, skip_bad):
        if line.isspace():
            continue
        try:
            value = decoder.decode(line)
        except (ValueError, RecursionError) as error:
            why: str | None = f"not valid JSON ({_reason(error)}); mend or remove the line"
        else:
            why = decoder.doubled()
        if why is None:
            yield f"line {number}", value
        else:
            refuse(path, f"line {number}", why, skip_bad)


def _is_spread_out(path: Path) -> bool:
    """Whether JSON values may span lines: an array, or a .json file whose first line is no JSON of its own."""
    with opened(path) as file:
        first = file.read(1 << 16).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if first.startswith("["):
        return True
    if plain_name(path).suffix.lower() != ".json":
        return False
    try:
        json.loads(first.partition("\n")[0])
        return False
    except (ValueError, RecursionError):
        return True


def _spread_out(path: Path, skip_bad: Skipped | None) -> Iterator[tuple[str, Any]]:
    decoder = _Json()
    chunks = _chunks(path, skip_bad)
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
                raise BrokenFile(f"{path} is cut short: its list is not closed; copy or download it again")
            return
        try:
            value, end = decoder.raw_decode(buffer, pos)
        except (ValueError, RecursionError) as error:
            # A record that the buffer cuts fails at its end or inside a string; then read on, twice as much each time.
            if isinstance(error, json.JSONDecodeError):
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16
                if cut and len(buffer) - pos > LONGEST_LINE:
                    raise BrokenFile(f"{path}, line {line}: a record longer than {LONGEST_LINE >> 20} MB") from error
                more = "".join(islice(chunks, 1 + len(buffer) // _CHUNK)) if cut else ""
                if more:
                    buffer, pos = buffer[pos:] + more, 0
                    continue
                line += buffer.count("\n", pos, error.pos)
            raise BrokenFile(f"{path}, line {line}: not valid JSON ({_reason(error)}); mend the file") from error
        count += 1
        place = f"line {line}, record {count}"
        if why := decoder.doubled():
            refuse(path, place, why, skip_bad)
        else:
            yield place, value
        line += buffer.count("\n", pos, end)
        pos = end


def _chunks(path: Path, skip_bad: Skipped | None) -> Iterator[str]:
    """The text of a file, about a million characters at a time."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    with opened(path, skip_bad) as file:
        while True:
            raw = file.read(_CHUNK)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                bad = bytes(error.object)
                line += bad.count(b"\n", 0, error.start)
                context = bad[bad.rfind(b"\n", 0, error.start) + 1 :].partition(b"\n")[0]
                raise BrokenFile(f"{path}, line {line}: {_not_utf8(context)}") from error
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
