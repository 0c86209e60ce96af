"""Packing: the shards are those a single process would write, whoever makes them and however often it is killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oriole.errors import ConfigError, DataError
from oriole.text.clean import normalise
from oriole.text.formats import read_chats, read_docs
from oriole.text.kinds import find_kind
from oriole.text.mixture import Mixture
from oriole.text.pack import PackConfig, pack
from oriole.text.shards import Shards, View, held_out, write_shards
from oriole.text.template import render
from oriole.text.tokenizer import END_OF_TEXT, Tokenizer

Text = Callable[..., list[tuple[str, str]]]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def write_data(folder: Path, bilingual: Text, files: int = 4, lines: int = 100) -> None:
    """`files` files of running text, of two languages and three sources, and one file of chats."""
    for n in range(files):
        texts = bilingual(lines, seed=n)
        write_jsonl(
            folder / f"part_{n}.jsonl", [{"text": t, "source": f"{lang}{i % 3}"} for i, (lang, t) in enumerate(texts)]
        )
    pairs = bilingual(30, seed=99)
    write_jsonl(
        folder / "talk.jsonl", [{"question": q, "answer": a, "source": lang} for lang, q in pairs for a in "好y"]
    )


@pytest.fixture
def data(tmp_path: Path, bilingual: Text) -> Path:
    write_data(tmp_path / "data", bilingual)
    return tmp_path / "data"


@pytest.fixture
def tokenizer(tmp_path: Path, tok: Tokenizer) -> Path:
    tok.save(tmp_path / "tok")
    return tmp_path / "tok"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a packed folder but its own notes."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and ".done" not in p.relative_to(folder).parts
    }


def rows(shards: Shards) -> list[tuple[list[int], list[int], str, str]]:
    return [(*(a.tolist() for a in shards.doc(i)), shards.source(i), shards.lang(i)) for i in range(len(shards))]


def test_documents_chats_sources_and_languages_are_kept(data: Path, tokenizer: Path, tok: Tokenizer) -> None:
    out = data.parent / "packed"
    made = pack([data], out, PackConfig(tokenizer=tokenizer, workers=1))
    expected, heldout = [], []
    for n in range(4):
        for doc in read_docs(data / f"part_{n}.jsonl"):
            text = normalise(doc.text)
            ids = [*tok.encode(text), END_OF_TEXT]
            row = (ids, [1] * len(ids), doc.source, doc.source[:2])
            (heldout if held_out(text, 0.005) else expected).append(row)
    for chat in read_chats(data / "talk.jsonl"):
        key = "\x00".join(m.content for m in chat.messages)
        row = (*render(chat.messages, tok), chat.source, chat.source)
        (heldout if held_out(key, 0.005) else expected).append(row)
    shards = Shards.open(out)
    assert rows(shards) == expected
    assert heldout and rows(Shards.open(out / "heldout")) == heldout
    assert shards.trained_tokens == sum(sum(r[1]) for r in expected) == made["trained_tokens"]
    assert shards.num_tokens == sum(len(r[0]) for r in expected) == made["tokens"]
    assert made["documents"] == len(expected) and made["heldout"]["documents"] == len(heldout)
    assert [f["kind"] for f in made["files"]] == ["text"] * 4 + ["chat"]
    assert shards.sources == ("en0", "zh1", "en2", "zh0", "en1", "zh2", "en", "zh")
    assert shards.lengths.tolist() == [len(r[0]) for r in expected]
    assert Tokenizer.load(out / "tokenizer").fingerprint() == tok.fingerprint() == shards.tokenizer


def test_a_packed_folder_equals_one_written_at_once(data: Path, tokenizer: Path, tok: Tokenizer) -> None:
    pack([data], data.parent / "packed", PackConfig(tokenizer=tokenizer, workers=1))
    shards = Shards.open(data.parent / "packed")
    one = write_shards(((*shards.doc(i), shards.source(i)) for i in range(len(shards))), tok, data.parent / "one")
    assert len(one) == len(shards) and one.lengths.tolist() == shards.lengths.tolist()
    assert one.sources == shards.sources and one.source_ids.tolist() == shards.source_ids.tolist()
    for i in (0, 99, 100, 399, 400, len(one) - 1):
        assert [a.tolist() for a in one.doc(i)] == [a.tolist() for a in shards.doc(i)]
    for i in (-1, len(one)):
        with pytest.raises(IndexError):
            shards.doc(i)
    assert np.concatenate([ids for ids, _, _ in shards.runs()]).tolist() == next(one.runs())[0].tolist()


def test_weights_of_sources_and_languages_hold_in_a_mixture(data: Path, tokenizer: Path) -> None:
    pack([data], data.parent / "packed", PackConfig(tokenizer=tokenizer, workers=1))
    shards = Shards.open(data.parent / "packed")
    assert shards.where(lang="fr").size == shards.where(source="none").size == 0
    some = shards.where(source="zh1", lang="zh")
    assert some.size and all(shards.source(i) == "zh1" and shards.lang(i) == "zh" for i in some)
    assert shards.where(lang="zh").size + shards.where(lang="en").size == len(shards)
    parts = {"zh": View(shards, shards.where(lang="zh")), "en2": View(shards, shards.where(source="en2"))}
    mixture = Mixture(parts, {"zh": 3, "en2": 1}, seed=0)
    tokens: Counter[str] = Counter()
    text_of = {shards.doc(i)[0].tobytes(): shards.lang(i) for i in range(len(shards))}
    for _ in range(2000):
        ids, _ = next(mixture)
        tokens[text_of[ids.tobytes()]] += len(ids)
    assert tokens["zh"] / sum(tokens.values()) == pytest.approx(0.75, abs=0.01)


def test_the_result_is_the_same_from_one_process_and_from_many_and_made_once(data: Path, tokenizer: Path) -> None:
    one, many = data.parent / "one", data.parent / "many"
    made = pack([data], one, PackConfig(tokenizer=tokenizer, workers=1))
    assert pack([data], many, PackConfig(tokenizer=tokenizer, workers=3)) == made
    assert contents(one) == contents(many)
    before = {p: p.stat().st_mtime_ns for p in one.rglob("tokens.bin")}
    assert pack([data], one, PackConfig(tokenizer=tokenizer, workers=2)) == made
    assert {p: p.stat().st_mtime_ns for p in one.rglob("tokens.bin")} == before


def test_only_what_has_changed_is_made_again(data: Path, tokenizer: Path) -> None:
    out = data.parent / "packed"
    config = PackConfig(tokenizer=tokenizer, workers=1)
    pack([data], out, config)
    before = {p.parent.name: p.stat().st_mtime_ns for p in out.glob("*/tokens.bin")}
    write_jsonl(data / "part_1.jsonl", [{"text": "新的一篇。", "source": "new"}])
    (data / "part_2.jsonl").unlink()
    write_jsonl(data / "part_9.jsonl", [{"text": "One more.", "source": "more"}])
    shutil.rmtree(out / "part_3")
    pack([data], out, config)
    after = {p.parent.name: p.stat().st_mtime_ns for p in out.glob("*/tokens.bin")}
    assert {name for name in after if after[name] == before.get(name)} == {"part_0", "talk"}
    assert sorted(after) == ["part_0", "part_1", "part_3", "part_9", "talk"]
    fresh = data.parent / "fresh"
    pack([data], fresh, config)
    assert contents(out) == contents(fresh)


def test_held_out_files_of_a_cleaned_folder_stay_apart(data: Path, tokenizer: Path, bilingual: Text) -> None:
    clean = data.parent / "clean"
    write_data(clean, bilingual, files=1)
    write_jsonl(clean / "heldout" / "part_0.jsonl", [{"text": "Kept apart."}])
    write_jsonl(clean / ".done" / "heldout" / "part_0.jsonl", [{"text": "Working state."}])
    (clean / "report.json").write_text('{"rules": {}}')
    (clean / "report.html").write_text("<html><body><p>What was dropped, and why.</p></body></html>")
    out = data.parent / "packed"
    made = pack([clean], out, PackConfig(tokenizer=tokenizer, workers=1))
    assert made["documents"] == 200 + 120 and made["heldout"]["documents"] == 1
    assert "Kept apart." not in [r[0] for r in rows(Shards.open(out))]
    with pytest.raises(ConfigError, match="leave out heldout="):
        pack([clean], out, PackConfig(tokenizer=tokenizer, heldout=0.1))
    # a held-out file that is named itself is data like any other
    alone = pack([clean / "heldout"], data.parent / "val", PackConfig(tokenizer=tokenizer, heldout=0))
    assert alone["documents"] == 1


def test_namesakes_get_folders_of_their_own(tmp_path: Path, tokenizer: Path) -> None:
    for folder, text in (("a", "first"), ("b", "second")):
        write_jsonl(tmp_path / folder / "tokenizer.jsonl", [{"text": text}])
    out = tmp_path / "packed"
    made = pack([tmp_path / "a", tmp_path / "b"], out, PackConfig(tokenizer=tokenizer, heldout=0))
    assert [f["name"] for f in made["files"]] == ["tokenizer-2", "tokenizer-3"]
    assert len(Shards.open(out)) == 2


def test_the_pages_of_a_folder_are_packed_together(tmp_path: Path, tokenizer: Path) -> None:
    for n in range(30):
        (tmp_path / "pages" / f"{n % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "pages" / f"{n % 2}" / f"{n}.txt").write_text(f"Page {n}.")
    write_jsonl(tmp_path / "pages" / "1" / "5.jsonl", [{"text": "a file of its own"}])
    made = pack([tmp_path / "pages"], tmp_path / "packed", PackConfig(tokenizer=tokenizer, heldout=0, workers=1))
    assert [(f["name"], f["train"]["documents"]) for f in made["files"]] == [("0", 15), ("1", 12), ("5", 1), ("1-2", 3)]
    assert len(Shards.open(tmp_path / "packed")) == 31


def test_bad_records_stop_the_work_or_are_counted(data: Path, tokenizer: Path) -> None:
    out = data.parent / "packed"
    with (data / "part_2.jsonl").open("a") as file:
        file.write('{"txet": 1}\n')
    with pytest.raises(DataError, match=r"part_2\.jsonl, line 201: .*did you mean 'text'"):
        pack([data], out, PackConfig(tokenizer=tokenizer, workers=2))
    with pytest.raises(DataError, match="no token shards"):
        Shards.open(out)
    made = pack([data], out, PackConfig(tokenizer=tokenizer, skip_bad=True, workers=2))
    assert made["skipped"] == 1 and "line 201" in made["examples"][0]
    assert pack([data], out, PackConfig(tokenizer=tokenizer, skip_bad=True)) == made  # remembered, not read again


def test_kinds_are_found_and_mistakes_named(data: Path, tokenizer: Path) -> None:
    assert find_kind(data / "part_0.jsonl") == "text" and find_kind(data / "talk.jsonl") == "chat"
    write_jsonl(data / "odd.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match=r"neither running text nor chats nor preferences: .*odd\.jsonl, line 1"):
        find_kind(data / "odd.jsonl")
    write_jsonl(data / "pref.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    write_jsonl(data / "label.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    assert find_kind(data / "pref.jsonl") == "preference" and find_kind(data / "label.jsonl") == "feedback"
    (data / "qa.txt").write_text("问：你好？\n答：你好！\n\n问：再见？\n答：再见！\n", encoding="utf-8")
    (data / "prose.txt").write_text("春天来了。\n", encoding="utf-8")
    assert find_kind(data / "qa.txt") == "chat" and find_kind(data / "prose.txt") == "text"
    with pytest.raises(DataError, match=r"pref.jsonl holds preference records; shards are made of"):
        pack([data / "pref.jsonl"], data.parent / "pref", PackConfig(tokenizer=tokenizer))
    write_jsonl(data.parent / "other" / "x.jsonl", [{"text": "x"}])
    config = PackConfig(tokenizer=tokenizer, workers=1)
    with pytest.raises(DataError, match="was not made by oriole data pack"):
        pack([data / "part_0.jsonl"], data.parent / "other", config)
    write_jsonl(data / "blank.jsonl", [{"text": "  "}])
    with pytest.raises(DataError, match="the 1 input files hold no document"):
        pack([data / "blank.jsonl"], data.parent / "blank", config)


def test_a_part_that_changed_after_packing_is_refused(data: Path, tokenizer: Path) -> None:
    config = PackConfig(tokenizer=tokenizer, workers=1)
    pack([data], data.parent / "a", config)
    write_jsonl(data / "part_1.jsonl", [{"text": "x"}])
    pack([data], data.parent / "b", config)
    shutil.rmtree(data.parent / "a" / "part_1")
    (data.parent / "b" / "part_1").rename(data.parent / "a" / "part_1")
    with pytest.raises(DataError, match=r"part_1 has changed since .*a was packed; run oriole data pack again"):
        Shards.open(data.parent / "a")


# --- killed ----------------------------------------------------------------------------------------------------------

PACK = """
import sys
from pathlib import Path
from oriole.text.kinds import find_kind
from oriole.text.pack import PackConfig, pack

