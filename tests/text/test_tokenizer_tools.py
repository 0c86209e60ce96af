"""What is said about tokenizers: the report's figures, what a piece of bytes means, and what `check` finds wrong."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from oriole.errors import ModelError
from oriole.text import tokcheck
from oriole.text.records import Doc
from oriole.text.tokcheck import check_tokenizer
from oriole.text.tokenizer import Detokenizer, Tokenizer, train_tokenizer
from oriole.text.tokreport import Partial, describe, explain, load_any, overview, partial, report

Texts = Callable[..., list[tuple[str, str]]]
CHARACTER = st.characters(exclude_categories=["Cs"])


def lossy(folder: Path, texts: list[str]) -> Path:
    """A tokenizer as two of the earlier systems had it: white space vanishes, unseen characters are unknown."""
    model = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.decoder = decoders.BPEDecoder()
    model.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False))
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    return folder


# --- report ----------------------------------------------------------------------------------------------------------


def test_the_report_adds_up(tok: Tokenizer, bilingual: Texts) -> None:
    docs = [Doc(text, lang, f"{lang}{n % 2}") for n, (lang, text) in enumerate(bilingual(40, seed=3))]
    docs.append(Doc("两个黄鹂 two birds 鸣翠柳", "", "guessed"))  # no language given
    made = report(tok, docs, {"same": load_any_of(tok)})
    zh, en = made["languages"]["zh"], made["languages"]["en"]
    assert zh["docs"] + en["docs"] == len(docs) == sum(row["docs"] for row in made["sources"])
    for key, expected in (
        ("characters", sum(len(d.text) for d in docs)),
        ("bytes", sum(len(d.text.encode()) for d in docs)),
        ("tokens", sum(len(tok.encode(d.text)) for d in docs)),
    ):
        assert zh[key] + en[key] == expected == sum(row[key] for row in made["sources"])
    assert [(r["lang"], r["source"]) for r in made["sources"]] == [("en", "en0"), ("zh", "guessed"), ("zh", "zh1")]
    assert zh["characters_per_token"] == zh["characters"] / zh["tokens"]
    assert zh["bytes_per_token"] > zh["characters_per_token"] and en["bytes_per_token"] == en["characters_per_token"]
    guessed = made["sources"][1]
    assert guessed["fertility"] == guessed["tokens"] / 9  # 7 characters and two words
    assert guessed["peers"]["same"]["tokens"] == guessed["tokens"]
    used = {i for d in docs for i in tok.encode(d.text)}
    assert made["vocabulary"]["used"] == len(used) / (900 - 16)
    assert made["vocabulary"]["unused"] == 900 - 16 - len(used)
    assert 0 < made["vocabulary"]["used_by"]["zh"] < made["vocabulary"]["used"]
    json.dumps(made)


def load_any_of(tok: Tokenizer) -> tokenizers.Tokenizer:
    return tok._encoder


def test_unreadable_pieces_are_counted_and_explained(tok: Tokenizer) -> None:
    text = "黑黑黄黄黄默" * 3
    made = report(tok, [Doc(text, "zh", "x")], {})["unreadable"]
    broken = [i for i in range(16, tok.vocab_size) if partial(tok.token_bytes(i))]
    assert made["ids"] == len(broken) >= 128 and made["single_bytes"] == 128
    ids = tok.encode(text)
    assert made["share_of_tokens"] == sum(i in broken for i in ids) / len(ids)
    assert all(row["uses"] == ids.count(row["id"]) for row in made["examples"])


@pytest.mark.parametrize(
    ("token", "parts", "meaning"),
    [
        ("e9bb", Partial(b"", "", b"\xe9\xbb"), "begins 黄 黑 (U+9EC0 to U+9EFF)"),
        ("20e4b8", Partial(b"", " ", b"\xe4\xb8"), "has ' ', begins 中 (U+4E00 to U+4E3F)"),
        ("84", Partial(b"\x84", "", b""), "ends 黄"),
        ("84e4b8ade9", Partial(b"\x84", "中", b"\xe9"), "ends 黄, has '中', begins 黄 黑 (U+9000 to U+9FFF)"),
        ("f0", Partial(b"", "", b"\xf0"), "begins (U+10000 to U+3FFFF)"),
        ("f4", Partial(b"", "", b"\xf4"), "begins (U+100000 to U+10FFFF)"),
        ("ff", Partial(b"\xff", "", b""), "ends a character: ff"),
    ],
)
def test_bytes_are_explained_by_the_characters_they_belong_to(token: str, parts: Partial, meaning: str) -> None:
    data = bytes.fromhex(token)
    assert partial(data) == parts
    assert explain(data, Counter("黄黄黑中")) == meaning


@given(st.text(CHARACTER, min_size=1, max_size=6), st.data())
def test_any_cut_of_a_text_is_whole_or_partial(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    start = data.draw(st.integers(0, len(raw) - 1))
    token = raw[start : data.draw(st.integers(start + 1, len(raw)))]
    parts = partial(token)
    if parts is None:
        assert token.decode() in text
    else:
        assert parts.end + parts.whole.encode() + parts.begin == token
        assert parts.whole in text
        if parts.begin:
            first, last = (int(h, 16) for h in explain(token, {}).split("(U+")[1].rstrip(")").split(" to U+"))
            assert any(first <= ord(c) <= last for c in text if c.encode().startswith(parts.begin))


@given(st.text(CHARACTER, max_size=30))
def test_the_tokens_shown_are_the_text(tok: Tokenizer, text: str) -> None:
    rows = describe(tok, text)
    assert b"".join(bytes.fromhex(row["bytes"]) for row in rows) == text.encode()
    assert [row["id"] for row in rows] == tok.encode(text)
    whole = "".join(row["text"] for row in rows if not row["part"])
    assert all(c in text for c in whole)
    assert all(("\ufffd" in row["text"]) == bool(row["part"]) for row in rows if "\ufffd" not in text)


def test_parts_of_characters_are_named(tok: Tokenizer) -> None:
    assert [row["part"] for row in describe(tok, "a🦜")][-1] == "byte 4 of 🦜"
    assert describe(tok, "a")[0] == {"id": 16 + ord("a"), "bytes": "61", "text": "a", "part": ""}


def test_the_overview_counts_every_id(tok: Tokenizer) -> None:
    made = overview(tok.with_tokens(["白鹭"]))
    assert sum(row["ids"] for row in made["groups"]) == made["vocab_size"] == 901
    assert made["groups"][-1] == {"what": "added afterwards", "ids": 1, "examples": ["白鹭"]}
    kinds = {row["what"] for row in made["groups"]}
    assert {"Latin letters", "several Han characters", "parts of characters", "white space"} <= kinds


# --- check -----------------------------------------------------------------------------------------------------------


def failures(path: Path) -> dict[str, str]:
    return {finding.name: finding.detail for finding in check_tokenizer(path) if not finding.ok}


def test_every_kind_of_ours_passes(tok: Tokenizer, bilingual: Texts, tmp_path: Path) -> None:
    kinds = {
        "bpe": tok,
        "added": tok.with_tokens(["黄鹂", "GPT-4"]),
        "char": train_tokenizer(bilingual(), 600, kind="char"),
        "bytes": Tokenizer([]),
    }
    for name, each in kinds.items():
        each.save(tmp_path / name, chat=name == "added")
        assert failures(tmp_path / name) == {}, name
    assert len(check_tokenizer(tmp_path / "bpe")) == len(tokcheck.CASES) + 10


def test_a_tokenizer_that_loses_things_is_found_out(tmp_path: Path) -> None:
    folder = lossy(tmp_path / "lossy", ["two orioles sing in the willow", "两个黄鹂鸣翠柳"])
    found = failures(folder)
    assert {"round trip: tabs", "round trip: line breaks", "round trip: emoji", "round trip: spaces"} <= set(found)
    assert "came back as '[UNK]" in found["round trip: spaces"]
    assert "not byte-level BPE" in found["form: Oriole's, which llama.cpp can load"]
    (folder / "tokenizer.json").rename(tmp_path / "other.json")
    assert set(failures(tmp_path / "other.json")) == set(found) - {"form: Oriole's, which llama.cpp can load"}


def test_each_question_can_be_answered_no(tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tok.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))

    (tmp_path / "config.json").write_text('{"vocab_size": 899}')
    assert "899 rows, the tokenizer 900 ids" in failures(tmp_path).pop("model: its embedding has a row for each id")
    (tmp_path / "config.json").write_text('{"vocab_size": 1024}')
    assert not failures(tmp_path)

    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|reserved_0|>"}))
    assert "reserved_0" in failures(tmp_path).pop("template: the file renders the same")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = tmp_path / "chat_template.jinja"
    text = template.read_text("utf-8")
    template.write_text(text.replace("<|im_end|>", "<|endoftext|>"))
    assert "not the template" in failures(tmp_path).pop("template: the file renders the same")
    template.unlink()
    assert "missing" in failures(tmp_path).pop("template: the file renders the same")
    template.write_text(text)

    whole = Detokenizer.feed
    with monkeypatch.context() as patch:  # one id at a time, as the earlier systems streamed
        patch.setattr(Detokenizer, "feed", lambda self, id: self._tokenizer.decode([id]))
        assert set(failures(tmp_path)) == {"streaming: whole characters only"}
    assert Detokenizer.feed is whole
    encode = Tokenizer.encode
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", lambda self, text: [2] if text == "<|im_end|>" else encode(self, text))
        assert set(failures(tmp_path)) == {"reserved ids: no text becomes one"}
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", lambda self, text: encode(self, text.replace("\r\n", "\n")))
        assert {"ids: the same as other readers of the file get"} <= set(failures(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "token_bytes", lambda self, id: b"a" if id == 300 else self._bytes[id])
        assert "id 300 spells b'a'" in failures(tmp_path)["ids: every one spells something of its own"]


def test_a_peer_that_truncates_and_pads_is_measured_whole(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path)
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    peer.enable_truncation(4)
    peer.enable_padding(length=4)
    peer.save(str(tmp_path / "tokenizer.json"))
    docs = [Doc("a", "en", "x"), Doc("two birds sing", "en", "x")]
    row = report(tok, docs, {"same": load_any(tmp_path)})["languages"]["en"]
    assert row["peers"]["same"]["tokens"] == row["tokens"]


def test_what_is_no_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer at .*nowhere"):
        load_any(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="not a tokenizer that"):
        load_any(tmp_path)
