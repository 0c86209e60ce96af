"""Token shards: documents as ids and loss masks on disk; `text.mixture` is how training reads them.

A shards folder holds flat little-endian arrays, mapped into memory when it is opened:

    tokens.bin         ids of all documents, one after the other: u16, or u32 for more than 65,536 ids
    mask.bin           u8 for each token, 1 where it is trained on; missing when all are
    offsets.bin        i64 (documents + 1): where each document starts
    sources.bin        u16 for each document: the place of its source in the index's list of names
    langs.bin          u8 for each document: the place of its language in the index's list; only from `data pack`
    byte_lengths.bin   i32 for each id of the vocabulary: its bytes of UTF-8, 0 for the reserved ones
    index.json         schema, counts, the tokenizer's fingerprint, size and hash of each file

It is written under another name and renamed when it is complete and on disk, so no reader ever sees half of one.
A folder made by `oriole data pack` holds several of these, which its own index.json lists; it opens as one.
"""

import contextlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, final

import numpy as np
import xxhash
from numpy.typing import NDArray

from oriole.errors import DataError, raise_for_os_error
from oriole.log import track
from oriole.text.formats import Doc
from oriole.text.template import Chat, render
from oriole.text.tokenizer import END_OF_TEXT, IM_END, Tokenizer
from oriole.text.writer import SCHEMA, Row, Writer, fingerprint, new_folder

__all__ = [
    "Ids",
    "Mask",
    "Row",
    "Shards",
    "View",
    "batches",
    "encode_chats",
    "encode_docs",
    "encode_questions",
    "held_out",
    "write_shards",
]

Ids = NDArray[np.uint16] | NDArray[np.uint32]
Mask = NDArray[np.uint8]

VERIFY_BYTES = 1 << 30
"""Folders up to this size are hashed whenever they are opened (tenths of a second), larger ones only by `verify`."""
BATCH_DOCS, BATCH_CHARS = 1000, 1_000_000
"""Documents, or characters of them, that are encoded in one call."""


def held_out(key: str, fraction: float) -> bool:
    """Whether the document known by `key` belongs to the held-out `fraction`: the same answer always and everywhere."""
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass")) < fraction * 2.0**64


# --- text to rows ----------------------------------------------------------------------------------------------------


def encode_docs(docs: Iterable[Doc], tok: Tokenizer) -> Iterator[Row]:
    """A row for each document, its text's ids and the end mark (id 0), every token trained on."""
    with track("tokenizing", unit="tokens") as bar:
        for batch in batches(docs):
            rows = tok.encode_batch(doc.text for doc in batch)
            bar.update(sum(map(len, rows)) + len(rows))
            for doc, ids in zip(batch, rows, strict=True):
                ids.append(END_OF_TEXT)
                yield ids, None, doc.source


def batches(docs: Iterable[Doc]) -> Iterator[list[Doc]]:
    """Runs of documents that are worth one call of the tokenizer and still bounded."""
    batch: list[Doc] = []
    chars = 0
    for doc in docs:
        batch.append(doc)
        chars += len(doc.text)
        if len(batch) >= BATCH_DOCS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def encode_chats(chats: Iterable[Chat], tok: Tokenizer) -> Iterator[Row]:
    """A row for each conversation as `render` writes it; it ends with its last message, not with a document end."""
    with track("tokenizing", unit="tokens") as bar:
        for chat in chats:
            ids, mask = render(chat.messages, tok, tools=chat.tools)
            bar.update(len(ids))
            yield ids, mask, chat.source


def encode_questions(chats: Iterable[Chat], tok: Tokenizer) -> Iterator[Row]:
    """A row for each answer: the user's words just before it, then the answer and the end of its turn, which are
    trained on. No roles, no template, nothing of what was said earlier."""
    with track("tokenizing", unit="tokens") as bar:
        for chat in chats:
            for question, answer in zip(chat.messages, chat.messages[1:], strict=False):
                asked = tok.encode(question.content)
                if question.role != "user" or answer.role != "assistant" or not asked:
                    continue
                said = [*tok.encode(answer.content), IM_END]
                bar.update(len(asked) + len(said))
                yield [*asked, *said], [0] * len(asked) + [1] * len(said), chat.source


# --- writing ---------------------------------------------------------------------------------------------------------


def write_shards(rows: Iterable[Row], tok: Tokenizer, folder: str | Path) -> "Shards":
    """Write `rows`, encoded with `tok`, to a new `folder` and open it; memory stays bounded, rows may be any number.

    A row without ids is left out. `DataError` when no row is left, when no token is trained on, or when the folder
    already holds something; `ResourceError` when the disk is full or may not be written.
    """
    folder = Path(folder)
    with new_folder(folder) as part, contextlib.closing(Writer(part, tok)) as writer:
        for ids, mask, source in rows:
            writer.add(ids, mask, source)
        writer.finish()
    return Shards.open(folder)


