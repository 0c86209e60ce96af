"""Byte-level BPE: strings to ids and back, without loss for any string, in the format every other tool reads.

The file is Hugging Face `tokenizers` JSON with Qwen2's pre-tokenizer regex, which llama.cpp knows as `qwen2`. Ids 0 to
15 are reserved for ever, 16 to 271 are the bytes, the rest are merges in the order of their rank.
"""

import codecs
import functools
import hashlib
import heapq
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, final

import numpy as np
import tokenizers
from tokenizers import models

from oriole.errors import ConfigError, DataError, ModelError, raise_for_os_error
from oriole.log import human, track

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
    "Tokenizer",
    "train_tokenizer",
]

RESERVED: tuple[str, ...] = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", *(f"<|reserved_{i}|>" for i in range(7)),
)  # fmt: skip
"""The names of ids 0 to 15. Only `text.template` produces them; text that merely spells one never does."""

PAD = END_OF_TEXT = 0
IM_START, IM_END, THINK, THINK_END = 1, 2, 3, 4
TOOL_CALL, TOOL_CALL_END, TOOL_RESPONSE, TOOL_RESPONSE_END = 5, 6, 7, 8

FIRST_BYTE = len(RESERVED)
FIRST_MERGE = FIRST_BYTE + 256

QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is cut before merging, byte for byte Qwen2's: llama.cpp recognises no other spelling."""

CHUNK = 16_384
"""Characters of text that are sampled as one piece, so that one huge file does not count as one document."""

SLACK = 1.02
"""Merges are trained beyond the number asked for, because some spell a token that an earlier one already spells."""


@final
class Tokenizer:
    """Text <-> ids. Made by `train_tokenizer` or `Tokenizer.load`."""

    def __init__(self, merges: Sequence[tuple[bytes, bytes]]) -> None:
        """A tokenizer with these merges, best first: id 272 + i is the bytes of merge i, its two parts joined."""
        self._merges = list(merges)
        self._bytes = [b""] * FIRST_BYTE + [bytes([b]) for b in range(256)] + [a + b for a, b in self._merges]
        # No added tokens here, so no text can ever become a reserved id: bytes reach only what some merge makes.
        spec = self._spec()
        spec["added_tokens"] = []
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
            return cls(_merges_of(spec))
        except _Foreign as error:
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
        special = [name for name in RESERVED if _is_special(name)]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": RESERVED[IM_END if chat else END_OF_TEXT],
            "pad_token": RESERVED[PAD],
            "unk_token": None,
            "additional_special_tokens": special[1:],
            "added_tokens_decoder": {str(t.pop("id")): t for t in _added_tokens()},
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "chat_template": CHAT_TEMPLATE,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / "tokenizer.json", json.dumps(self._spec(), ensure_ascii=False, indent=1) + "\n")
            _write(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
            _write(folder / "chat_template.jinja", CHAT_TEMPLATE)
        except OSError as error:
            raise_for_os_error(error, "writing", folder)

    @property
    def vocab_size(self) -> int:
        """The number of ids, the 16 reserved ones included."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """The ids of a piece of content. Never one of the reserved ids, even where the text spells their names.

        Every string comes back from `decode` unchanged, but for a lone surrogate: it has no UTF-8 and becomes U+FFFD.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        # The "fast" form keeps no character offsets: half the time, for a single text too.
        batch = self._encoder.encode_batch_fast([_encodable(t) for t in texts], add_special_tokens=False)
        return [e.ids for e in batch]

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
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _spelling(self, id: int, skip_special: bool) -> bytes:
        return RESERVED[id].encode() if not skip_special and 0 <= id < FIRST_BYTE else self.token_bytes(id)

    def _spec(self) -> dict[str, Any]:
        """tokenizer.json as an object, spelled out so that it is the same whatever library version writes it."""
        visible = _byte_to_char()

        def spell(token: bytes) -> str:
            return "".join(visible[b] for b in token)

        # The names are vocabulary too, for a file gives its added tokens those ids only if the model already has them.
        vocab = {name: i for i, name in enumerate(RESERVED)}
        vocab |= {spell(token): FIRST_BYTE + i for i, token in enumerate(self._bytes[FIRST_BYTE:])}
        assert len(vocab) == len(self._bytes), "two ids with one spelling"
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(_added_tokens()),
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": QWEN2_REGEX}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
                ],
            },
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": [f"{spell(a)} {spell(b)}" for a, b in self._merges],  # readers old and new know this spelling
            },
        }


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


