"""How well a tokenizer fits a text: tokens per character and word, the vocabulary's use, and what looks unreadable.

Byte-level vocabularies hold pieces that are no text by themselves, such as the first two bytes of a Chinese character.
They are harmless and few, but look like a fault; here each is shown as bytes together with the characters it begins.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers
from pydantic import field_validator

from oriole.config import Config
from oriole.errors import ModelError
from oriole.log import track
from oriole.text.clean import language
from oriole.text.records import Doc
from oriole.text.shards import batches
from oriole.text.tokenizer import RESERVED, Tokenizer
from oriole.text.toklearn import encodable
from oriole.text.tokspec import FIRST_BYTE, FIRST_MERGE

__all__ = ["Partial", "ReportConfig", "describe", "explain", "load_any", "overview", "partial", "report"]

_WORD = re.compile("[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[A-Za-z\u00c0-\u024f]+|\\d+")
_SHOWN = 30


class ReportConfig(Config):
    """The keys of `oriole tokenizer report`."""

    peer: tuple[str, ...] = ()
    """Other tokenizers to compare with: any tokenizer.json, or folders that hold one."""
    skip_bad: bool = False
    """Count records that cannot be read instead of stopping at the first."""

    @field_validator("peer", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


@dataclass
class _Counts:
    """What one language, or one source of it, adds up to."""

    docs: int = 0
    characters: int = 0
    bytes: int = 0
    words: int = 0
    tokens: int = 0
    peers: Counter[str] = field(default_factory=Counter)

    def add(self, other: "_Counts") -> None:
        self.docs += other.docs
        self.characters += other.characters
        self.bytes += other.bytes
        self.words += other.words
        self.tokens += other.tokens
        self.peers.update(other.peers)

    def row(self) -> dict[str, Any]:
        tokens = max(1, self.tokens)
        return {
            "docs": self.docs,
            "characters": self.characters,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "characters_per_token": self.characters / tokens,
            "bytes_per_token": self.bytes / tokens,
            "fertility": self.tokens / max(1, self.words),
            "peers": {
                name: {"tokens": n, "characters_per_token": self.characters / max(1, n)}
                for name, n in self.peers.items()
            },
        }


def report(tokenizer: Tokenizer, docs: Iterable[Doc], peers: Mapping[str, tokenizers.Tokenizer]) -> dict[str, Any]:
    """All figures as one JSON object; `languages` and `sources` hold rows of the same form.

    `fertility` is tokens per word: a run of Latin letters or of digits, or one Han character, is a word. Memory depends
    on the vocabulary and the number of sources only.
    """
    rows: dict[tuple[str, str], _Counts] = {}
    uses: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
    characters: Counter[str] = Counter()
    with track("encoding", unit="chars") as bar:
        for batch in batches(docs):
            texts = [encodable(doc.text) for doc in batch]
            encoded = tokenizer.encode_batch(texts)
            others = {name: _lengths(peer, texts) for name, peer in peers.items()}
            for n, (doc, text, ids) in enumerate(zip(batch, texts, encoded, strict=True)):
                lang = doc.lang or language(text)
                counts = _Counts(1, len(text), len(text.encode()), len(_WORD.findall(text)), len(ids))
                counts.peers.update({name: lengths[n] for name, lengths in others.items()})
                rows.setdefault((lang, doc.source), _Counts()).add(counts)
                used = uses.setdefault(lang, np.zeros(tokenizer.vocab_size, np.int64))
                used += np.bincount(np.array(ids, np.int64), minlength=tokenizer.vocab_size)
                characters.update(text)
                bar.update(len(text))
    languages: dict[str, _Counts] = {}
    for (lang, _), counts in rows.items():
        languages.setdefault(lang, _Counts()).add(counts)
    return {
        "vocab_size": tokenizer.vocab_size,
        "kind": tokenizer.kind,
        "fingerprint": tokenizer.fingerprint(),
        "languages": {lang: counts.row() for lang, counts in sorted(languages.items())},
        "sources": [{"lang": lang, "source": source, **c.row()} for (lang, source), c in sorted(rows.items())],
        "vocabulary": _vocabulary(tokenizer, uses),
        "unreadable": _unreadable(tokenizer, uses, characters),
    }


def load_any(path: Path) -> tokenizers.Tokenizer:
    """Any tokenizer.json, Oriole's or not, given as the file or its folder; `ModelError` when it cannot be read."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"no tokenizer at {file}; give a tokenizer.json or a folder that holds one")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise ModelError(f"{file} is not a tokenizer that `tokenizers` can read ({error}); copy it again") from error
    tokenizer.no_truncation()  # some files bring these settings along, and would lose or invent tokens
    tokenizer.no_padding()
    return tokenizer


