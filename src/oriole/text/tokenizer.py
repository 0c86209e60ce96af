"""Byte-level BPE: strings to ids and back, without loss for any string, in the format every other tool reads.

The file is Hugging Face `tokenizers` JSON with Qwen2's pre-tokenizer regex, which llama.cpp knows as `qwen2`. Ids 0 to
15 are reserved for ever, 16 to 271 are the bytes, the rest are merges in the order of their rank. A character tokenizer
is the same with merges that make single characters; so whatever reads the one reads the other.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, final

import numpy as np
import tokenizers
from pydantic import Field

from oriole.config import Config
from oriole.errors import ConfigError, DataError, ModelError, raise_for_os_error
from oriole.log import human
from oriole.text.toklearn import encodable, learn_characters, learn_merges, sample_text
from oriole.text.tokspec import (
    FIRST_BYTE,
    FIRST_MERGE,
    QWEN2_REGEX,
    RESERVED,
    Foreign,
    Merge,
    added_tokens,
    byte_to_char,
    is_special,
    read_spec,
    write_spec,
)

__all__ = [
    "END_OF_TEXT",
    "IM_END",
    "IM_START",
    "PAD",
    "QWEN2_REGEX",
    "RESERVED",
    "THINK",
    "THINK_END",
    "TOOL_CALL",
    "TOOL_CALL_END",
    "TOOL_RESPONSE",
    "TOOL_RESPONSE_END",
    "Detokenizer",
    "Kind",
    "Tokenizer",
    "TrainConfig",
    "train_tokenizer",
]

Kind = Literal["bpe", "char"]

PAD = END_OF_TEXT = 0
IM_START, IM_END, THINK, THINK_END = 1, 2, 3, 4
TOOL_CALL, TOOL_CALL_END, TOOL_RESPONSE, TOOL_RESPONSE_END = 5, 6, 7, 8

LONG = 1 << 16
"""Characters from which a text is encoded in parts, so that one long text too keeps all cores busy."""

_BREAK = re.compile("\n(?=[A-Za-z0-9\u4e00-\u9fff])")
"""A place where the regex always cuts: none of its pieces goes on from a line feed to a letter or digit."""


@final
class Tokenizer:
    """Text <-> ids. Made by `train_tokenizer`, `Tokenizer.load` or `with_tokens`."""

    def __init__(self, merges: Sequence[Merge], added: Sequence[str] = ()) -> None:
        """A tokenizer with these merges, best first: id 272 + i is the bytes of merge i, its two parts joined.

        After the merges come the `added` tokens, which are found wherever text spells them, before anything is merged.
        """
        self._merges = list(merges)
        self._added = tuple(added)
        self._bytes = [b""] * FIRST_BYTE + [bytes([b]) for b in range(256)] + [a + b for a, b in self._merges]
        self._bytes += [token.encode() for token in self._added]
        # The reserved tokens are not among its added ones, so no text can become one: bytes reach only merged tokens.
        spec = write_spec(self._merges, self._added)
        spec["added_tokens"] = spec["added_tokens"][FIRST_BYTE:]
        self._encoder = tokenizers.Tokenizer.from_str(json.dumps(spec))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `folder/tokenizer.json`; `ModelError` if it is missing or not a tokenizer of this form."""
        path = Path(folder) / "tokenizer.json"
        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ModelError(
                f"no tokenizer at {path}; give a model folder, or make one with `oriole tokenizer train`"
            ) from error
        except OSError as error:
            raise_for_os_error(error, "reading", path)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} is not valid JSON ({error}); copy the file again or train it anew") from error
        try:
            return cls(*read_spec(spec))
        except Foreign as error:
            raise ModelError(
                f"{path} is not a tokenizer of Oriole's: {error}; use one made by `oriole tokenizer train`"
            ) from error

    def save(self, folder: str | Path, *, chat: bool = False, context: int = 2048) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, all that a model folder needs.

        The end mark is `<|im_end|>` for a model that can `chat` and `<|endoftext|>` for one that goes on writing;
        `context` becomes `model_max_length`. transformers 4.57 and 5 both load the folder.
        """
        from oriole.text.template import CHAT_TEMPLATE  # the template is built on the tokenizer, not the other way

        folder = Path(folder)
        special = [name for name in RESERVED if is_special(name)]
        spec = write_spec(self._merges, self._added)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": RESERVED[IM_END if chat else END_OF_TEXT],
            "pad_token": RESERVED[PAD],
            "unk_token": None,
            "additional_special_tokens": special[1:],
            "added_tokens_decoder": {
                str(t.pop("id")): t for t in added_tokens(len(spec["model"]["vocab"]), self._added)
            },
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "chat_template": CHAT_TEMPLATE,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / "tokenizer.json", json.dumps(spec, ensure_ascii=False, indent=1) + "\n")
            _write(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
            _write(folder / "chat_template.jinja", CHAT_TEMPLATE)
        except OSError as error:
            raise_for_os_error(error, "writing", folder)

    @property
    def vocab_size(self) -> int:
        """The number of ids, the 16 reserved ones included."""
        return len(self._bytes)

    @property
    def kind(self) -> Kind:
        """ "char" when no merge goes beyond a single character."""
        return "char" if self._merges and all(map(_within_character, self._bytes[FIRST_MERGE:])) else "bpe"

    @property
    def added(self) -> tuple[str, ...]:
        """The tokens that were added after training, in the order of their ids, which are the last ones."""
        return self._added

    def with_tokens(self, tokens: Iterable[str]) -> Self:
        """This tokenizer with further tokens; every id there was keeps its meaning, the new ones come last.

        A token becomes one id wherever a text spells it. Those that the vocabulary has already are passed over;
        `ConfigError` for one that would change what others mean.
        """
        ids = {token: i for i, token in enumerate(self._bytes) if token}
        new: list[str] = []
        for token in tokens:
            _check_new(token)
            if token not in new and token.encode() not in ids:
                new.append(token)
        return type(self)(self._merges, [*self._added, *new])

    def encode(self, text: str) -> list[int]:
        """The ids of a piece of content. Never one of the reserved ids, even where the text spells their names.

        Every string comes back from `decode` unchanged, but for a lone surrogate: it has no UTF-8 and becomes U+FFFD.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text, on all cores; a long text is shared by them too.

        The environment variable TOKENIZERS_PARALLELISM=false keeps it to one core.
        """
        parts: list[str] = []
        counts: list[int] = []
        for text in texts:
            before = len(parts)
            parts += _parts(encodable(text))
            counts.append(len(parts) - before)
        # The "fast" form keeps no character offsets: half the time, for a single text too.
        ids = (e.ids for e in self._encoder.encode_batch_fast(parts, add_special_tokens=False))
        return [next(ids) if n == 1 else [i for _ in range(n) for i in next(ids)] for n in counts]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, reserved ids their names or, skipped, nothing."""
        return b"".join(self._spelling(int(i), skip_special) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes an id stands for, b"" for a reserved one; `ModelError` for an id the vocabulary does not have."""
        if not 0 <= id < len(self._bytes):
            raise ModelError(f"token id {id} is not in the vocabulary of {self.vocab_size}; model and tokenizer differ")
        return self._bytes[id]

    def byte_lengths(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Bytes per id, (V,) int32, 0 for the reserved ones: what turns a loss per token into bits per byte."""
        return np.fromiter(map(len, self._bytes), np.int32, len(self._bytes))

    def fingerprint(self) -> str:
        """16 hex digits that change when any id would mean something else."""
        parts = [QWEN2_REGEX, *RESERVED, *(f"{a.hex()} {b.hex()}" for a, b in self._merges)]
        parts += [f"added {token}" for token in self._added]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _spelling(self, id: int, skip_special: bool) -> bytes:
        return RESERVED[id].encode() if not skip_special and 0 <= id < FIRST_BYTE else self.token_bytes(id)


@final
class Detokenizer:
    """Ids in, whole characters out: `"".join(feed(i) …) + flush() == tokenizer.decode(ids)`, whatever the ids."""

    def __init__(self, tokenizer: Tokenizer, keep_special: bool = False) -> None:
        """`keep_special` writes the names of reserved ids where `decode(ids, skip_special=False)` would."""
        self._tokenizer = tokenizer
        self._skip_special = not keep_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The characters that `id` completes, often one or more, "" in the middle of one."""
        return self._decoder.decode(self._tokenizer._spelling(int(id), self._skip_special))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole. Then ready for another text."""
        return self._decoder.decode(b"", final=True)


class TrainConfig(Config):
    """The keys of `oriole tokenizer train`."""

    out: Path
    """The folder that is written."""
    vocab_size: int = Field(16_384, ge=FIRST_MERGE)
    """Ids in all: 16 reserved, 256 bytes, the rest learnt. With kind=char the most there may be."""
    kind: Kind = "bpe"
    """"bpe": frequent pieces of words; "char": every character a token."""
    sample_mb: float = Field(64, gt=0)
    """Megabytes of text to learn from; memory is about 30 times as much, however large the corpus."""
    seed: int = 0
    """Of the sample."""
    skip_bad: bool = False
    """Count records that cannot be read instead of stopping at the first."""


def train_tokenizer(
    texts: Iterable[tuple[str, str]],
    vocab_size: int,
    sample_bytes: int = 64_000_000,
    seed: int = 0,
    kind: Kind = "bpe",
) -> Tokenizer:
    """Learn a vocabulary from (language, text) pairs; same input, same result.

    "bpe" gives exactly `vocab_size` ids, learnt from a random sample of at most `sample_bytes` drawn over the whole
    stream and shared equally by the languages, so that the larger one does not take the vocabulary and memory stays
    bounded; `DataError` when the text is too small for so many merges. "char" makes a token of each character, the most
    frequent first and at most `vocab_size` ids; what is left out, and any character never seen, is spelt in bytes.
    """
    if vocab_size < FIRST_MERGE:
        raise ConfigError(
            f"vocab_size = {vocab_size} is too small; {FIRST_MERGE} is the least (16 reserved ids and 256 bytes)"
        )
    count = vocab_size - FIRST_MERGE
    if kind == "char":
        return Tokenizer(learn_characters(texts, count))
    sample = sample_text(texts, sample_bytes, seed)
    merges = learn_merges(sample, count)
    if len(merges) < count:
        raise DataError(
            f"the text ({human(sum(map(len, sample)))} characters) supports a vocabulary of at most "
            f"{FIRST_MERGE + len(merges):,} ids, not {vocab_size:,}; give more text or set a smaller vocab_size"
        )
    return Tokenizer(merges)


def _check_new(token: str) -> None:
    """`ConfigError` for a token that cannot be added without harm to the others."""
    if not token or encodable(token) != token:
        raise ConfigError("an added token must be text of at least one character")
    if "\n" in token or "\r" in token:
        raise ConfigError(f"{token!r} holds a line break, where texts and messages are cut; add a token without one")
    for name in RESERVED:
        swallows = any(name.startswith(token[i:]) for i in range(1, len(token)))
        if name in token or swallows:
            raise ConfigError(f"{token!r} would swallow the beginning of the reserved {name}; choose another spelling")
    if not token.isascii() and set(token) <= set(byte_to_char()):
        raise ConfigError(
            f"{token!r} would be read as single bytes by other byte-level decoders; add it with a space or other "
            "characters, or leave it to the merges"
        )


def _within_character(token: bytes) -> bool:
    """Whether the bytes are one character, or a beginning of one."""
    lengths = ((0xF0, 4), (0xE0, 3), (0xC0, 2), (0x80, 0), (0, 1))
    return len(token) <= next(n for least, n in lengths if token[0] >= least)


def _parts(text: str) -> Iterator[str]:
    """The text, a long one in parts that give the same ids one by one."""
    start = 0
    while len(text) - start > LONG and (found := _BREAK.search(text, start + LONG // 2)):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _write(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)