def train_tokenizer(
    texts: Iterable[tuple[str, str]], vocab_size: int, sample_bytes: int = 64_000_000, seed: int = 0
) -> Tokenizer:
    """Learn a vocabulary of exactly `vocab_size` ids from (language, text) pairs; same input, same result.

    A random sample of at most `sample_bytes`, drawn over the whole stream, is shared equally by the languages, so that
    the larger one does not take the vocabulary and memory stays bounded. `DataError` when the text is too small for so
    many merges. BPE: Sennrich et al. 2016, arXiv:1508.07909.
    """
    if vocab_size < FIRST_MERGE:
        raise ConfigError(
            f"vocab_size = {vocab_size} is too small; {FIRST_MERGE} is the least (16 reserved ids and 256 bytes)"
        )
    sample = _sample(texts, sample_bytes, seed)
    count = vocab_size - FIRST_MERGE
    merges = _merges(_train(sample, int(count * SLACK) + 64))[:count]
    if len(merges) < count:
        raise DataError(
            f"the text ({human(sum(map(len, sample)))} characters) supports a vocabulary of at most "
            f"{FIRST_MERGE + len(merges):,} ids, not {vocab_size:,}; give more text or set a smaller vocab_size"
        )
    return Tokenizer(merges)


def _sample(texts: Iterable[tuple[str, str]], sample_bytes: int, seed: int) -> list[str]:
    """Pieces of text, at most `sample_bytes` of UTF-8 in all: in each language those with the smallest random keys."""
    rng = random.Random(seed)
    kept: dict[str, list[tuple[float, int, int, str]]] = {}  # language -> heap of (-key, order, bytes, piece)
    sizes: dict[str, int] = {}
    order = 0
    with track("reading text for the tokenizer", unit="B") as bar:
        for lang, text in texts:
            text = _encodable(text)
            for start in range(0, len(text), CHUNK):
                piece = text[start : start + CHUNK]
                size = len(piece.encode())
                bar.update(size)
                order += 1
                heapq.heappush(kept.setdefault(lang, []), (-rng.random(), order, size, piece))
                sizes[lang] = sizes.get(lang, 0) + size
                for each in kept:  # a new language takes its share from the others
                    while sizes[each] > sample_bytes / len(kept) and len(kept[each]) > 1:
                        sizes[each] -= heapq.heappop(kept[each])[2]
    return [piece for _, _, _, piece in sorted((e for heap in kept.values() for e in heap), key=lambda e: e[1])]


def _train(sample: list[str], count: int) -> list[bytes]:
    """Up to `count` merged tokens, best first, from rustbpe, or from `tokenizers` where rustbpe has no wheel.

    Merges are counted over the very pieces that encoding cuts. Cutting runs of Han characters shorter while training
    saves a fifth to a third of the time, but took 1.3 to 2.3 % more tokens for Chinese to save 0.5 % for English
    (24 MB, vocabularies 4,096 and 16,384, held-out documents).
    """
    try:
        import rustbpe
    except ImportError:
        return _train_with_tokenizers(sample, count)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(sample), 256 + count, pattern=QWEN2_REGEX)
    return [bytes(token) for token, rank in sorted(trainer.get_mergeable_ranks(), key=lambda r: r[1]) if rank >= 256]