def _lengths(peer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[int]:
    return [len(e.ids) for e in peer.encode_batch_fast(texts, add_special_tokens=False)]


# --- tokens of a text ------------------------------------------------------------------------------------------------


def describe(tokenizer: Tokenizer, text: str) -> list[dict[str, Any]]:
    """Each token of the text: `id`, `bytes` (hex), `text`, and in `part` which bytes of which character it has if not
    whole ones ("bytes 1-2 of 黄").
    """
    text = encodable(text)
    starts: list[int] = []  # the first byte of each character
    owner: list[int] = []  # the character of each byte
    for n, character in enumerate(text):
        starts.append(len(owner))
        owner += [n] * len(character.encode())
    starts.append(len(owner))
    rows, at = [], 0
    for id in tokenizer.encode(text):
        end = at + len(tokenizer.token_bytes(id))
        cut = []
        for n in sorted({owner[at], owner[end - 1]}):
            first, last = max(at, starts[n]) - starts[n] + 1, min(end, starts[n + 1]) - starts[n]
            if last - first + 1 < starts[n + 1] - starts[n]:
                cut.append(
                    f"byte{'s' if last > first else ''} {first}{f'-{last}' if last > first else ''} of {text[n]}"
                )
        data = tokenizer.token_bytes(id)
        rows.append({"id": id, "bytes": data.hex(" "), "text": data.decode("utf-8", "replace"), "part": ", ".join(cut)})
        at = end
    return rows


# --- the vocabulary --------------------------------------------------------------------------------------------------


def overview(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the vocabulary holds: groups of ids, each with its number and examples, the longest and first learnt."""
    groups: dict[str, list[bytes]] = {}
    for i in range(FIRST_MERGE, tokenizer.vocab_size - len(tokenizer.added)):
        groups.setdefault(_group(tokenizer.token_bytes(i)), []).append(tokenizer.token_bytes(i))
    rows = [
        {"what": "reserved: roles, thoughts, tools", "ids": FIRST_BYTE, "examples": list(RESERVED[:5])},
        {"what": "single bytes, for whatever has no token", "ids": 256, "examples": []},
    ]
    for what in sorted(groups, key=lambda w: -len(groups[w])):
        longest = sorted(groups[what], key=lambda t: -len(t))[:6]
        shown = [t.hex(" ") if partial(t) else t.decode() for t in [*groups[what][:6], *longest]]
        rows.append({"what": what, "ids": len(groups[what]), "examples": list(dict.fromkeys(shown))})
    if tokenizer.added:
        rows.append({"what": "added afterwards", "ids": len(tokenizer.added), "examples": list(tokenizer.added[:12])})
    return {"vocab_size": tokenizer.vocab_size, "kind": tokenizer.kind, "groups": rows}


def _group(token: bytes) -> str:
    if partial(token):
        return "parts of characters"
    text = token.decode().strip()
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return "white space" if not text else "digits, punctuation, symbols"
    if all(_WORD.fullmatch(c) and c > "\u3000" for c in letters):
        return "one Han character, perhaps with a sign" if len(letters) == 1 else "several Han characters"
    return "Latin letters" if all(_WORD.fullmatch(c) and c < "\u3000" for c in letters) else "other or mixed scripts"


def _vocabulary(tokenizer: Tokenizer, uses: Mapping[str, np.ndarray[Any, np.dtype[np.int64]]]) -> dict[str, Any]:
    """Which share of the ids beyond the reserved ones the text used, in all and by language, and examples of unused."""
    size = tokenizer.vocab_size - FIRST_BYTE
    total = sum(uses.values(), np.zeros(tokenizer.vocab_size, np.int64))
    unused = [
        i
        for i in np.flatnonzero(total[FIRST_BYTE:] == 0) + FIRST_BYTE
        if partial(tokenizer.token_bytes(int(i))) is None
    ]
    longest = sorted(unused, key=lambda i: (-len(tokenizer.token_bytes(int(i))), i))[:_SHOWN]
    return {
        "used": float(np.count_nonzero(total) / size),
        "used_by": {lang: float(np.count_nonzero(used) / size) for lang, used in sorted(uses.items())},
        "unused": int(size - np.count_nonzero(total)),
        "unused_examples": [tokenizer.token_bytes(int(i)).decode() for i in longest],
    }


def _unreadable(
    tokenizer: Tokenizer, uses: Mapping[str, np.ndarray[Any, np.dtype[np.int64]]], characters: Mapping[str, int]
) -> dict[str, Any]:
    """How many ids are no text by themselves, how often they occur, and what the most frequent ones stand for."""
    total = sum(uses.values(), np.zeros(tokenizer.vocab_size, np.int64))
    found = {i: p for i in range(FIRST_BYTE, tokenizer.vocab_size) if (p := partial(tokenizer.token_bytes(i)))}
    # Single bytes last: there are always 128, and what one of them stands for says little.
    often = sorted(found, key=lambda i: (len(tokenizer.token_bytes(i)) == 1, -total[i], i))
    return {
        "ids": len(found),
        "single_bytes": sum(len(tokenizer.token_bytes(i)) == 1 for i in found),
        "share_of_tokens": float(sum(int(total[i]) for i in found) / max(1, int(total.sum()))),
        "examples": [
            {
                "id": i,
                "bytes": tokenizer.token_bytes(i).hex(" "),
                "uses": int(total[i]),
                "part": found[i].part,
                "meaning": explain(tokenizer.token_bytes(i), characters),
            }
            for i in often[:_SHOWN]
        ],
    }


class Partial(NamedTuple):
    """A token that is no text by itself: bytes that end a character, whole characters, bytes that begin another."""

    end: bytes
    whole: str
    begin: bytes

    @property
    def part(self) -> Literal["begins", "ends", "both"]:
        """Which of its ends is not whole."""
        return "both" if self.end and self.begin else "ends" if self.end else "begins"


def partial(token: bytes) -> Partial | None:
    """The parts of a token that is not UTF-8; None for one that is.

    What cannot be in any UTF-8 text, such as the byte ff, counts as an end.
    """
    try:
        token.decode()
        return None
    except UnicodeDecodeError:
        pass
    start = next((i for i, b in enumerate(token) if b < 0x80 or 0xC2 <= b <= 0xF4), len(token))
    try:
        whole, begin = token[start:].decode(), b""
    except UnicodeDecodeError as error:
        whole, begin = token[start : start + error.start].decode(), token[start + error.start :]
    return Partial(token[:start], whole, begin)


def explain(token: bytes, characters: Mapping[str, int], shown: int = 8) -> str:
    """What the bytes of a token that is no text stand for, with the most frequent fitting ones of `characters`.

    `e9 bb` -> "begins 黄 黑 默 (U+9EC0 to U+9EFF)".
    """
    parts = partial(token)
    if parts is None:
        return token.decode()
    said = []
    if parts.end:
        fitting = _frequent((c for c in characters if c.encode()[1:].endswith(parts.end)), characters, shown)
        said.append(f"ends {' '.join(fitting)}" if fitting else f"ends a character: {parts.end.hex(' ')}")
    if parts.whole:
        said.append(f"has {parts.whole!r}")
    if parts.begin:
        fitting = _frequent((c for c in characters if c.encode().startswith(parts.begin)), characters, shown)
        first, last = _range(parts.begin)
        said.append(f"begins {' '.join([*fitting, f'(U+{first:04X} to U+{last:04X})'])}")
    return ", ".join(said)


def _frequent(fitting: Iterable[str], characters: Mapping[str, int], shown: int) -> list[str]:
    return sorted(fitting, key=lambda c: (-characters[c], c))[:shown]


def _range(begin: bytes) -> tuple[int, int]:
    """The first and last code point whose UTF-8 begins so."""
    missing = (2 if begin[0] < 0xE0 else 3 if begin[0] < 0xF0 else 4) - len(begin)
    value = begin[0] & (0x1F if begin[0] < 0xE0 else 0x0F if begin[0] < 0xF0 else 0x07)
    for byte in begin[1:]:
        value = value << 6 | byte & 0x3F
    least = {0xE0: 0x800, 0xF0: 0x10000}.get(begin[0], 0)  # shorter spellings are not allowed
    return max(value << 6 * missing, least), min((value + 1 << 6 * missing) - 1, 0x10FFFF)