# --- reading ---------------------------------------------------------------------------------------------------------


@final
class Shards:
    """A shards folder, opened: `len`, documents by number, counts. Arrays are read-only and mapped, not loaded."""

    def __init__(self, folder: Path, index: Mapping[str, Any], members: Sequence["_Member"]) -> None:
        """For `Shards.open`, which checks what it hands over."""
        self.folder = folder
        self.num_tokens: int = index["tokens"]
        """Tokens of all documents."""
        self.trained_tokens: int = index["trained_tokens"]
        """Tokens with a mask of 1."""
        self.fingerprint: str = index["fingerprint"]
        """32 hex digits of the content."""
        self.tokenizer: str = index["tokenizer"]
        """The fingerprint of the tokenizer that made the ids."""
        self.sources, self.source_ids = _joined([(m.sources, m.source_ids) for m in members], np.uint16)
        """The names of the sources, and (documents,) the source of each as a place in them."""
        self.langs, self.lang_ids = _joined([(m.langs, m.lang_ids) for m in members], np.uint8)
        """The languages, ("",) where none were kept, and (documents,) the language of each as a place in them."""
        self.byte_lengths = members[0].byte_lengths
        """(V,): bytes of UTF-8 of each id, 0 for the reserved ones."""
        self._members = members
        self._starts = [0, *np.cumsum([len(m.source_ids) for m in members]).tolist()]

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a folder; `DataError` with the reason when it is missing, incomplete, damaged or of another schema."""
        folder = Path(folder)
        index = _read_index(folder)
        members = [_Member.open(folder / part["folder"]) for part in index.get("parts", [{"folder": "."}])]
        for member, part in zip(members, index.get("parts", []), strict=False):
            if member.fingerprint != part["fingerprint"]:
                raise DataError(f"{member.folder} has changed since {folder} was packed; run oriole data pack again")
        shards = cls(folder, index, members)
        if sum(m.bytes for m in members) <= VERIFY_BYTES:
            shards.verify()
        return shards

    def verify(self) -> None:
        """Read every file and compare its hash with the index; `DataError` names one that has changed."""
        for member in self._members:
            member.verify()

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.source_ids)

    def doc(self, i: int) -> tuple[Ids, Mask]:
        """Ids (n,) and loss mask (n,) of document `i`: read-only slices, nothing is copied."""
        if not 0 <= i < len(self.source_ids):
            raise IndexError(f"document {i} of {len(self)}")
        if len(self._members) == 1:
            return self._members[0].doc(i)
        k = bisect_right(self._starts, i) - 1
        return self._members[k].doc(i - self._starts[k])

    def source(self, i: int) -> str:
        """The name of document `i`'s source."""
        return self.sources[int(self.source_ids[i])]

    def lang(self, i: int) -> str:
        """Document `i`'s language, "" where it was not kept."""
        return self.langs[int(self.lang_ids[i])]

    def where(self, *, source: str | None = None, lang: str | None = None) -> NDArray[np.int64]:
        """The numbers of the documents of that source and that language: what a `View` of them is made of."""
        chosen = np.ones(len(self), bool)
        for name, names, ids in ((source, self.sources, self.source_ids), (lang, self.langs, self.lang_ids)):
            if name is not None:
                chosen &= ids == names.index(name) if name in names else False
        return np.flatnonzero(chosen)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(documents,): tokens of each."""
        return np.concatenate([np.diff(m.offsets) for m in self._members])

    def runs(self) -> Iterator[tuple[Ids, Mask | None, NDArray[np.int64]]]:
        """(ids (n,), mask (n,) or None for all ones, offsets (docs + 1,)) of each folder, for whoever counts them."""
        for member in self._members:
            yield member.tokens, member.mask, member.offsets


def _joined(
    members: Sequence[tuple[tuple[str, ...], NDArray[Any]]], dtype: type[Any]
) -> tuple[tuple[str, ...], NDArray[Any]]:
    """The names of all members, each once, and the members' places in their own names as places in these."""
    if len(members) == 1:
        return members[0]
    names = {name: place for place, name in enumerate(dict.fromkeys(n for own, _ in members for n in own))}
    places = [np.array([names[n] for n in own], dtype)[ids] for own, ids in members]
    return tuple(names), np.concatenate(places)