def _train_with_tokenizers(sample: list[str], count: int) -> list[bytes]:
    """As `_train`, slower and with more memory; ties between equally frequent pairs may fall the other way."""
    from tokenizers import pre_tokenizers, trainers

    alphabet = _byte_to_char()
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=256 + count, show_progress=False, initial_alphabet=list(alphabet), min_frequency=0
    )
    model.train_from_iterator(sample, trainer)
    to_byte = {c: b for b, c in enumerate(alphabet)}
    vocab: dict[str, int] = model.get_vocab()
    return [bytes(to_byte[c] for c in token) for token in sorted(vocab, key=vocab.__getitem__) if len(token) > 1]


def _merges(tokens: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token, found by merging its own bytes with all the merges before it.

    Trainers report tokens, files want pairs. A token that repeats an earlier spelling, or that its own bytes never lead
    to, would be dead weight in the vocabulary and is left out; the ones after it get by without.
    """
    ranks: dict[tuple[bytes, bytes], int] = {}
    for token in tokens:
        parts = _apply(token, ranks)
        if len(parts) == 2:  # 1: there already; more: out of reach
            ranks[parts[0], parts[1]] = len(ranks)
    return list(ranks)


def _apply(token: bytes, ranks: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """Merge the bytes of `token`, the best-ranked pair first, the leftmost of equals, until none is left."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 1:
        rank, i = min((ranks.get((parts[i], parts[i + 1]), len(ranks)), i) for i in range(len(parts) - 1))
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


class _Foreign(Exception):
    """Why a tokenizer.json is not one of ours."""


def _merges_of(spec: Any) -> list[tuple[bytes, bytes]]:
    """The merges in a tokenizer.json that is exactly of our form, whichever library wrote it; else `_Foreign`."""
    try:
        model = spec["model"]
        vocab = {str(token): int(i) for token, i in model["vocab"].items()}
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        reserved = [(t["id"], t["content"]) for t in spec["added_tokens"]]
        steps = spec["pre_tokenizer"]["pretokenizers"]
        patterns = [s["pattern"]["Regex"] for s in steps if s["type"] == "Split"]
        byte_level = [s for s in steps if s["type"] == "ByteLevel"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _Foreign("it is not byte-level BPE with a Split and a ByteLevel pre-tokenizer") from error
    if model["type"] != "BPE" or model.get("byte_fallback") or spec.get("normalizer") is not None:
        raise _Foreign("it is not plain byte-level BPE without a normalizer")
    if sorted(reserved) != list(enumerate(RESERVED)):
        raise _Foreign("ids 0 to 15 are not the reserved tokens, or there are further added tokens")
    if patterns != [QWEN2_REGEX] or len(byte_level) != 1 or byte_level[0].get("use_regex", True):
        raise _Foreign("it cuts text with another regex than Qwen2's")
    to_byte = {c: b for b, c in enumerate(_byte_to_char())}
    try:
        merges = [(bytes(to_byte[c] for c in a), bytes(to_byte[c] for c in b)) for a, b in pairs]
    except (KeyError, ValueError) as error:
        raise _Foreign("a merge is not a pair of byte-level tokens") from error
    expected = [*RESERVED, *_byte_to_char(), *("".join(pair) for pair in pairs)]
    if vocab != {token: i for i, token in enumerate(expected)} or len(vocab) != len(expected):
        raise _Foreign("its ids are not the bytes from 16 on followed by the merges in their order")
    return merges


def _added_tokens() -> Iterator[dict[str, Any]]:
    """The reserved tokens as tokenizer.json lists them; `special`, as in Qwen3, only for the <|…|> ones."""
    for i, name in enumerate(RESERVED):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        yield {"id": i, "content": name, **flags, "special": _is_special(name)}


def _is_special(name: str) -> bool:
    return name.startswith("<|")


@functools.cache
def _byte_to_char() -> tuple[str, ...]:
    """GPT-2's visible character for each byte: itself where it prints, else the next free one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return tuple(chr(b) if b in printable else chr(next(spare)) for b in range(256))


def _encodable(text: str) -> str:
    """The text with surrogate pairs joined and lone ones replaced by U+FFFD; nearly always the text itself."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _write(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)
