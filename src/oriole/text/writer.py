"""How a shards folder is written: row by row, in bounded memory, under another name until all of it is on disk."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
import xxhash
from numpy.typing import NDArray

from oriole.errors import DataError, raise_for_os_error
from oriole.text.tokenizer import Tokenizer
from oriole.text.work import sync_folder

__all__ = ["SCHEMA", "Row", "Writer", "fingerprint", "new_folder"]

Row = tuple[Sequence[int], Sequence[int] | None, str]
"""Token ids (n,), loss mask (n,) of 0 and 1 or None for all ones, and the name of the source, of one document."""

SCHEMA = 1
FLUSH_TOKENS = 1 << 20
"""Tokens held in memory before they are written."""


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` that takes its name when the block ends well, and is deleted when it does not."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder} exists already; remove it or choose another folder for the shards")
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        part.mkdir()
    except OSError as error:
        raise_for_os_error(error, "preparing", folder)
    try:
        yield part
        try:
            os.replace(part, folder)  # onto nothing, or onto an empty folder
            sync_folder(folder.parent)
        except OSError as error:
            raise_for_os_error(error, "renaming the finished shards to", folder)
    except BaseException:  # an interrupt, too, leaves nothing behind
        shutil.rmtree(part, ignore_errors=True)
        raise


def _remove_leftovers(folder: Path) -> None:
    """Delete what writers of this folder left that were killed; those of living processes stay."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)\.part")
    for left in folder.parent.iterdir():
        match = pattern.fullmatch(left.name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 would be Ctrl-C on Windows
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


class _File:
    """A file written from the front, with its size and hash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._file: BinaryIO = open(path, "wb", buffering=1 << 16)  # closed by close()
        self._hash = xxhash.xxh3_64()

    def write(self, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values).data.cast("B")
        self._file.write(data)
        self._hash.update(data)
        self.bytes += data.nbytes

    def sync(self) -> dict[str, Any]:
        """Bring it to the disk; what the index says of it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self.bytes, "xxh3": self._hash.hexdigest()}

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk was reported by the write already
            self._file.close()


@final
class Writer:
    """The growing files of one shards folder."""

    def __init__(self, folder: Path, tok: Tokenizer, *, langs: bool = False) -> None:
        """`langs`: the language of each document is kept, too."""
        self.folder, self.tok = folder, tok
        self.vocab_size = tok.vocab_size
        self.dtype = np.dtype("<u2") if self.vocab_size <= 65_536 else np.dtype("<u4")
        self.docs = self.tokens = self.trained = 0
        self.sources: dict[str, int] = {}
        self.langs: dict[str, int] | None = {} if langs else None
        self._rows: list[NDArray[np.int64]] = []
        self._masks: list[NDArray[np.uint8] | None] = []
        self._source_ids: list[int] = []
        self._lang_ids: list[int] = []
        self._waiting = 0
        self._files: dict[str, _File] = {}
        self._open("offsets.bin").write(np.zeros(1, "<i8"))

    def _open(self, name: str) -> _File:
        """The file of that name, made at its first use."""
        if name not in self._files:
            try:
                self._files[name] = _File(self.folder / name)
            except OSError as error:
                raise_for_os_error(error, "writing", self.folder / name)
        return self._files[name]

    def add(self, ids: Sequence[int], mask: Sequence[int] | None, source: str, lang: str = "") -> None:
        """Take one row; it is written with the next ones."""
        if len(ids) == 0:
            return
        if mask is not None and len(mask) != len(ids):
            raise ValueError(f"row {self.docs + 1} has {len(ids)} ids but a mask of {len(mask)}")
        self._rows.append(np.asarray(ids, np.int64))
        self._masks.append(None if mask is None else np.asarray(mask, bool).view(np.uint8))
        number = self.sources.setdefault(source, len(self.sources))
        if number > 65_535:
            raise DataError("the data names more than 65,536 different sources; give documents of one kind one name")
        self._source_ids.append(number)
        if self.langs is not None:
            self._lang_ids.append(self.langs.setdefault(lang, len(self.langs)))
        self.docs += 1
        self._waiting += len(ids)
        if self._waiting >= FLUSH_TOKENS or len(self._rows) >= FLUSH_TOKENS // 8:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        if not self._rows:
            return
        ids = np.concatenate(self._rows)
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"ids from {ids.min()} to {ids.max()} in a vocabulary of {self.vocab_size}")
        lengths = np.fromiter(map(len, self._rows), np.int64, len(self._rows))
        untrained = sum(len(m) - int(np.count_nonzero(m)) for m in self._masks if m is not None)
        try:
            if untrained and "mask.bin" not in self._files:
                for start in range(0, self.tokens, FLUSH_TOKENS):  # all were trained on up to here
                    self._open("mask.bin").write(np.ones(min(FLUSH_TOKENS, self.tokens - start), np.uint8))
            if untrained or "mask.bin" in self._files:
                masks = [np.ones(n, np.uint8) if m is None else m for m, n in zip(self._masks, lengths, strict=True)]
                self._open("mask.bin").write(np.concatenate(masks))
            self._open("tokens.bin").write(ids.astype(self.dtype))
            self._open("offsets.bin").write((self.tokens + np.cumsum(lengths)).astype("<i8"))
            self._open("sources.bin").write(np.array(self._source_ids, "<u2"))
            if self.langs is not None:
                self._open("langs.bin").write(np.array(self._lang_ids, "u1"))
        except OSError as error:
            raise_for_os_error(error, "writing shards to", self.folder)
        self.tokens += len(ids)
        self.trained += len(ids) - untrained
        self._rows, self._masks, self._source_ids, self._lang_ids, self._waiting = [], [], [], [], 0

    def finish(self) -> None:
        """Write what is left and the index, all of it safe on disk afterwards."""
        self.flush()
        if not self.docs:
            raise DataError("there is no document to write shards from; give files that hold some")
        if not self.trained:
            raise DataError("no token of the data is trained on; give conversations in which an assistant answers")
        try:
            self._open("byte_lengths.bin").write(self.tok.byte_lengths().astype("<i4"))
            index: dict[str, Any] = {
                "schema": SCHEMA,
                "tokenizer": self.tok.fingerprint(),
                "vocab_size": self.vocab_size,
                "documents": self.docs,
                "tokens": self.tokens,
                "trained_tokens": self.trained,
                "sources": list(self.sources),
                **({} if self.langs is None else {"langs": list(self.langs)}),
                "files": {name: file.sync() for name, file in sorted(self._files.items())},
            }
            index["fingerprint"] = fingerprint(index)
            with open(self.folder / "index.json", "w", encoding="utf-8") as file:
                json.dump(index, file, ensure_ascii=True, indent=1)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.folder)
        except OSError as error:
            raise_for_os_error(error, "writing shards to", self.folder)

    def close(self) -> None:
        """Close all files; harmless when they are closed."""
        for file in self._files.values():
            file.close()


def fingerprint(index: Mapping[str, Any]) -> str:
    """32 hex digits that change with any content: the index without it, which holds the hash of every file."""
    rest = {k: v for k, v in index.items() if k != "fingerprint"}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, ensure_ascii=True, sort_keys=True).encode())
