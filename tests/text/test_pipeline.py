"""`oriole data clean` as a whole: what stays and what goes, that the counts add up, and that it may be killed."""

import bz2
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import zstandard

from oriole.errors import ConfigError, DataError
from oriole.text import cleanreport, pipeline, shingles
from oriole.text.cleansteps import clean_input
from oriole.text.decontaminate import Decontaminator
from oriole.text.formats import read_chats, read_docs, read_preferences
from oriole.text.pipeline import CleanConfig, clean, read_config
from oriole.text.tally import Samples, difference, merge_samples

Record = dict[str, Any]

EN = (
    "the oriole sings in a green willow near our old stone bridge and two small boats drift slowly down river while "
    "children count every yellow leaf that falls into cold clear water before winter comes have with from they were "
    "about many people think this place is quiet but when spring returns farmers open doors plant rice walk along "
    "narrow roads carry baskets talk of weather market prices letters family news music school roof garden kitchen "
    "the of and to in is that it for was with as on are this by from not or at"  # so many that py3langid is not asked
).split()
ZH = (
    "春风 吹过 小河 孩子 们 数着 落下 的 叶子 老师 说 今天 天气 很好 我们 一起 去 公园 看花 听鸟 唱歌 在 桥边 有 "
    "一位 老人 是 邻居 他 每天 早上 都 来 这里 散步 和 朋友 谈论 农田 市场 水稻 价格 年轻人 喜欢 音乐 电影 还有 远方 "
    "城市 生活 然而 到了 冬天 大雪 覆盖 山路 村子 变得 安静 人们 围着 火炉 讲 古老 故事 窗外 星星 明亮 月光 照亮 屋顶"
).split()


def english(rng: random.Random, sentences: int = 9) -> str:
    """Prose that passes the published rules."""
    return " ".join(" ".join(rng.choices(EN, k=14)).capitalize() + "." for _ in range(sentences))


def chinese(rng: random.Random, sentences: int = 14) -> str:
    """The same in Chinese."""
    return "".join(
        "".join(rng.choices(ZH, k=6)) + "，" + "".join(rng.choices(ZH, k=6)) + "。" for _ in range(sentences)
    )


