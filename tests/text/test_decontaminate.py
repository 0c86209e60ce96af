"""A text that shares 13 tokens in a row with any string of an evaluation file is a hit; no other text is."""

import gzip
import json
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oriole.errors import DataError
from oriole.text import decontaminate, shingles
from oriole.text.decontaminate import Decontaminator
from oriole.text.shingles import tokens

EN = "A farmer has 17 sheep, and all but nine of them die; how many sheep are left?"
ZH = "小明有十七只羊，除了九只以外都死了，请问他还剩下多少只羊？"


def evaluation(folder: Path, *texts: str) -> Path:
    path = folder / "eval.jsonl"
    path.write_text("".join(json.dumps({"q": text}) + "\n" for text in texts))
    return path


def test_case_width_and_punctuation_do_not_hide_a_passage(tmp_path: Path) -> None:
    known = Decontaminator([evaluation(tmp_path, EN, ZH, "too short")])
    assert (known.strings, known.short) == (2, 1)
    assert len(known) == len(tokens(EN)) - 12 + len(tokens(ZH)) - 12
    assert known.hit(f"Riddle: {EN.upper()} Answer: 9") == EN[: EN.index(" many")].upper()
    assert known.hit("他说：小明 有 十七只羊 除了九只\n以外都死了。") == "小明 有 十七只羊 除了九只\n以外"
    twelve = " ".join(word for word, _, _ in tokens(EN)[:12])
    assert known.hit(twelve) is None
    assert known.hit(f"{twelve} something else") is None
    assert known.hit("too short") is None
    assert known.hit("") is None
    assert known.hits([EN, "clean", ZH[:20]])[1] is None
    assert pickle.loads(pickle.dumps(known)).hit(EN) == known.hit(EN)


def test_every_string_of_every_format_is_known(tmp_path: Path) -> None:
    def passage(n: int) -> str:
        return " ".join(f"word{n}x{k}" for k in range(13))

    nested = [{"choices": [{"text": passage(1)}, passage(2)], "meta": {"deep": [[passage(3)]]}, "n": 3, "none": None}]
    (tmp_path / "a.json").write_text(json.dumps(nested))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"messages": [{"content": passage(4)}]}).encode()))
    (tmp_path / "c.csv").write_text(f'question,answer\n"{passage(5)}\n, quoted",{passage(6)}\n')
    (tmp_path / "d.tsv").write_text(f"{passage(7)}\t{passage(8)}\n")
    (tmp_path / "e.txt").write_text(f"line\n{passage(9)[:40]}\n{passage(9)[40:]}\n")
    pq.write_table(pa.table({"anything": [passage(10)], "other": [[passage(11)]]}), tmp_path / "f.parquet")
    known = Decontaminator(sorted(tmp_path.iterdir()))
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 11):
        assert known.hit(f"before {passage(n)} after") == passage(n)
    assert known.hit(passage(9)[:40] + "\n" + passage(9)[40:])
    assert known.hit(passage(12)) is None


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("ab一二"), max_size=12).map(" ".join), max_size=4),
    st.lists(st.lists(st.sampled_from("ab一二"), max_size=20).map(" ".join), max_size=4),
    st.integers(1, 6),
)
def test_hits_are_those_of_a_search_through_all(known: list[str], texts: list[str], size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = Decontaminator([evaluation(Path(folder), "no", *known)], size)
    sought = {
        tuple(w for w, _, _ in tokens(text)[at : at + size])
        for text in [*known, "no"]
        for at in range(len(tokens(text)) - size + 1)
    }
    for text, hit in zip(texts, found.hits(texts), strict=True):
        words = tokens(text)
        expected = next(
            (
                text[words[at][1] : words[at + size - 1][2]]
                for at in range(len(words) - size + 1)
                if tuple(w for w, _, _ in words[at : at + size]) in sought
            ),
            None,
        )
        assert hit == expected == found.hit(text)


def test_equal_hashes_of_different_words_are_no_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shingles, "_mixed", lambda hashes: np.full_like(hashes, 7))  # everything collides
    known = Decontaminator([evaluation(tmp_path, EN)])
    assert len(known) == 1
    assert known.hit(ZH) is None
    assert known.hit("one two three four five six seven eight nine ten eleven twelve thirteen") is None
    assert known.hit(EN) is not None


def test_a_passage_far_inside_a_very_long_text_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shingles, decontaminate):
        monkeypatch.setattr(module, "LONGEST", 1000)
    monkeypatch.setattr(decontaminate, "OVERLAP", 200)
    known = Decontaminator([evaluation(tmp_path, EN)])
    for begin in range(0, 4000, 97):
        text = "x " * (begin // 2) + EN + " y" * 700
        assert known.hit(text) == EN[: EN.index(" many")]
    assert known.hit("x y " * 2000) is None
    late = Decontaminator([evaluation(tmp_path, "x " * 1400 + EN)])
    assert late.hit(EN) is not None


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        Decontaminator([tmp_path / "missing.jsonl"])
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2"):
        Decontaminator([tmp_path / "bad.jsonl"])
    assert Decontaminator([]).hit(EN) is None
