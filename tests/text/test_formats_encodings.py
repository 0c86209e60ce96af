"""Old encodings are told from the bytes, read and reported; single bad bytes are bad lines, not another encoding."""

import codecs
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oriole.errors import DataError
from oriole.text import files
from oriole.text.encodings import detect
from oriole.text.formats import Skipped, read_chats, read_docs

SIMPLIFIED = "今天的天气很好，我们一起去河边散步。", "请问这本书多少钱？", "老师说明天不上课", "谢谢你们的帮助！"
TRADITIONAL = "今天的天氣很好，我們一起去河邊散步。", "請問這本書多少錢？", "老師說明天不上課", "謝謝你們的幫助！"
FRENCH = "Le café était fermé à cause de la fête, mais le maître a laissé la clé derrière l'hôtel."
LINE = '{{"text": "{}"}}\n'
CASES = [
    *((text, "gb18030") for text in SIMPLIFIED),
    *((text, "gb2312") for text in SIMPLIFIED),
    *((text, "cp950") for text in TRADITIONAL),
    *((text, "utf-16") for text in (*SIMPLIFIED, FRENCH)),
    *((text, "utf-16-le") for text in (*SIMPLIFIED, FRENCH)),
    *((text, "utf-16-be") for text in (*SIMPLIFIED, FRENCH)),
    *((text, "utf-32") for text in SIMPLIFIED),
    (FRENCH, "cp1252"),
]


@pytest.mark.parametrize(("text", "encoding"), CASES)
def test_short_texts_in_old_encodings(tmp_path: Path, text: str, encoding: str) -> None:
    files.report.cache_clear()
    path = tmp_path / "d.jsonl"
    path.write_bytes(LINE.format(text).encode(encoding))
    skipped = Skipped()
    assert [doc.text for doc in read_docs(path, skip_bad=skipped)] == [text]
    assert skipped.total == 0 and list(skipped.converted) == [str(path)]


def test_a_conversion_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "d.tsv"
    path.write_bytes("店里几点开门？\t早上九点。\n".encode("gb18030"))
    for _ in range(3):
        (chat,) = read_chats(path)
        assert chat.messages[1].content == "早上九点。"
    assert capfd.readouterr().err.count("is GB18030 (GBK), not UTF-8; read as that") == 1


@pytest.mark.parametrize("encoding", ["gb18030", "cp950"])
def test_the_first_old_bytes_may_come_late(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "d.jsonl"
    text = TRADITIONAL[0] if encoding == "cp950" else SIMPLIFIED[0]
    plain = '{"text": "plain"}\n' * 150_000
    path.write_bytes((plain + LINE.format(text) * 3).encode(encoding))
    assert path.stat().st_size > 2 * files._CHUNK
    docs = [doc.text for doc in read_docs(path)]
    assert docs[-3:] == [text] * 3 and len(docs) == 150_003


@pytest.mark.parametrize("encoding", ["gb18030", "cp950"])
def test_bad_bytes_in_an_old_encoding_are_bad_lines(tmp_path: Path, encoding: str) -> None:
    text = TRADITIONAL[0] if encoding == "cp950" else SIMPLIFIED[0]
    path = tmp_path / "d.jsonl"
    line = LINE.format(text).encode(encoding)
    path.write_bytes(line * 5 + b'{"text": "\xff\xff"}\n' + line * 5)
    skipped = Skipped()
    assert [doc.text for doc in read_docs(path, skip_bad=skipped)] == [text] * 10
    assert skipped.total == 1 and "line 6: not UTF-8" in skipped.examples[0] and skipped.converted


@pytest.mark.parametrize(
    "bad", [b"\xff", b"\xe9", b"\xe4\xb8", b"\xc0\x80", b"\x80\x80\x80", "几".encode("gb18030"), "é".encode("latin-1")]
)
def test_single_bad_bytes_in_utf8_are_bad_lines(tmp_path: Path, bad: bytes) -> None:
    good = LINE.format(SIMPLIFIED[0]).encode()
    path = tmp_path / "d.jsonl"
    path.write_bytes(good * 3 + b'{"text": "' + bad + b'"}\n' + good)
    skipped = Skipped()
    assert [doc.text for doc in read_docs(path, skip_bad=skipped)] == [SIMPLIFIED[0]] * 4
    assert skipped.total == 1 and "line 4: not UTF-8" in skipped.examples[0] and not skipped.converted


def test_what_nothing_explains_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(bytes(range(128, 256)) * 20 + b"\nplain\n")
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        list(read_docs(path))
    assert detect(b"one stray \xe9 in a long English sentence without any other") is None
    for text, encoding in (
        ("안녕하세요 여러분 오늘은 날씨가 좋습니다", "euc-kr"),
        ("こんにちは、今日はいい天気ですね。ありがとう", "euc-jp"),
    ):
        assert detect(text.encode(encoding)) is None


def test_english_utf8_with_signs_is_utf8() -> None:
    for text in ("It is 20 °C · sunny — naïve café", "привет всем", "é", "“quoted” – and €5"):
        assert detect(text.encode()) == "utf-8"


@given(text=st.text(min_size=0, max_size=60), pad=st.integers(0, 40))
@settings(max_examples=150)
def test_utf8_is_never_taken_for_anything_else(text: str, pad: int) -> None:
    raw = ("a" * pad + text.replace("\0", "")).encode("utf-8", "ignore")
    if not raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        assert detect(raw) == "utf-8" == detect(raw[: len(raw) - 1] if raw[-1:] >= b"\x80" else raw)