if __name__ == "__main__":
    pack([sys.argv[1]], Path(sys.argv[2]), PackConfig(tokenizer=sys.argv[3], workers=2))
"""


def killed_and_resumed(folder: Path, bilingual: Text, tokenizer: Path, kills: int, seed: int) -> None:
    """Kill the work at random moments, each time after a little more has been done, and let it end at last."""
    data, whole, out = folder / "data", folder / "whole", folder / "packed"
    write_data(data, bilingual, files=10, lines=1500)
    script = folder / "pack.py"
    script.write_text(PACK)
    pack([data], whole, PackConfig(tokenizer=tokenizer, workers=1))
    rng = random.Random(seed)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(script), str(data), str(out), str(tokenizer)], cwd=folder)

    landed = 0
    for kill in range(kills):
        process = start()
        notes = len(list((out / ".done").glob("*.json")))
        # Each kill waits for about its share of the notes, then for a random moment within a file's work.
        while process.poll() is None and notes < 11 * kill // (kills + 1):
            time.sleep(0.005)
            notes = len(list((out / ".done").glob("*.json")))
        while process.poll() is None and not (out / ".done" / ".lock").exists():
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        landed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert landed >= kills // 2
    assert start().wait() == 0
    assert contents(out) == contents(whole)
    assert not list(out.rglob("*.part"))


def test_killed_three_times_the_end_is_the_same(tmp_path: Path, bilingual: Text, tokenizer: Path) -> None:
    killed_and_resumed(tmp_path, bilingual, tokenizer, kills=3, seed=os.getpid())


@pytest.mark.soak
def test_killed_twenty_times_the_end_is_the_same(tmp_path: Path, bilingual: Text, tokenizer: Path) -> None:
    killed_and_resumed(tmp_path, bilingual, tokenizer, kills=20, seed=os.getpid())
