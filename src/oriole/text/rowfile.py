"""Rows of JSON in a .jsonl.zst: written whole, a row at a time, and read back."""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import zstandard

from oriole.text.work import new_file

__all__ = ["read_rows", "row_lines", "rows_to"]

FLUSH_BYTES: Final = 1 << 18
"""Rows that are packed in one call."""


@contextmanager
def rows_to(path: Path, level: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends one row to a .jsonl.zst, which appears whole when the block ends well.

    `level` is zstd's. Lone surrogates are kept, as three bytes that are no UTF-8, for `read_rows` alone to read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file, zstandard.ZstdCompressor(level).stream_writer(file, closefd=False) as packed:
        held = bytearray()

        def write(row: Mapping[str, Any]) -> None:
            held.extend(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
            held.append(10)
            if len(held) >= FLUSH_BYTES:
                packed.write(held)
                held.clear()

        yield write
        packed.write(held)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl.zst that `rows_to` wrote."""
    yield from map(json.loads, row_lines(path))


def row_lines(path: Path) -> Iterator[bytes]:
    """Its lines, for who wants only some of the rows."""
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file, closefd=False) as unpacked:
        yield from io.BufferedReader(unpacked, 1 << 20)