def write(path: Path, records: list[Record]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def corpus(folder: Path, files: int = 2, documents: int = 40, seed: int = 0) -> Path:
    """`files` of each language; the last documents of each repeat the first of the one before, some with an edit."""
    for lang, make in (("zh", chinese), ("en", english)):
        before: list[str] = []
        for n in range(files):
            rng = random.Random(f"{seed} {lang} {n}")
            texts = [make(rng) for _ in range(documents)]
            texts += [text if i % 2 else text[:100] + "x" + text[101:] for i, text in enumerate(before[:6])]
            write(folder / f"{lang}_{n}.jsonl", [{"text": text, "source": f"{lang}-source"} for text in texts])
            before = texts
    return folder


def config(**keys: Any) -> CleanConfig:
    return CleanConfig.model_validate({"workers": 1, **keys})


def rows(folder: Path) -> list[Record]:
    return [{"text": d.text, "lang": d.lang, "source": d.source} for d in read_docs(sorted(folder.glob("*.jsonl.zst")))]


def files(folder: Path) -> dict[str, bytes]:
    """Everything a user sees of the result."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".done" not in path.parts
    }


# --- what it does ----------------------------------------------------------------------------------------------------


def test_what_stays_and_what_goes(tmp_path: Path) -> None:
    rng = random.Random(1)
    zh, en, longer, exam = chinese(rng), english(rng), english(rng, 20), english(rng, 3)
    question = " ".join(exam.split()[:20])
    twin = longer[:50] + "Q" + longer[51:]
    short = {"text": "short", "lang": "en"}  # by itself it would be of a language that cannot be told
    write(tmp_path / "a.jsonl", [{"text": zh}, {"text": f"{twin[:-30]}."}, short, {"text": f"{en[:200]}"}])
    more = [{"text": f"  {zh}\r\n"}, {"text": longer}, {"text": f"{en} {question} {en[:90]}."}]
    write(tmp_path / "b.jsonl", more)
    evaluation = write(tmp_path / "exam.jsonl", [{"question": question, "answer": "A"}])
    out = tmp_path / "out"
    report = clean([tmp_path], out, config(decontaminate=[str(evaluation)], heldout=0))

    assert [row["text"] for row in rows(out)] == [zh, longer]
    assert {row["lang"] for row in rows(out)} == {"zh", "en"} and {row["source"] for row in rows(out)} == {"a", "b"}
    assert [each["name"] for each in report["inputs"]] == ["a", "b"]  # evaluation files are no input
    counts = {lang: {step: n["documents"] for step, n in steps.items()} for lang, steps in report["totals"].items()}
    none = {"heldout": 0, "lines": 0}
    assert counts["zh"] == {"read": 2, "rules": 0, "decontaminate": 0, "exact": 1, "near": 0, "kept": 1, **none}
    assert counts["en"] == {"read": 5, "rules": 2, "decontaminate": 1, "exact": 0, "near": 1, "kept": 1, **none}
    (contaminated,) = report["samples"]["dropped"]["decontaminate"]
    assert contaminated["detail"].lower().split()[0] in question.lower()
    (pair,) = report["duplicates"]["pairs"]
    assert pair["kept"]["input"] == "b" and pair["dropped"]["input"] == "a" and 0.8 <= pair["similarity"] < 1
    assert "Q" in pair["dropped"]["text"] and pair["kept"]["characters"] == len(longer)
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report and report["schema"] == 1


@pytest.mark.parametrize("kind", ["light", "full"])
def test_every_document_is_counted_once(tmp_path: Path, kind: str) -> None:
    corpus(tmp_path / "in")
    out = tmp_path / "out"
    report = clean([tmp_path / "in"], out, config(rules=kind, heldout=0.2))
    for lang, steps in report["totals"].items():
        counts = {step: n["documents"] for step, n in steps.items()}
        assert counts.pop("read") == sum(counts.values()) == 86
        assert counts["exact"] and counts["near"] and 5 < counts["heldout"] < 30
        stayed = {part: [r for r in rows(folder) if r["lang"] == lang] for part, folder in parts(out).items()}
        for part, step in (("kept", "kept"), ("heldout", "heldout")):
            assert steps[step]["documents"] == len(stayed[part])
            assert steps[step]["characters"] == sum(len(r["text"]) for r in stayed[part])
        seen = 86
        for rule in report["rules"]:
            row = rule["languages"][lang]
            assert row["seen"] == seen and row["kept"] + row["dropped"] == seen
            seen = row["kept"]
    assert sum(each["kept"] for each in report["inputs"]) == len(rows(out))
    assert sum(each["kept"] for each in report["sources"]) == len(rows(out))
    texts = [row["text"] for folder in parts(out).values() for row in rows(folder)]
    assert len(set(texts)) == len(texts)  # no twin of a held-out document is left to train on


def parts(out: Path) -> dict[str, Path]:
    return {"kept": out, "heldout": out / "heldout"}


def test_the_same_documents_are_held_out_whatever_else_there_is(tmp_path: Path) -> None:
    corpus(tmp_path / "in")
    few, many = (tmp_path / name for name in ("few", "many"))
    clean([tmp_path / "in" / "en_0.jsonl"], few, config(heldout=0.2))
    clean([tmp_path / "in"], many, config(heldout=0.2))
    first = {row["text"] for row in rows(few / "heldout")}
    kept = {row["text"] for row in rows(many)}
    assert len(first) > 3 and not first & kept


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    corpus(tmp_path / "in")
    for workers in (1, 2):
        clean([tmp_path / "in"], tmp_path / f"out{workers}", config(workers=workers, heldout=0.1))
    assert files(tmp_path / "out1") == files(tmp_path / "out2")


def test_lines_that_repeat_go(tmp_path: Path) -> None:
    rng = random.Random(4)
    footer = "Subscribe to our newsletter for more stories like this one"
    texts = [english(rng) for _ in range(12)]
    write(tmp_path / "a.jsonl", [{"text": f"{text}\n{footer}"} for text in texts])
    report = clean([tmp_path / "a.jsonl"], tmp_path / "out", config(dedup={"lines": True}, heldout=0, rules="light"))
    assert [row["text"] for row in rows(tmp_path / "out")] == [f"{texts[0]}\n{footer}", *texts[1:]]
    assert report["duplicates"]["lines"] == 11


# --- conversations ---------------------------------------------------------------------------------------------------


def turns(*said: str) -> list[Record]:
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(said)]


def test_conversations_stay_or_go_as_a_whole(tmp_path: Path) -> None:
    rng = random.Random(11)
    call = {"type": "function", "function": {"name": "look", "arguments": {"where": "\u3000河 "}}}
    tool = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
    answer, other = chinese(rng, 3), chinese(rng, 3)
    records: list[Record] = [
        {"conversations": turns("<b>是什么？\r\n", answer, "謝謝你們的幫助", "不客氣")},
        {
            "conversations": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Where?"},
                {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm\x07"},
                {"role": "tool", "content": "a\x07 \u3000"},
                {"role": "assistant", "content": english(rng, 2)},
            ],
            "tools": [tool],
            "source": "tools",
        },
        {"conversations": turns("是什么？", answer)},
        {"conversations": [*turns("Hello?"), *turns("Anyone?", "Yes, I am here now.")]},
        {"conversations": turns("A question that is long enough", "a question that is long enough")},
        {"conversations": turns("是什么？", answer[:-2] + "了。")},
        {"conversations": turns("别的", other)},
    ]
    write(tmp_path / "chats.jsonl", records)
    out = tmp_path / "out"
    report = clean([tmp_path / "chats.jsonl"], out, config(kind="chat", heldout=0, length=100))
    kept = list(read_chats(sorted(out.glob("*.zst"))))
    said = [[m.content for m in chat.messages] for chat in kept]
    assert said[0] == ["<b>是什么？\n", answer, "谢谢你们的帮助", "不客气"]  # no tag is taken from a message
    assert (
        kept[1].messages[2].tool_calls[0].arguments == {"where": "\u3000河 "} and kept[1].messages[2].reasoning == "hm"
    )
    assert said[1][3] == "a\x07 \u3000" and kept[1].tools == (tool,) and kept[1].source == "tools"
    assert len(kept) == 3 and said[2] == ["别的", other] and {chat.lang for chat in kept} == {"zh", "en"}
    assert {rule: len(s) for rule, s in report["samples"]["dropped"].items()} == {"roles": 1, "same": 1}
    assert report["totals"]["zh"]["near"]["documents"] == 2
    chats = report["chats"]
    assert (chats["rows"], chats["with_tools"], chats["with_system"], chats["not_alternating"]) == (7, 1, 1, 1)
    assert chats["longer"] > 0 and chats["estimated"] and "Conversations" in (out / "report.html").read_text()
    json_row = json.loads(zstd(next(iter(out.glob("*.zst")))).splitlines()[0])
    assert set(json_row) == {"conversations", "lang", "source"}


def zstd(path: Path) -> bytes:
    return bytes(zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read())


def test_preference_pairs(tmp_path: Path) -> None:
    rng = random.Random(12)
    good, bad = english(rng, 2), english(rng, 2)
    records = [
        {"prompt": "Why?\r\n", "chosen": good + "\x07", "rejected": bad, "source": "a"},
        {"prompt": turns("One?", "Yes.", "Two?"), "chosen": turns("", good)[1:], "rejected": turns("", "Two?")[1:]},
        {"prompt": "Why not?", "chosen": good, "rejected": good + "\x07"},  # the same but for what cannot be seen
        {"prompt": "A question like this", "chosen": "A question like this", "rejected": bad},
    ]
    write(tmp_path / "pairs.jsonl", records)
    out = tmp_path / "out"
    report = clean([tmp_path / "pairs.jsonl"], out, config(kind="preference", heldout=0))
    kept = list(read_preferences(sorted(out.glob("*.zst"))))
    assert [(p.prompt[-1].content, p.chosen[0].content, p.rejected[0].content) for p in kept] == [
        ("Why?\n", good, bad),
        ("Two?", good, "Two?"),  # a rejected answer may be bad
    ]
    assert {rule: len(s) for rule, s in report["samples"]["dropped"].items()} == {"characters": 1, "duplicated": 1}


def test_the_wrong_kind_says_so(tmp_path: Path) -> None:
    write(tmp_path / "chats.jsonl", [{"conversations": turns("Hello?", "Yes.")}])
    with pytest.raises(DataError, match=r"chats\.jsonl, line 1.*kind=chat"):
        clean([tmp_path], tmp_path / "out", config())


def test_a_wiki_becomes_documents_or_questions(tmp_path: Path) -> None:
    text = english(random.Random(13))
    page = f"<page><title>Oriole</title><ns>0</ns><id>1</id><revision><id>1</id><text>'''{text}'''</text></revision>"
    xml = f"<mediawiki><siteinfo><dbname>enwiki</dbname></siteinfo>{page}</page></mediawiki>"
    dump = tmp_path / "enwiki-pages-articles.xml.bz2"
    dump.write_bytes(bz2.compress(xml.encode()))
    clean([dump], tmp_path / "text", config(heldout=0, rules={"languages": ["en"]}))
    assert [row["text"] for row in rows(tmp_path / "text")] == [f"Oriole\n\n{text}"]
    clean([dump], tmp_path / "chat", config(kind="chat", heldout=0))
    (chat,) = read_chats(sorted((tmp_path / "chat").glob("*.zst")))
    assert "Oriole" in chat.messages[0].content and chat.messages[1].content in text and chat.source == "enwiki"
    dump.write_bytes(bz2.compress(xml[:-60].encode()))
    with pytest.raises(DataError, match="no whole MediaWiki dump"):
        clean([dump], tmp_path / "text", config())
    report = clean([dump], tmp_path / "text", config(skip_bad=True))
    assert report["bad"]["total"] == 1


# --- inputs and settings ---------------------------------------------------------------------------------------------


def test_pages_of_a_folder_are_one_input(tmp_path: Path) -> None:
    rng = random.Random(5)
    for n in range(3):
        (tmp_path / "book").mkdir(exist_ok=True)
        (tmp_path / "book" / f"page{n}.txt").write_text(english(rng))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "alone.md").write_text(english(rng))
    write(tmp_path / "other" / "book.jsonl", [{"text": english(rng)}])
    report = clean([tmp_path / "book", tmp_path / "other"], tmp_path / "out", config(heldout=0))
    assert [(each["name"], each["read"]) for each in report["inputs"]] == [("alone", 1), ("book", 3), ("book-2", 1)]
    assert {path.name for path in (tmp_path / "out").glob("*.zst")} == {
        f"{n}.jsonl.zst" for n in ("alone", "book", "book-2")
    }


def test_bad_records_are_named_or_stop_it(tmp_path: Path) -> None:
    good = [{"text": english(random.Random(6))}]
    path = write(tmp_path / "a.jsonl", good)
    with path.open("a") as file:
        file.write('{"text": "cut\n{"txt": "x"}\n')
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        clean([path], tmp_path / "out", config())
    report = clean([tmp_path], tmp_path / "out", config(skip_bad=True, heldout=0))
    assert report["bad"]["total"] == 3 and report["bad"]["files"] == {str(path): 2, str(tmp_path / "b.jsonl"): 1}
    assert any("line 3" in reason and "'text'" in reason for reason in report["bad"]["examples"])
    assert len(rows(tmp_path / "out")) == 1


def test_the_folder_must_be_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "a.jsonl", [{"text": english(random.Random(7))}])
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="holds other files; name a new folder"):
        clean([path], out, config())
    with pytest.raises(DataError, match="nothing is left to clean"):
        clean([path], tmp_path / "new", config(decontaminate=[str(path)]))
    nested = tmp_path / "in" / "clean"
    for _ in range(2):  # the second time the folder of inputs holds the result of the first
        report = clean([tmp_path / "in"], nested, config(heldout=0))
        assert [each["name"] for each in report["inputs"]] == ["a"]


def test_settings(tmp_path: Path) -> None:
    recipe = tmp_path / "clean.toml"
    recipe.write_text("heldout = 0.1\n[rules]\nwidth = false\n[dedup]\nthreshold = 0.7\n")
    made = read_config([f"config={recipe}", "rules=light", "rules.html=false", "decontaminate=eval/*.jsonl"])
    assert (made.heldout, made.dedup.threshold, made.decontaminate) == (0.1, 0.7, ("eval/*.jsonl",))
    assert (made.rules.preset, made.rules.html, made.rules.width, made.rules.c4_sentences) == ("light", False, False, 0)
    assert made.rules.characters
    with pytest.raises(ConfigError, match="unknown key 'heldot'; did you mean 'heldout'"):
        read_config(["heldot=0.1"])
    with pytest.raises(ConfigError, match="rules"):
        read_config(["rules=heavy"])


def test_the_reports_recipe_gives_the_same_again(tmp_path: Path) -> None:
    corpus(tmp_path / "in", files=1)
    clean([tmp_path / "in"], tmp_path / "one", config(rules="light", heldout=0.1, samples=3))
    page = Page((tmp_path / "one" / "report.html").read_text(encoding="utf-8"))
    recipe = tmp_path / "again.toml"
    recipe.write_text(page.inside("pre"), encoding="utf-8")
    clean([tmp_path / "in"], tmp_path / "two", read_config([f"config={recipe}", "workers=1"]))
    assert files(tmp_path / "one") == files(tmp_path / "two")


# --- going on --------------------------------------------------------------------------------------------------------


def test_only_what_a_change_touches_is_done_again(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "in")
    out = tmp_path / "out"
    times = lambda: {path.name: path.stat().st_mtime_ns for path in (out / ".done" / "cleaned").iterdir()}  # noqa: E731
    clean([folder], out, config(heldout=0.1))
    before, result = times(), files(out)
    clean([folder], out, config(heldout=0.1))
    assert times() == before and files(out) == result
    report = clean([folder], out, config(heldout=0.1, dedup={"near": False}))
    assert times() == before and report["totals"]["en"]["near"]["documents"] == 0 and files(out) != result
    clean([folder], out, config(heldout=0.1))
    assert files(out) == result

    (out / "en_0.jsonl.zst").unlink()
    clean([folder], out, config(heldout=0.1))
    assert times() == before and files(out) == result

    write(folder / "en_1.jsonl", [{"text": english(random.Random(8))}])
    clean([folder], out, config(heldout=0.1))
    assert {name for name, at in times().items() if before[name] != at} == {"en_1.jsonl.zst"}

    clean([folder / "zh_0.jsonl"], out, config(heldout=0))  # the other inputs are gone, and so is what was held out
    assert set(files(out)) == {"zh_0.jsonl.zst", "report.json", "report.html"}


def killed_at_random(tmp_path: Path, kills: int, seed: int) -> None:
    """Runs that are killed at random moments end, when they are run again, with the bytes of one that was not."""
    folder = corpus(tmp_path / "in", documents=60)

    @contextlib.contextmanager
    def started(out: Path) -> Iterator[subprocess.Popen[bytes]]:
        words = [sys.executable, "-m", "oriole.cli", "data", "clean", str(folder), str(out), "heldout=0.1", "workers=2"]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                yield process
            finally:
                process.send_signal(signal.SIGKILL)

    def end(out: Path) -> None:
        with started(out) as process:
            _, err = process.communicate()
        assert process.returncode == 0, err.decode()

    def working(out: Path) -> int:
        return sum(1 for _ in (out / ".done").rglob("*"))

    end(tmp_path / "whole")
    expected = files(tmp_path / "whole")
    assert len(expected) > 8
    rng = random.Random(seed)
    met = 0
    for n in range(kills):
        out = tmp_path / f"killed{n}"
        far = working(tmp_path / "whole") * (n + rng.random()) / kills  # one in each part of the run
        with started(out) as process:
            while process.poll() is None and working(out) < far:
                time.sleep(0.005)
            time.sleep(0.1 * rng.random())
            met += process.poll() is None
        end(out)
        assert files(out) == expected
        assert not [p for p in out.rglob("*") if p.name.endswith(".part")]
    assert met >= kills / 2  # of those near the end some may come too late


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_at_random(tmp_path: Path) -> None:
    killed_at_random(tmp_path, 3, seed=1)


@pytest.mark.soak
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_twenty_times(tmp_path: Path) -> None:
    killed_at_random(tmp_path, 20, seed=2)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    def peak(documents: int) -> int:
        rng = random.Random(9)
        path = tmp_path / f"{documents}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for n in range(documents):
                file.write(json.dumps({"text": f"{n} {english(rng, 40)}", "source": f"page {n}"}) + "\n")
        outs = {part: tmp_path / f"{documents}.{part}.zst" for part in pipeline.PARTS}
        tracemalloc.start()
        try:
            counts = clean_input("x", [path], [], config(rules="light"), outs, tmp_path / "samples.json")
            assert counts["read"]["en"][0] == documents
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(50)
    assert peak(900) < peak(300) + 700_000  # of 2.3 MB of text more


# --- the report ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that a page is well formed while it is read."""

    VOID = frozenset({"meta", "input", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text: dict[str, str] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.text[tag] = self.text.get(tag, "") + data

    def inside(self, tag: str) -> str:
        return self.text[tag]


HOSTILE = '"><img src=x onerror=alert(1)></script><script>alert(2)</script> \u202eabc\u2066 \x07 & &amp; {braces}'


def test_the_page_escapes_what_documents_say(tmp_path: Path) -> None:
    rng = random.Random(10)
    twin = english(rng, 40)
    records = [
        {"text": f"{HOSTILE} {chinese(rng)}", "source": HOSTILE},
        {"text": f"{HOSTILE} {english(rng, 2)}", "source": HOSTILE},
        {"text": f"{twin} {HOSTILE}.", "source": HOSTILE},
        {"text": f"{twin[:60]}{HOSTILE}{twin[60:]}", "source": HOSTILE},
    ]
    write(tmp_path / "a.jsonl", records)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps({HOSTILE: 1}) + "\n")
    rules = {"html": False, "min_characters": 300}
    clean([tmp_path / "a.jsonl"], tmp_path / "out", config(rules=rules, heldout=0, skip_bad=True))
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe", "object"}
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "background")]
    assert all(value and value.startswith("#") for name, value in page.attributes if name == "href")
    assert not set("\u202e\u2066\x07") & set(text) and "202E" in text
    assert "http" not in page.inside("style") and "@import" not in page.inside("style")
    for shown in ("onerror=alert(1)", "near duplicates", "length", "zh", "a.jsonl"):
        assert shown in page.inside("body")


