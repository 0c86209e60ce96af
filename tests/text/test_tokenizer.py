"""The tokenizer: any string round trips, text never becomes a role token, others read the same file the same way."""

import codecs
import itertools
import json
import shutil
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from oriole.errors import ConfigError, DataError, ModelError
from oriole.text import tokenizer as module
from oriole.text import toklearn
from oriole.text.tokenizer import QWEN2_REGEX, RESERVED, Detokenizer, Tokenizer, train_tokenizer

Texts = Callable[..., list[tuple[str, str]]]
PIECES = [
    *RESERVED,
    "<|im_",
    "<thi",
    "k>",
    "</",
    "|>",
    "<|",
    "中文",
    "两个黄鹂",
    " the",
    "\n",
    "\t",
    "\r\n",
    "é",
    "👩‍👩‍👧",
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SALTED = st.lists(st.one_of(st.sampled_from(PIECES), ANY_TEXT), max_size=12).map("".join)
FIXED = [
    "",
    " ",
    "\0",
    "\t\tx\n\n\n y",
    "line\r\nline",
    "👋🏽 hé́llo 中文，测试！",
    "\ufeffx",
    "a\u2028b\x85c",
    "don't WE'LL",
    "3.14",
]


def hf(tok: Tokenizer, folder: Path) -> tokenizers.Tokenizer:
    tok.save(folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@given(SALTED)
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips_and_never_gives_a_reserved_id(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert all(16 <= i < tok.vocab_size for i in ids)


@pytest.mark.parametrize("text", [*FIXED, *RESERVED, "".join(RESERVED), "中" * 5000, "a" * 5000, " " * 5000])
def test_hard_texts_round_trip(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert tok.decode(ids) == text == tok.decode(ids, skip_special=False)
    assert not set(ids) & set(range(16))
    assert tok.encode_batch([text, "x"]) == [ids, tok.encode("x")]


def test_lone_surrogates_become_replacement_characters(tok: Tokenizer) -> None:
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    assert tok.decode(tok.encode("\ud83d\ude00")) == "😀"  # a pair that some JSON writer left apart
    assert tok.encode_batch(["\udc00"]) == [tok.encode("\ufffd")]


def test_layout_of_the_ids(tok: Tokenizer) -> None:
    assert tok.vocab_size == 900
    assert RESERVED[:9] == (
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
        "<tool_response>", "</tool_response>",
    )  # fmt: skip
    assert [tok.token_bytes(i) for i in range(16)] == [b""] * 16
    assert [tok.token_bytes(16 + b) for b in range(256)] == [bytes([b]) for b in range(256)]
    lengths = tok.byte_lengths()
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [len(tok.token_bytes(i)) for i in range(900)]
    text = "两个黄鹂 sing.\n"
    assert lengths[tok.encode(text)].sum() == len(text.encode())
    assert len({tok.token_bytes(i) for i in range(16, 900)}) == 884
    for wrong in (-1, 900):
        with pytest.raises(ModelError, match="not in the vocabulary of 900"):
            tok.decode([wrong])


def test_decode_of_reserved_ids(tok: Tokenizer) -> None:
    ids = [1, *tok.encode("hé"), 2, 0]
    assert tok.decode(ids) == "hé"
    assert tok.decode(ids, skip_special=False) == "<|im_start|>hé<|im_end|><|endoftext|>"


def reference_encode(text: str, tok: Tokenizer) -> list[int]:
    """BPE as in the paper: of all pairs present, merge the one learned first, everywhere, until none is left."""
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN2_REGEX), "isolated")
    pair_to_id = {pair: 272 + i for i, pair in enumerate(tok._merges)}
    out = []
    for word, _ in cut.pre_tokenize_str(text):
        parts = [bytes([b]) for b in word.encode()]
        while True:
            known = [p for p in itertools.pairwise(parts) if p in pair_to_id]
            if not known:
                break
            best, i = min(known, key=pair_to_id.__getitem__), 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
                i += 1
        ids = {tok.token_bytes(i): i for i in range(16, tok.vocab_size)}
        out += [ids[p] for p in parts]
    return out


def test_encoding_is_bpe_by_the_learned_merges(tok: Tokenizer, bilingual: Texts) -> None:
    texts = [t for _, t in bilingual(20, seed=99)] + FIXED
    assert [tok.encode(t) for t in texts] == [reference_encode(t, tok) for t in texts]
    assert max(len(t) for t in map(tok.encode, texts)) < 60  # and it does merge


def test_every_token_is_what_its_own_bytes_encode_to(tok: Tokenizer) -> None:
    for i in range(272, tok.vocab_size):
        try:
            text = tok.token_bytes(i).decode()
        except UnicodeDecodeError:
            continue
        assert tok.encode(text) == [i]


def test_the_pattern_and_the_file_are_what_others_expect(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    split, byte_level = spec["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"]["Regex"] == (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
        "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    )
    assert (split["behavior"], split["invert"]) == ("Isolated", False)
    assert byte_level == {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    assert spec["normalizer"] is None
    assert spec["model"]["ignore_merges"] is spec["model"]["byte_fallback"] is False
    assert spec["decoder"]["type"] == "ByteLevel"
    assert [(t["id"], t["content"]) for t in spec["added_tokens"]] == list(enumerate(RESERVED))
    assert {t["content"] for t in spec["added_tokens"] if not t["special"]} == set(RESERVED[3:9])
    read = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert read.get_vocab_size() == 900
    assert [read.token_to_id(name) for name in RESERVED] == list(range(16))
    for text in FIXED:
        assert read.encode(text).ids == tok.encode(text)
    assert read.encode("a<|im_end|>b").ids == [*tok.encode("a"), 2, *tok.encode("b")]


def test_save_and_load(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path / "one")
    again = Tokenizer.load(tmp_path / "one")
    again.save(tmp_path / "two", chat=False)
    assert again.fingerprint() == tok.fingerprint()
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    # What another library wrote from it is still ours.
    hf(tok, tmp_path / "one").save(str(tmp_path / "two" / "tokenizer.json"))
    assert Tokenizer.load(tmp_path / "two").fingerprint() == tok.fingerprint()


def test_transformers_loads_the_folder(tok: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for chat, eos in ((True, "<|im_end|>"), (False, "<|endoftext|>")):
        folder = tmp_path / str(chat)
        tok.save(folder, chat=chat, context=512)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs.eos_token == eos
        assert theirs.pad_token_id == 0
        assert theirs.model_max_length == 512
        assert len(theirs) == tok.vocab_size
        assert theirs.chat_template == (folder / "chat_template.jinja").read_text("utf-8")
        for text in FIXED:
            assert theirs(text)["input_ids"] == tok.encode(text)
            assert theirs.decode(tok.encode(text)) == text
        theirs.save_pretrained(tmp_path / "theirs")
        assert Tokenizer.load(tmp_path / "theirs").fingerprint() == tok.fingerprint()


def test_load_refuses_what_is_not_ours(tok: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer at .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    tok.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    good = path.read_text("utf-8")
    with pytest.raises(ModelError, match="no tokenizer at"):
        Tokenizer.load(path)  # a file where a folder was meant

    def with_value(value: Any, *path: Any) -> str:
        spec = table = json.loads(good)
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value
        return json.dumps(spec)

    spec = json.loads(good)
    added, merges, steps = spec["added_tokens"], spec["model"]["merges"], spec["pre_tokenizer"]["pretokenizers"]

    for text, message in [
        (good[: len(good) // 2], "not valid JSON"),
        ("[]", "not byte-level BPE"),
        (with_value("Unigram", "model", "type"), "not plain byte-level BPE"),
        (with_value({"type": "NFC"}, "normalizer"), "without a normalizer"),
        (with_value("<thought>", "added_tokens", 3, "content"), "ids 0 to 15"),
        (with_value([*added, {"id": 901, "content": "<new>"}], "added_tokens"), "further added tokens"),
        (with_value([*added, {"id": 900, "content": "x y", "lstrip": True}], "added_tokens"), "strip what is around"),
        (with_value(QWEN2_REGEX + "|x", "pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), "another regex"),
        (with_value(steps[1:], "pre_tokenizer", "pretokenizers"), "another regex"),
        (with_value(merges[:-1], "model", "merges"), "its ids are not"),
        (with_value(merges[::-1], "model", "merges"), "its ids are not"),
        (with_value("你 好", "model", "merges", 0), "not a pair of byte-level tokens"),
        (with_value("a b c", "model", "merges", 0), "not a pair of byte-level tokens"),
    ]:
        path.write_text(text, "utf-8")
        with pytest.raises(ModelError, match=message):
            Tokenizer.load(tmp_path)


def test_training_is_deterministic_and_exact(bilingual: Texts) -> None:
    one, two = (train_tokenizer(iter(bilingual(100)), 600) for _ in range(2))
    assert one.vocab_size == two.vocab_size == 600
    assert one.fingerprint() == two.fingerprint()
    assert one.fingerprint() != train_tokenizer(bilingual(100), 599).fingerprint()
    assert train_tokenizer([], 272).vocab_size == 272  # bytes alone need no text


def test_training_without_rustbpe_gives_an_equivalent_tokenizer(
    bilingual: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = bilingual(100)
    usual = train_tokenizer(texts, 600)
    monkeypatch.setitem(sys.modules, "rustbpe", None)  # import raises ImportError
    other = train_tokenizer(texts, 600)
    assert other.vocab_size == 600
    sample = [t for _, t in bilingual(50, seed=3)]
    ours, theirs = (sum(map(len, t.encode_batch(sample))) for t in (usual, other))
    assert theirs == pytest.approx(ours, rel=0.01)  # equal but for ties
    assert all(other.decode(other.encode(t)) == t for t in sample)


def test_too_little_text_says_how_much_is_possible() -> None:
    with pytest.raises(DataError, match=r"at most (\d+) ids, not 5,000; .*smaller vocab_size") as caught:
        train_tokenizer([("en", "to be or not to be")], 5000)
    possible = int(str(caught.value).split("at most ")[1].split()[0])
    assert train_tokenizer([("en", "to be or not to be")], possible).vocab_size == possible
    with pytest.raises(DataError):
        train_tokenizer([("en", "to be or not to be")], possible + 1)
    with pytest.raises(ConfigError, match="272 is the least"):
        train_tokenizer([("en", "x")], 271)


def test_the_sample_is_bounded_balanced_and_spread() -> None:
    texts = [("en", f"{i:04d}" * 250) for i in range(400)] + [("zh", f"{i:04d}" * 250) for i in range(100)]
    sample = toklearn.sample_text(iter(texts), 60_000, seed=0)
    assert len(sample) == 60  # 30 kB of each language, though English came first and would have filled it all
    numbers = [int(piece[:4]) for piece in sample]
    english, chinese = numbers[:30], numbers[30:]
    assert english == sorted(english) and chinese == sorted(chinese)
    assert min(english) < 100 and max(english) > 300 and max(chinese) < 100
    assert (
        sample == toklearn.sample_text(iter(texts), 60_000, seed=0) != toklearn.sample_text(iter(texts), 60_000, seed=1)
    )
    whole = toklearn.sample_text([("en", "x" * 100_000)], 10**6, seed=0)
    assert "".join(whole) == "x" * 100_000 and max(map(len, whole)) == toklearn.PIECE


def test_the_sample_has_equally_many_characters_of_each_language() -> None:
    texts = [("en", "a" * 1000)] * 300 + [("zh", "中" * 1000)] * 300 + [("ja", "の" * 1000)] * 5
    kept = Counter(c for piece in toklearn.sample_text(iter(texts), 100_000, seed=0) for c in piece)
    assert kept["の"] == 5000  # all there is
    assert abs(kept["a"] - kept["中"]) <= 1000  # equal but for one piece: 3 bytes do not count more than 1
    assert 90_000 < kept["a"] + 3 * kept["中"] + 3 * kept["の"] <= 100_000


def test_memory_does_not_grow_with_the_corpus() -> None:
    def peak(documents: int) -> int:
        tracemalloc.start()
        toklearn.sample_text((("en", f"{i:05d}" * 1000) for i in range(documents)), 500_000, seed=0)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(2000) < 1.1 * peak(200) < 2_000_000


def test_repeated_and_unreachable_tokens_get_no_id() -> None:
    tokens = [b"ab", b"bc", b"abc", b"abc", b"bcd", b"abcde"]
    # abc = ab+c; bcd = bc+d; abcde is never reached: its bytes become abc, d, e.
    assert toklearn.merges_of(tokens) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"bc", b"d")]


@given(st.lists(st.integers(0, 899), max_size=40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_detokenizer_joined_is_decode(tok: Tokenizer, ids: list[int], keep: bool) -> None:
    out = Detokenizer(tok, keep_special=keep)
    for _ in range(2):  # flush leaves it ready for another text
        assert "".join(map(out.feed, ids)) + out.flush() == tok.decode(ids, skip_special=not keep)


@given(st.binary(max_size=24))
@settings(max_examples=300, deadline=None)
def test_detokenizer_on_any_bytes(tok: Tokenizer, data: bytes) -> None:
    out = Detokenizer(tok)
    text = "".join(out.feed(16 + b) for b in data) + out.flush()
    assert text == data.decode("utf-8", "replace") == tok.decode([16 + b for b in data])


def test_detokenizer_gives_whole_characters_only(tok: Tokenizer) -> None:
    out = Detokenizer(tok)
    steps = [out.feed(16 + b) for b in "黄鹂😀".encode()]
    assert steps == ["", "", "黄", "", "", "鹂", "", "", "", "😀"]
    assert out.flush() == ""
    assert [out.feed(16 + b) for b in "黄".encode()[:2]] == ["", ""]
    assert out.flush() == codecs.decode("黄".encode()[:2], "utf-8", "replace") == "\ufffd"


def test_saving_into_a_file_is_the_users_mistake(tok: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="writing"):
        tok.save(tmp_path / "file")


def test_a_save_that_fails_leaves_the_old_file(
    tok: Tokenizer, bilingual: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tok.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    monkeypatch.setattr(module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(Exception, match="disk is full"):
        train_tokenizer(bilingual(50), 300).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    shutil.rmtree(tmp_path)
