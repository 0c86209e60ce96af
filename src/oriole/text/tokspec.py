"""The tokenizer's file: what tokenizer.json holds, written and read without any library, the same everywhere.

A vocabulary is merges over bytes and, rarely, added tokens. Ids 0 to 15 are reserved for ever, 16 to 271 are the bytes,
then follow the merges in the order of their rank, then the added tokens.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["FIRST_BYTE", "FIRST_MERGE", "QWEN2_REGEX", "RESERVED", "Foreign", "Merge", "added_tokens", "byte_to_char",
           "is_special", "read_spec", "spell", "write_spec"]  # fmt: skip

Merge = tuple[bytes, bytes]

RESERVED: tuple[str, ...] = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", *(f"<|reserved_{i}|>" for i in range(7)),
)  # fmt: skip
"""The names of ids 0 to 15. Only `text.template` produces them; text that merely spells one never does."""

FIRST_BYTE = len(RESERVED)
FIRST_MERGE = FIRST_BYTE + 256

QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is cut before merging, byte for byte Qwen2's: llama.cpp recognises no other spelling."""

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


class Foreign(Exception):
    """Why a tokenizer.json is not one of ours."""


def write_spec(merges: Sequence[Merge], added: Sequence[str] = ()) -> dict[str, Any]:
    """tokenizer.json as an object, spelled out so that it is the same whatever library version writes it."""
    # The names are vocabulary too, for a file gives its added tokens those ids only if the model already has them.
    tokens = [*RESERVED, *byte_to_char(), *(spell(a + b) for a, b in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    assert len(vocab) == len(tokens), "two ids with one spelling"
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens(len(vocab), added)),
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
            "merges": [f"{spell(a)} {spell(b)}" for a, b in merges],  # readers old and new know this spelling
        },
    }


def read_spec(spec: Any) -> tuple[list[Merge], list[str]]:
    """Merges and added tokens of a tokenizer.json that is exactly of our form, whoever wrote it; else `Foreign`."""
    try:
        model = spec["model"]
        vocab = {str(token): int(i) for token, i in model["vocab"].items()}
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        added = sorted((int(t["id"]), str(t["content"])) for t in spec["added_tokens"])
        stripping = any(t.get(flag) for t in spec["added_tokens"] for flag in ("single_word", "lstrip", "rstrip"))
        steps = spec["pre_tokenizer"]["pretokenizers"]
        patterns = [s["pattern"]["Regex"] for s in steps if s["type"] == "Split"]
        byte_level = [s for s in steps if s["type"] == "ByteLevel"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Foreign("it is not byte-level BPE with a Split and a ByteLevel pre-tokenizer") from error
    if model["type"] != "BPE" or model.get("byte_fallback") or spec.get("normalizer") is not None:
        raise Foreign("it is not plain byte-level BPE without a normalizer")
    if added[:FIRST_BYTE] != list(enumerate(RESERVED)):
        raise Foreign("ids 0 to 15 are not the reserved tokens")
    if patterns != [QWEN2_REGEX] or len(byte_level) != 1 or byte_level[0].get("use_regex", True):
        raise Foreign("it cuts text with another regex than Qwen2's")
    to_byte = {c: b for b, c in enumerate(byte_to_char())}
    try:
        merges = [(bytes(to_byte[c] for c in a), bytes(to_byte[c] for c in b)) for a, b in pairs]
    except (KeyError, ValueError) as error:
        raise Foreign("a merge is not a pair of byte-level tokens") from error
    expected = [*RESERVED, *byte_to_char(), *("".join(pair) for pair in pairs)]
    if vocab != {token: i for i, token in enumerate(expected)} or len(vocab) != len(expected):
        raise Foreign("its ids are not the bytes from 16 on followed by the merges in their order")
    further = added[FIRST_BYTE:]
    if [i for i, _ in further] != list(range(len(vocab), len(vocab) + len(further))) or stripping:
        raise Foreign("its further added tokens do not follow the vocabulary one by one, or strip what is around them")
    return merges, [content for _, content in further]


def added_tokens(first: int, added: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The reserved tokens, then `added` from id `first` on, as tokenizer.json lists them.

    `special`, as in Qwen3, are only the <|…|> ones.
    """
    for i, name in enumerate(RESERVED):
        yield {"id": i, "content": name, **_FLAGS, "special": is_special(name)}
    for i, name in enumerate(added, first):
        yield {"id": i, "content": name, **_FLAGS, "special": False}


def is_special(name: str) -> bool:
    """Whether other tools leave this reserved token out when they decode."""
    return name.startswith("<|")


def spell(token: bytes) -> str:
    """Bytes as tokenizer.json writes them, one visible character for each."""
    visible = byte_to_char()
    return "".join(visible[b] for b in token)


@functools.cache
def byte_to_char() -> tuple[str, ...]:
    """GPT-2's visible character for each byte: itself where it prints, else the next free one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return tuple(chr(b) if b in printable else chr(next(spare)) for b in range(256))