def test_the_page_of_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "too short", "lang": "en"}])
    report = clean([tmp_path / "a.jsonl"], tmp_path / "out", config())
    assert report["totals"]["en"]["kept"]["documents"] == 0
    Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert set(files(tmp_path / "out")) == {"report.json", "report.html"}
    assert "kept" in cleanreport.text(report)


def test_samples_are_the_same_however_they_are_counted() -> None:
    def choose(parts: list[range]) -> dict[str, list[Record]]:
        made = []
        for part in parts:
            samples = Samples(4, seed=3)
            for n in part:
                samples.offer("group", str(n), lambda n=n: {"n": n})  # type: ignore[misc]
            made.append(json.loads(json.dumps(samples.as_json())))
        return merge_samples(made, 4)

    whole = choose([range(100)])
    assert whole == choose([range(30), range(30, 90), range(90, 100)]) == choose([range(60, 100), range(60)])
    assert len(whole["group"]) == 4 and whole != choose([range(50)])


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ("abc", "abd", ("abc", "abd")),
        ("abc", "ab", ("abc", "ab")),
        ("a" * 1000 + "b" + "c" * 1000, "a" * 1000 + "c" * 1000, ("…" + "a" * 60 + "b" + "c" * 359 + "…",) * 1),
    ],
)
def test_a_change_is_shown_where_it_is(before: str, after: str, shown: tuple[str, ...]) -> None:
    assert difference(before, after)[: len(shown)] == shown


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def oriole(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "oriole.cli", "data", "clean", *words],
            cwd=tmp_path, capture_output=True, text=True, encoding="utf-8",
        )  # fmt: skip

    return run