@final
class _Member:
    """The arrays of one folder of tokens."""

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: str = index["fingerprint"]
        self.sources = tuple(index["sources"])
        self.langs = tuple(index.get("langs", ("",)))
        self._files: Mapping[str, Mapping[str, Any]] = index["files"]
        self.bytes: int = sum(said["bytes"] for said in self._files.values())
        self.tokens: Ids = self._map("tokens.bin", "<u2" if index["vocab_size"] <= 65_536 else "<u4")
        self.mask: Mask | None = self._map("mask.bin", "u1") if "mask.bin" in self._files else None
        self.offsets: NDArray[np.int64] = self._map("offsets.bin", "<i8")
        self.source_ids: NDArray[np.uint16] = self._map("sources.bin", "<u2")
        self.byte_lengths: NDArray[np.int32] = self._map("byte_lengths.bin", "<i4")
        kept = "langs.bin" in self._files
        self.lang_ids: NDArray[np.uint8] = (
            self._map("langs.bin", "u1") if kept else np.zeros(len(self.source_ids), "u1")
        )

    @classmethod
    def open(cls, folder: Path) -> Self:
        index = _read_index(folder)
        for name, said in index["files"].items():
            try:
                size = (folder / name).stat().st_size
            except OSError as error:
                raise DataError(f"{folder} lacks {name}, which its index lists; {_AGAIN}") from error
            if size != said["bytes"]:
                raise DataError(f"{folder / name} has {size:,} bytes, its index says {said['bytes']:,}; {_AGAIN}")
        try:
            return cls(folder, index)
        except OSError as error:
            raise_for_os_error(error, "reading", folder)

    def verify(self) -> None:
        for name, said in self._files.items():
            if xxhash.xxh3_64_hexdigest(self._map(name, "u1").data) != said["xxh3"]:
                raise DataError(f"{self.folder / name} is damaged: its content has changed; {_AGAIN}")

    def doc(self, i: int) -> tuple[Ids, Mask]:
        start, end = self.offsets[i], self.offsets[i + 1]
        return self.tokens[start:end], (self._ones[: end - start] if self.mask is None else self.mask[start:end])

    @cached_property
    def _ones(self) -> Mask:
        """The mask of the longest document where all are ones."""
        ones = np.ones(int(np.diff(self.offsets).max()), np.uint8)
        ones.flags.writeable = False
        return ones

    def _map(self, name: str, dtype: str) -> NDArray[Any]:
        # A plain view of the mapping, because slicing a `memmap` takes fourteen times as long.
        return np.memmap(self.folder / name, np.dtype(dtype), "r").view(np.ndarray)


_AGAIN = "delete the folder and make the shards again"


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a shards folder, of this schema and unchanged since it was written."""
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"no token shards at {folder} (it has no index.json); make them first") from error
    except OSError as error:
        raise_for_os_error(error, "reading", path)
    except ValueError as error:  # broken JSON or broken UTF-8
        raise DataError(f"{path} is damaged ({error}); {_AGAIN}") from error
    schema = index.get("schema") if isinstance(index, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{folder} has shards of schema {schema}, this Oriole reads schema {SCHEMA}; {_AGAIN}")
    if index.get("fingerprint") != fingerprint(index):
        raise DataError(f"{path} was changed after it was written; {_AGAIN}")
    return dict(index)


@final
class View:
    """Some documents of a shards folder, in the order of `indices`, as a folder of their own would show them."""

    def __init__(self, shards: Shards, indices: Sequence[int] | NDArray[np.integer[Any]]) -> None:
        self.shards = shards
        self._indices: NDArray[np.int64] = np.asarray(indices, np.int64)
        if self._indices.ndim != 1:
            raise ValueError(f"the indices of a view have the shape {self._indices.shape}, not (n,)")
        if len(self._indices) and not 0 <= self._indices.min() <= self._indices.max() < len(shards):
            raise IndexError(f"a view on documents outside the {len(shards)} of {shards.folder}")
        self.num_tokens = int(shards.lengths[self._indices].sum())
        self.sources, self.source_ids = shards.sources, shards.source_ids[self._indices]
        self.byte_lengths = shards.byte_lengths

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def indices(self) -> NDArray[np.int64]:
        """(documents,): which of the folder's they are."""
        return self._indices

    def only(self, chosen: NDArray[np.integer[Any]]) -> "View":
        """The documents at these places of the view, as a view on the same shards."""
        return View(self.shards, self._indices[chosen])

    def doc(self, i: int) -> tuple[Ids, Mask]:
        """Ids (n,) and loss mask (n,) of the view's document `i`."""
        if i < 0:
            raise IndexError(f"document {i} of {len(self)}")
        return self.shards.doc(self._indices[i])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(documents,): tokens of each."""
        return self.shards.lengths[self._indices]

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the shards' content or the choice."""
        chosen = xxhash.xxh3_128(self.shards.fingerprint.encode())
        chosen.update(self._indices.astype("<i8").tobytes())
        return chosen.hexdigest()
