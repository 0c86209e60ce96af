"""Characters as tokens, tokens added afterwards, and long texts in parts: the same file, no string lost."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from oriole.errors import ConfigError
from oriole.text import tokenizer as module
from oriole.text.template import CHAT_TEMPLATE, Message, message_dict, render
from oriole.text.tokenizer import RESERVED, Detokenizer, Tokenizer, train_tokenizer
from oriole.text.tokspec import write_spec

Texts = Callable[..., list[tuple[str, str]]]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
ADDED = ["黄鹂", "GPT-4", "é中", "a  b", "  x", "🎉", "黄鹂鸟"]
SALTED = st.lists(
    st.one_of(st.sampled_from([*ADDED, *RESERVED, "黄", "GPT", "\n", "\r\n", " "]), ANY_TEXT), max_size=12
)


@pytest.fixture(scope="module")
def characters(bilingual: Texts) -> Tokenizer:
    return train_tokenizer([*bilingual(), ("zh", "é😀😁ñ")], 2000, kind="char")


@pytest.fixture(scope="module")
def extended(tok: Tokenizer) -> Tokenizer:
    return tok.with_tokens(ADDED)


def read_back(tokenizer: Tokenizer, folder: Path) -> tokenizers.Tokenizer:
    tokenizer.save(folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


# --- characters ------------------------------------------------------------------------------------------------------


def test_every_seen_character_is_one_token(characters: Tokenizer, bilingual: Texts) -> None:
    seen = {c for _, text in bilingual() for c in text} | set("é😀😁ñ")
    for text in [*(text for _, text in bilingual(30)), "é😀ñ 两个\t黄鹂\n"]:
        assert len(characters.encode(text)) == len(text)
    single = {t for i in range(16, characters.vocab_size) if len(t := characters.token_bytes(i)) > 1}
    whole = {t.decode() for t in single if _is_text(t)}
    assert whole == {c for c in seen if len(c.encode()) > 1}
    assert characters.kind == "char"
    assert characters.vocab_size < 2000  # no more than the text has
    assert characters.token_bytes(16 + ord("a")) == b"a"


def _is_text(token: bytes) -> bool:
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False


@given(ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_characters_round_trip_any_text(characters: Tokenizer, text: str) -> None:
    ids = characters.encode(text)
    assert characters.decode(ids) == text
    assert all(16 <= i < characters.vocab_size for i in ids)
    assert len(text) <= len(ids) <= len(text.encode())  # no token joins two characters


def test_unseen_characters_fall_back_to_bytes(characters: Tokenizer) -> None:
    assert b"".join(map(characters.token_bytes, characters.encode("Ж"))) == "Ж".encode()
    assert len(characters.encode("Ж")) == 2
    assert characters.decode(characters.encode("Ж🦜")) == "Ж🦜"


def test_the_most_frequent_characters_come_first_and_languages_weigh_the_same() -> None:
    texts = [("zh", "好" * 9 + "天"), ("ru", "д" * 900 + "ж" * 90 + "ы" * 10)]
    learnt = train_tokenizer(texts, 272 + 100, kind="char")
    tokens = [learnt.token_bytes(i).decode("utf-8", "replace") for i in range(272, learnt.vocab_size)]
    assert [t for t in tokens if "\ufffd" not in t] == ["д", "好", "天", "ж", "ы"]  # of 0.9 + 0.9 the lower
    few = train_tokenizer(texts, 272 + 3, kind="char")
    assert few.vocab_size == 275
    assert len(few.encode("д")) == 1 and len(few.encode("好")) == 1 and len(few.encode("天")) == 3


def test_others_read_the_characters_alike(characters: Tokenizer, tmp_path: Path) -> None:
    read = read_back(characters, tmp_path)
    for text in ("两个 sing!\n", "ЖÿĀ🦜", "don't 3.14"):
        ids = characters.encode(text)
        assert read.encode(text).ids == ids and read.decode(ids) == text
    assert [read.token_to_id(name) for name in RESERVED] == list(range(16))
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint() == characters.fingerprint() and again.kind == "char"


def test_characters_of_nothing_are_bytes() -> None:
    assert train_tokenizer([], 300, kind="char").vocab_size == 272
    with pytest.raises(ConfigError, match="272 is the least"):
        train_tokenizer([], 271, kind="char")


# --- added tokens ----------------------------------------------------------------------------------------------------


def test_ids_of_existing_tokens_stay(tok: Tokenizer, extended: Tokenizer) -> None:
    assert extended.vocab_size == tok.vocab_size + len(ADDED)
    assert [extended.token_bytes(i) for i in range(tok.vocab_size)] == [
        tok.token_bytes(i) for i in range(tok.vocab_size)
    ]
    assert extended.encode("nothing new 在这里") == tok.encode("nothing new 在这里")
    assert extended.encode("黄鹂") == [900] and extended.encode("GPT-4") == [901]
    assert extended.encode("x黄鹂鸟y") == [*tok.encode("x"), 906, *tok.encode("y")]  # the longest wins
    assert extended.fingerprint() != tok.fingerprint()
    assert extended.byte_lengths()[900] == 6 and extended.kind == tok.kind == "bpe"
    more = extended.with_tokens(["黄鹂", "白鹭", "白鹭", "e"])  # known, new, twice, a byte
    assert more.added == (*ADDED, "白鹭")
    assert more.encode("黄鹂白鹭") == [900, 907]


@given(SALTED.map("".join))
@settings(max_examples=300, deadline=None)
def test_with_added_tokens_any_text_round_trips(extended: Tokenizer, text: str) -> None:
    ids = extended.encode(text)
    assert extended.decode(ids) == text
    assert all(16 <= i < extended.vocab_size for i in ids)
    out = Detokenizer(extended)
    assert "".join(map(out.feed, ids)) + out.flush() == text


def test_others_read_the_added_tokens_alike(extended: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    read = read_back(extended, tmp_path / "one")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert len(theirs) == extended.vocab_size
    for text in ("两个黄鹂鸟 sing GPT-4\n", "a  b  x", "é中🎉é"):
        ids = extended.encode(text)
        assert read.encode(text).ids == ids == theirs(text)["input_ids"]
        assert read.decode(ids) == text == theirs.decode(ids)
    theirs.save_pretrained(tmp_path / "two")
    read.save(str(tmp_path / "one" / "tokenizer.json"))
    for folder in ("one", "two"):
        again = Tokenizer.load(tmp_path / folder)
        assert again.added == extended.added and again.fingerprint() == extended.fingerprint()


@given(st.lists(SALTED.map("".join).filter(lambda t: not any(name in t for name in RESERVED)), min_size=2, max_size=4))
@settings(max_examples=100, deadline=None)
def test_the_template_renders_added_tokens_as_jinja_does(extended: Tokenizer, contents: list[str]) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    chat = [Message("assistant" if n % 2 else "user", text) for n, text in enumerate(contents)]
    chat = [m for m in chat if "</think>" not in m.content]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [message_dict(m) for m in chat]
    text = environment.from_string(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)
    reader = _reader(extended)
    assert render(chat, extended, generation=True)[0] == reader.encode(text, add_special_tokens=False).ids


_READERS: dict[str, tokenizers.Tokenizer] = {}


def _reader(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    key = tokenizer.fingerprint()
    if key not in _READERS:
        spec = write_spec(tokenizer._merges, tokenizer.added)
        _READERS[key] = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return _READERS[key]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "at least one character"),
        ("\ud800", "at least one character"),
        ("a\nb", "line break"),
        ("<|im_end|>", "reserved <|im_end|>"),
        ("say <think>", "reserved <think>"),
        ("x<|im_", "beginning of the reserved"),
        ("naïve", "single bytes"),
    ],
)
def test_tokens_that_would_harm_others_are_refused(tok: Tokenizer, token: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tok.with_tokens([token])


# --- long texts ------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.one_of(st.sampled_from(["\n", "\n\n", "\r\n", " \n", "a", "7", "中", "!", "\t", "'s", "。\n"]), ANY_TEXT)
    )
)
@settings(max_examples=300, deadline=None)
def test_parts_of_a_long_text_give_the_same_ids(tok: Tokenizer, words: list[str]) -> None:
    text = "".join(words)
    whole = tok.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LONG", 2)
        assert tok.encode(text) == whole
        assert tok.encode_batch([text, "x", text]) == [whole, tok.encode("x"), whole]


def test_a_long_text_is_cut_into_parts(tok: Tokenizer) -> None:
    text = "两个黄鹂 sing.\n" * 40_000
    parts = list(module._parts(text))
    assert "".join(parts) == text
    assert len(parts) > 10 and max(map(len, parts)) <= module.LONG
    assert list(module._parts("中" * 200_000)) == ["中" * 200_000]  # no safe place
    assert tok.decode(tok.encode(text)) == text