def test_command(tmp_path: Path, oriole: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    corpus(tmp_path / "in", files=1, documents=10)
    done = oriole("in/*.jsonl", "out", "workers=1", "heldout=0", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["totals"]["zh"]["read"]["documents"] == 10 and "samples" not in report
    assert "out/report.html" in done.stderr
    shown = oriole("in/*.jsonl", "out", "workers=1", "heldout=0")
    assert "dropped by rules" in shown.stdout or "kept" in shown.stdout
    wrong = oriole("in/*.jsonl")
    assert wrong.returncode == 2 and "oriole data clean IN... OUT" in wrong.stderr and "Traceback" not in wrong.stderr
    assert oriole("in/*.jsonl", "out", "engine=spark").returncode == 2


def test_nothing_left_is_said_in_one_sentence(
    tmp_path: Path, oriole: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    rng = random.Random(5)
    notes = [{"text": english(rng, 2), "lang": "en"} for _ in range(9)]
    write(tmp_path / "in.jsonl", [*notes, {"text": "Le chat dort sur le canapé et ne veut pas se lever."}])
    done = oriole("in.jsonl", "out", "workers=1", "heldout=0", "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["totals"]["en"]["kept"]["documents"] == 0
    said = done.stderr.strip().splitlines()[-1]
    assert said == (
        "oriole: nothing is left of 10 documents: the rule c4_sentences dropped most of them, 9; see out/report.html "
        "for examples, then loosen or switch it off (rules.c4_sentences) or begin with rules=light"
    )
    assert (tmp_path / "out" / "report.html").exists()
    report = clean([tmp_path / "in.jsonl"], tmp_path / "out", config(heldout=0, rules="light"))
    assert report["totals"]["en"]["kept"]["documents"] == 9 and not cleanreport.nothing_left(report, Path("out"))

    report = clean([tmp_path / "in.jsonl"], tmp_path / "apart", config(rules="light", heldout=0.999))
    assert "9, was set aside in apart/heldout" in cleanreport.nothing_left(report, Path("apart"))
    exam = write(tmp_path / "exam.jsonl", [{"q": note["text"]} for note in notes])
    keys = config(rules="light", heldout=0, decontaminate=[str(exam)])
    report = clean([tmp_path / "in.jsonl"], tmp_path / "known", keys)
    assert "the rule decontaminate dropped most of them, 9" in cleanreport.nothing_left(report, Path("known"))
    assert report["totals"]["en"]["decontaminate"]["documents"] == 9


def test_decontamination_in_batches_finds_what_each_document_alone_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(9)
    exam = write(tmp_path / "exam.jsonl", [{"q": english(rng, 2)} for _ in range(5)])
    known = Decontaminator([exam])
    asked = [json.loads(line)["q"] for line in exam.read_text(encoding="utf-8").splitlines()]
    texts = [f"{english(rng, 6)} {rng.choice(asked) if i % 7 == 0 else ''}".strip() for i in range(200)]
    docs = [{"text": text if i % 11 else "too short", "lang": "en"} for i, text in enumerate(texts)]
    write(tmp_path / "in.jsonl", docs)
    monkeypatch.setattr(shingles, "BATCH_CHARS", 5000)
    rules = {"preset": "light", "min_characters": 50}
    keys = config(rules=rules, heldout=0, decontaminate=[str(exam)], dedup={"exact": False, "near": False}, samples=100)
    report = clean([tmp_path / "in.jsonl"], tmp_path / "out", keys)
    wanted = [doc["text"] for doc in docs if len(doc["text"]) > 50 and known.hit(doc["text"]) is None]
    assert [row["text"] for row in rows(tmp_path / "out")] == wanted and 150 < len(wanted) < 170
    hits = Counter(known.hit(doc["text"]) for doc in docs) - Counter([None] * 200)
    assert Counter(s["detail"] for s in report["samples"]["dropped"]["decontaminate"]) == hits
