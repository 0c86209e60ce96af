"""What `oriole data inspect` says is what lies in the data: recounted here from the text itself."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from oriole.apps.inspect import InspectConfig, record_dict, spans
from oriole.apps.inspectpage import page, write_page
from oriole.apps.inspecttext import bar, percent, shortened, show
from oriole.cli.inspection import inspect
from oriole.errors import DataError
from oriole.text.census import census, histogram
from oriole.text.clean import normalise
from oriole.text.mixture import Mixture
from oriole.text.pack import PackConfig, pack
from oriole.text.shards import Shards, write_shards
from oriole.text.template import Chat, Message, render
from oriole.text.tokenizer import Tokenizer, train_tokenizer
from oriole.train.batch import IGNORE, Packer

ZH = "春天来了，柳树发芽，两只黄鹂在枝头唱歌。"
EN = "Two orioles sing in the willow, and the children fly kites by the river. "


def texts(n: int) -> list[tuple[str, str, str]]:
    """(language, source, text) of `n` documents of growing length."""
    return [("zh", "poem", f"{i}：{ZH * (1 + i % 7)}") if i % 3 else ("en", "tale", EN * (1 + i % 5)) for i in range(n)]


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return train_tokenizer([(lang, text) for lang, _, text in texts(200)], vocab_size=330)


@pytest.fixture
def folder(tmp_path: Path, tok: Tokenizer) -> Path:
    """Files of text and of chats, one of them with faults, and a tokenizer."""
    tok.save(tmp_path / "tok")
    data = tmp_path / "data"
    data.mkdir()
    write(data / "text.jsonl", [{"text": t, "source": s, "lang": lang} for lang, s, t in texts(90)])
    chats: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"{ZH}{i}"}, {"role": "assistant", "content": EN}]} for i in range(30)
    ]
    chats[3]["messages"] *= 2
    write(data / "chat.jsonl", [*chats, {"messages": "none"}])
    return tmp_path


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def shown(made: dict[str, Any], width: int = 120) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), highlight=False)
    with console.file:
        show(made, console)
        return console.export_text()


def test_counts_are_those_of_the_text(tok: Tokenizer, folder: Path) -> None:
    pack([folder / "data" / "text.jsonl"], folder / "packed", PackConfig(tokenizer=folder / "tok", heldout=0))
    made = inspect(folder / "packed", InspectConfig(length=64))
    expected: dict[tuple[str, str], Counter[str]] = {}
    lengths = []
    for lang, source, text in texts(90):
        text = normalise(text)
        lengths.append(len(tok.encode(text)) + 1)
        counts = {"documents": 1, "characters": len(text), "bytes": len(text.encode()), "tokens": lengths[-1]}
        expected.setdefault((source, lang), Counter()).update(counts | {"trained_tokens": lengths[-1]})
    (part,) = made["parts"]
    assert {(row.pop("source"), row.pop("lang")): row for row in part["sources"]} == expected
    assert part["total"] == sum(expected.values(), Counter())
    assert part["lengths"]["longest"] == max(lengths) and part["lengths"]["median"] == int(np.median(lengths))
    assert part["truncation"]["documents"] == sum(n > 64 for n in lengths)
    assert part["truncation"]["lost"] == sum(max(0, n - 64) for n in lengths)
    for step in part["lengths"]["histogram"]:
        inside = [n for n in lengths if step["from"] <= n <= step["to"]]
        assert (step["documents"], step["tokens"]) == (len(inside), sum(inside))


def test_counting_in_small_pieces_changes_nothing(
    tok: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack([folder / "data"], folder / "packed", PackConfig(tokenizer=folder / "tok", skip_bad=True))
    shards = Shards.open(folder / "packed")
    whole = census(shards, tok, 64)
    monkeypatch.setattr("oriole.text.census.CHUNK", 100)
    assert census(shards, tok, 64) == whole
    other = train_tokenizer([("en", EN), ("zh", ZH)], vocab_size=290)
    with pytest.raises(DataError, match=r"made with another tokenizer; name it: tokenizer=DIR"):
        census(shards, other, 64)


def test_a_batch_is_the_one_that_training_sees(tok: Tokenizer, folder: Path) -> None:
    pack([folder / "data"], folder / "packed", PackConfig(tokenizer=folder / "tok", skip_bad=True))
    batch = inspect(folder / "packed", InspectConfig(length=128, batch_size=4, rows=4, seed=5))["batch"]
    packer = Packer(Mixture({"": Shards.open(folder / "packed")}, {"": 1}, 5, length=128), 4, 128)
    batches = [next(packer) for _ in range(16)]
    places = 16 * 4 * 128
    assert batch["fill"] == sum(int((b.doc >= 0).sum()) for b in batches) / places
    assert batch["trained"] == sum(int((b.targets != IGNORE).sum()) for b in batches) / places
    assert batch["documents_per_row"] == sum(int(b.doc[r].max()) + 1 for b in batches for r in range(4)) / 64
    assert [row["row"] for row in batch["rows"]] == [0, 1, 2, 3]
    for row in batch["rows"]:
        r = row["row"]
        assert row["padding"] == int((batches[0].doc[r] < 0).sum())
        assert sum(d["trained_tokens"] for d in row["documents"]) == int((batches[0].targets[r] != IGNORE).sum())
        for n, document in enumerate(row["documents"]):
            pos = batches[0].pos[r][batches[0].doc[r] == n].tolist()
            here = batches[0].doc[r] == n
            ids, last = batches[0].tokens[r][here].tolist(), int(batches[0].targets[r][here][-1])
            text = tok.decode([*ids, last] if last != IGNORE else ids, skip_special=False)
            assert len("".join(run for _, run in document["spans"])) == len(text)
            assert (document["from"], document["to"], document["tokens"]) == (pos[0], pos[-1], len(pos))


def test_the_coloured_mask_is_the_templates(tok: Tokenizer) -> None:
    ids, mask = render((Message("user", "Hello?"), Message("assistant", "Yes.\nHi.")), tok)
    assert spans(ids, mask, tok) == [
        ("mark", "<|im_start|>"), ("context", "user\nHello?"), ("mark", "<|im_end|>"), ("context", "\n"),
        ("mark", "<|im_start|>"), ("context", "assistant\n"), ("trained", "Yes.\nHi."), ("trained mark", "<|im_end|>"),
        ("context", "\n"),
    ]  # fmt: skip


def test_files_are_described_by_kind_with_and_without_a_tokenizer(folder: Path) -> None:
    made = inspect(folder / "data", InspectConfig(samples=2))
    chat, text = made["parts"]
    assert (chat["kind"], text["kind"], made["tokenizer"], made["batch"]) == ("chat", "text", None, None)
    assert chat["total"]["documents"] == 30 and chat["skipped"]["total"] == 1
    assert chat["validation"]["sound"] == 29
    assert set(chat["validation"]["problems"]) == {"message … says the same as message …"}
    assert text["total"]["bytes"] == sum(len(t.encode()) for _, _, t in texts(90))
    assert [s["source"] for s in text["samples"]] == ["tale", "poem"]  # one of each source

    counted = inspect(folder / "data", InspectConfig(tokenizer=folder / "tok", length=64, rows=1))
    assert counted["parts"][0]["total"]["tokens"] > 0 and counted["batch"]["rows"]
    assert counted["parts"][0]["validation"] == chat["validation"]
    assert inspect(folder / "data" / "text.jsonl", InspectConfig(limit=7))["parts"][0]["total"]["documents"] == 7


def test_preferences_feedback_and_unknown_files(folder: Path) -> None:
    data = folder / "other"
    data.mkdir()
    write(data / "pref.jsonl", [{"prompt": "a?", "chosen": "b", "rejected": "c"}])
    write(data / "kto.jsonl", [{"prompt": "a?", "completion": "b", "label": False}])
    write(data / "odd.jsonl", [{"x": 1}])
    made = inspect(data, InspectConfig(tokenizer=folder / "tok"))
    assert [p["kind"] for p in made["parts"]] == ["feedback", "preference"]
    assert made["parts"][1]["samples"][0]["rejected"] == [{"role": "assistant", "content": "c"}]
    assert made["parts"][0]["samples"][0]["label"] is False
    (unread,) = made["unread"]
    assert "odd.jsonl, line 1" in unread and "odd.jsonl" in shown(made)
    (data / "pref.jsonl").unlink()
    (data / "kto.jsonl").unlink()
    with pytest.raises(DataError, match=r"odd\.jsonl, line 1"):
        inspect(data, InspectConfig())


def test_shards_without_their_tokenizer_ask_for_it(tok: Tokenizer, folder: Path) -> None:
    alone = folder / "a" / "b" / "shards"
    write_shards([([20, 21, 0], None, "s")], tok, alone)
    with pytest.raises(DataError, match=r"no tokenizer in or above .*tokenizer=DIR"):
        inspect(alone, InspectConfig())
    made = inspect(alone, InspectConfig(tokenizer=folder / "tok", rows=0))
    assert made["parts"][0]["total"]["tokens"] == 3 and made["batch"] is None


def test_the_terminal_shows_figures_and_text(folder: Path) -> None:
    pack([folder / "data"], folder / "packed", PackConfig(tokenizer=folder / "tok", skip_bad=True, heldout=0))
    made = inspect(folder / "packed", InspectConfig(length=96, batch_size=2))
    said = shown(made)
    for part in ("120 documents", "poem", "tale", "bytes/token", "are longer than length=96", "<|im_start|>user⏎春天"):
        assert part in said
    assert re.search(r"document 1 · positions 0–\d+ · \d+ of \d+ trained", said)
    assert all(len(line) <= 80 for line in shown(made, width=80).splitlines())


def test_the_page_needs_nothing_and_escapes_all(folder: Path) -> None:
    write(folder / "data" / "bad.jsonl", [{"text": "<script>alert(1)</script> & <b>", "source": "<i>x"}])
    made = inspect(folder / "data", InspectConfig(tokenizer=folder / "tok", length=64))
    write_page(made, folder / "out" / "page.html")
    html = (folder / "out" / "page.html").read_text(encoding="utf-8")
    assert html == page(made)
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in html
    assert "<i>x" not in html and not re.search(r"(src|href)=\"(?!#)", html)
    assert 'class="t"' in html and 'class="m t"' in html and 'class="strip"' in html
    assert json.loads(json.dumps(made)) == json.loads(json.dumps(made, sort_keys=True))


def test_small_things() -> None:
    assert [percent(x) for x in (0, 0.004, 0.0994, 0.0996, 1)] == ["0 %", "0.4 %", "9.9 %", "10 %", "100 %"]
    assert bar(0.5, 4) == "██" and bar(0, 4) == "" and bar(1 / 32, 4) == "▏"
    long = [("a", "x" * 500), ("b", "y" * 500)]
    cut = shortened(long, 90)
    assert cut == [("a", "x" * 60), ("cut", " … 910 characters … "), ("b", "y" * 30)]
    assert shortened([("a", "short")], 90) == [("a", "short")]
    assert (
        "".join(t for k, t in shortened([("a", "0123456789" * 20)], 60) if k == "a")
        == "0123456789" * 4 + "0123456789" * 2
    )
    assert histogram(np.array([1, 3, 8])) == [
        {"from": 1, "to": 1, "documents": 1, "tokens": 1}, {"from": 2, "to": 3, "documents": 1, "tokens": 3},
        {"from": 4, "to": 7, "documents": 0, "tokens": 0}, {"from": 8, "to": 15, "documents": 1, "tokens": 8},
    ]  # fmt: skip
    calls = record_dict(Chat((Message("user", "a"), Message("assistant", "b"))))
    assert calls == {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
