"""Fetching a set: from a hub's listing to files that the readers read, against a hub on loopback."""

import csv
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import pytest
import zstandard
from typer.testing import CliRunner
from webserver import Server, serving

from oriole import cli
from oriole.apps.evaluate import read_questions
from oriole.errors import ConfigError, DataError, ResourceError
from oriole.text import catalogue as catalogue_module
from oriole.text import fetch as module
from oriole.text.catalogue import Entry, Kind, Recast, addresses, catalogue, describe, find, parse, table
from oriole.text.fetch import FetchConfig, Fetched, fetch
from oriole.text.files import expand
from oriole.text.formats import read_chats, read_docs
from oriole.text.recast import _RULES, recast_file, unpack
from oriole.text.web import Gated

COMMIT = "c0ffee0000000000000000000000000000000000"
SECOND = "beef000000000000000000000000000000000000"
DATA = random.Random(0).randbytes(400_000)


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def mirror() -> Iterator[Server]:
    with serving() as running:
        yield running


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


FILES = {
    "README.md": b"# a card",
    "data/train-0.jsonl": lines({"text": "一"}, {"text": "two"}),
    "data/train-1.jsonl": lines({"text": "三"}),
}


def put(server: Server, files: Mapping[str, bytes], repo: str = "o/n", commit: str = COMMIT) -> None:
    """A repository on a hub that speaks Hugging Face's protocol; every second file lies in LFS."""
    items: list[dict[str, Any]] = [{"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}]
    for number, (path, data) in enumerate(files.items()):
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
        items.append({"type": "file", "path": path, "size": len(data), "oid": git} | (lfs if number % 2 else {}))
        server.page(f"/datasets/{repo}/resolve/{commit}/{path}", data)
    server.page(f"/api/datasets/{repo}/revision/main", json.dumps({"sha": commit}))
    server.page(f"/api/datasets/{repo}/tree/{commit}", json.dumps(items))


def put_on_modelscope(server: Server, files: Mapping[str, bytes], repo: str = "a/b") -> None:
    found = [{"Type": "tree", "Path": "data", "Size": 0, "Sha256": ""}]
    for path, data in files.items():
        found.append({"Type": "blob", "Path": path, "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()})
        name = path.replace("/", "%2F")
        server.page(f"/api/v1/datasets/{repo}/repo?Revision=master&FilePath={name}", data)
    server.page(f"/api/v1/datasets/{repo}/repo/tree", json.dumps({"Code": 200, "Data": {"Files": found}}))


def entry(**more: Any) -> Entry:
    base: dict[str, Any] = {
        "name": "mini", "title": "A little set", "kind": "text", "languages": ["zh"], "licence": "CC BY 4.0",
        "homepage": "https://example.org/mini", "format": "jsonl", "hub": "o/n",
    }  # fmt: skip
    return Entry.model_validate(base | more)


def bring(server: Server | None, about: Entry, yes: bool = False, **config: Any) -> Fetched:
    given = {"timeout": 5, "retries": 2, "backoff": 0.001, "workers": 1, "modelscope": "http://127.0.0.1:9"} | config
    if server is not None:
        given.setdefault("huggingface", server.url)
    return fetch(about.name, FetchConfig.model_validate(given), yes=yes, entries={about.name: about})


def files(server: Server) -> list[str]:
    """The files that were asked for, listings left out."""
    return [a.path for a in server.asked if "/resolve/" in a.path or "FilePath=" in a.path]


# --- hubs ------------------------------------------------------------------------------------------------------------


def test_a_set_comes_whole_and_says_where_from(server: Server) -> None:
    put(server, FILES)
    result = bring(server, entry(trap="Do not sell it."))
    assert result.folder == Path("data/mini") and result.revision == COMMIT and result.rows is None
    assert [p.read_bytes() for p in result.outputs] == [FILES["data/train-0.jsonl"], FILES["data/train-1.jsonl"]]
    assert [d.text for d in read_docs(expand(result.folder))] == ["一", "two", "三"]
    assert result.downloaded == sum(len(FILES[f["path"]]) for f in result.files)
    assert result.following == ["oriole data clean data/mini clean/mini"]
    readme = (result.folder / "README").read_text(encoding="utf-8")
    for said in ("A little set", "CC BY 4.0", "https://example.org/mini", "Do not sell it.", COMMIT, "Changes:  none"):
        assert said in readme
    for got in result.files:
        assert f"{got['sha256']} {got['path']} {server.url}/datasets/o/n/resolve/{COMMIT}/{got['path']}" in readme
        assert got["sha256"] == hashlib.sha256(FILES[got["path"]]).hexdigest()
    assert json.loads(json.dumps(result.as_json()))["outputs"][0] == "data/mini/data/train-0.jsonl"


def test_nothing_comes_twice(server: Server) -> None:
    put(server, FILES)
    bring(server, entry())
    before = len(files(server))
    again = bring(server, entry())
    assert again.downloaded == 0 and len(again.outputs) == 2 and len(files(server)) == before
    (Path("data/mini") / module.MANIFEST).unlink()  # then checksums tell
    assert bring(server, entry()).downloaded == 0
    (Path("data/mini") / "data" / "train-1.jsonl").write_text("spoilt")
    assert bring(server, entry()).downloaded == len(FILES["data/train-1.jsonl"])


def test_a_new_version_on_the_hub_is_fetched(server: Server) -> None:
    put(server, FILES)
    bring(server, entry())
    put(server, FILES | {"data/train-1.jsonl": lines({"text": "四"})}, commit=SECOND)
    result = bring(server, entry())
    assert result.revision == SECOND and [d.text for d in read_docs(expand(result.folder))] == ["一", "two", "四"]
    assert files(server)[-1] == f"/datasets/o/n/resolve/{SECOND}/data/train-1.jsonl" and len(files(server)) == 3


def test_files_are_chosen_by_pattern_and_number(server: Server) -> None:
    put(server, FILES)
    assert len(bring(server, entry(), out="x/1", max_files=1).files) == 1
    assert [f["path"] for f in bring(server, entry(), out="x/2", files="*-1.jsonl").files] == ["data/train-1.jsonl"]
    assert len(bring(server, entry(files=["data/*"]), out="x/3").files) == 2
    with pytest.raises(DataError, match=r"no file of 'mini' matches \*\.csv; it holds README\.md, data/train-0\.jsonl"):
        bring(server, entry(), files="*.csv")
    put(server, {"README.md": b"", "LICENSE.txt": b"", "picture.png": b""}, repo="o/empty")
    with pytest.raises(DataError, match=r"'mini' holds no data file; it holds README\.md"):
        bring(server, entry(hub="o/empty"))


def test_long_listings_are_read_page_by_page(server: Server) -> None:
    put(server, FILES)
    page = server.pages[f"/api/datasets/o/n/tree/{COMMIT}"]
    items = json.loads(page.data)
    # A mirror may hand on links to the hub that it mirrors.
    for number, link in enumerate([f"https://huggingface.invalid/api/next?cursor={i}" for i in range(2)]):
        server.page(f"/api/next?cursor={number}", json.dumps(items[number + 2 : number + 3]))
        source = page if number == 0 else server.pages["/api/next?cursor=0"]
        source.headers = {"Link": f'<{link}>; rel="next"'}
    page.data = json.dumps(items[:2]).encode()
    assert [f["path"] for f in bring(server, entry()).files] == ["data/train-0.jsonl", "data/train-1.jsonl"]


def test_the_second_hub_lists_when_the_first_does_not(server: Server, mirror: Server) -> None:
    put(mirror, FILES)
    result = bring(None, entry(), huggingface=["http://127.0.0.1:9", server.url, mirror.url])
    assert len(result.files) == 2 and all(f["address"].startswith(mirror.url) for f in result.files)


def test_the_second_hub_serves_what_the_first_lists(server: Server, mirror: Server) -> None:
    put(server, FILES)
    put(mirror, FILES)
    server.pages.pop(f"/datasets/o/n/resolve/{COMMIT}/data/train-0.jsonl")
    server.pages[f"/datasets/o/n/resolve/{COMMIT}/data/train-1.jsonl"].data = b'{"text": "X"}\n'
    result = bring(None, entry(), huggingface=[server.url, mirror.url])
    assert [f["address"].startswith(mirror.url) for f in result.files] == [True, True]


def test_modelscope_lists_and_serves(server: Server, mirror: Server) -> None:
    put_on_modelscope(mirror, FILES)
    about = entry(modelscope="a/b")
    result = bring(server, about, modelscope=mirror.url)
    assert [p.read_bytes() for p in result.outputs] == [FILES["data/train-0.jsonl"], FILES["data/train-1.jsonl"]]
    assert files(server) == []
    put(server, FILES)  # and serves what the other hub lists, where a checksum proves that it is the same
    server.pages.pop(f"/datasets/o/n/resolve/{COMMIT}/data/train-0.jsonl")
    result = bring(server, about, out="again", modelscope=mirror.url)
    assert result.files[0]["address"].startswith(f"{mirror.url}/api/v1/datasets/a/b/repo?Revision=master&FilePath=")
    assert result.files[1]["address"].startswith(server.url)


def test_the_wished_for_mirror_comes_first(server: Server, mirror: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    put(server, FILES)
    put(mirror, FILES)
    hubs = [server.url, mirror.url]
    port = str(urlsplit(mirror.url).port)
    assert bring(None, entry(), out="x/1", huggingface=hubs, mirror=port).files[0]["address"].startswith(mirror.url)
    assert len(server.asked) == 0
    monkeypatch.setenv("HF_ENDPOINT", mirror.url + "/")
    assert bring(None, entry(), out="x/2", huggingface=hubs).files[0]["address"].startswith(mirror.url)
    assert len(server.asked) == 0
    put_on_modelscope(server, FILES, repo="a/b")
    port = str(urlsplit(server.url).port)
    about = entry(modelscope="a/b")
    result = bring(None, about, out="x/3", huggingface=[mirror.url], modelscope=server.url, mirror=port)
    assert "FilePath=" in result.files[0]["address"]
    with pytest.raises(ConfigError, match="mirror=nowhere is none of 127"):
        bring(None, entry(), huggingface=hubs, mirror="nowhere")


def test_a_gated_set_needs_a_token_and_gets_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    put(server, FILES)
    server.pages["/api/datasets/o/n/revision/main"].faults.append((401, {"X-Error-Code": "GatedRepo"}))
    with pytest.raises(Gated, match=r"accept its terms on its page there, make a token .* export HF_TOKEN=hf_"):
        bring(server, entry())
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    bring(server, entry())
    assert not any("authorization" in a.headers for a in server.asked)  # nobody named this host as trusted
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    bring(server, entry(), out="again")
    assert server.asked[-1].headers["authorization"] == "Bearer hf_x"


def test_hubs_that_make_no_sense(server: Server, mirror: Server) -> None:
    with pytest.raises(DataError, match=r"no hub lists the files of 'mini' \(http://127.*no such file.*set proxy="):
        bring(server, entry())
    put(server, FILES)
    listing = server.pages[f"/api/datasets/o/n/tree/{COMMIT}"]
    for bad in (b"<html>", b'{"error": "x"}', b'[{"type": "file"}]', b"[1]"):
        listing.data = bad
        with pytest.raises(DataError, match=r"not JSON|in a form that this version does not know"):
            bring(server, entry())
    items = [{"type": "file", "path": "../../evil.jsonl", "size": 1, "oid": "0" * 40}]
    listing.data = json.dumps(items).encode()
    with pytest.raises(DataError, match=r"'\.\./\.\./evil\.jsonl' cannot be written safely"):
        bring(server, entry())


def test_links_with_checksums(server: Server) -> None:
    data = lines({"text": "link"})
    server.page("/a.jsonl", data)
    link = {
        "path": "a.jsonl", "addresses": [f"{server.url}/gone", f"{server.url}/a.jsonl"],
        "size": len(data), "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    assert [d.text for d in read_docs(bring(None, entry(hub="", links=[link])).outputs)] == ["link"]
    with pytest.raises(DataError, match="its checksum is wrong"):
        bring(None, entry(hub="", links=[link | {"sha256": "0" * 64}]), out="other")


# --- size, disk, other processes -------------------------------------------------------------------------------------


def test_what_is_very_large_is_asked_about(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    put(server, FILES)
    monkeypatch.setattr(module, "BIG", 30)
    with pytest.raises(ConfigError, match=r"'mini' is 0 GB in 2 files; add --yes .* or take a part with max_files=2"):
        bring(server, entry())
    assert files(server) == []
    assert len(bring(server, entry(), yes=True).files) == 2


def test_a_disk_that_is_too_small_is_noticed_before(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    put(server, FILES)
    monkeypatch.setattr(module, "free_space", lambda folder: module.ROOM)
    with pytest.raises(ResourceError, match=r"'mini' needs 0\.00 GB, the disk of data has"):
        bring(server, entry())
    assert files(server) == []


def test_many_files_at_once_arrive_in_order(server: Server) -> None:
    many = {f"{n:02}.jsonl": lines(*({"text": f"{n}-{i}"} for i in range(n))) for n in range(1, 20)}
    put(server, many)
    page = server.pages[f"/datasets/o/n/resolve/{COMMIT}/07.jsonl"]
    page.faults.extend([3, (503, {}), 10])
    result = bring(server, entry(), connections=5)
    assert {p.name: p.read_bytes() for p in result.outputs} == many
    assert [p.name for p in result.outputs] == sorted(many) == [f["path"] for f in result.files]


def test_one_file_that_cannot_be_had_stops_the_rest_and_a_rerun_goes_on(server: Server) -> None:
    put(server, FILES)
    page = server.pages.pop(f"/datasets/o/n/resolve/{COMMIT}/data/train-1.jsonl")
    with pytest.raises(DataError, match=r"data/train-1\.jsonl could not be downloaded"):
        bring(server, entry(), connections=1)
    server.pages[f"/datasets/o/n/resolve/{COMMIT}/data/train-1.jsonl"] = page
    assert bring(server, entry()).downloaded == len(page.data)
    server.pages.pop(f"/datasets/o/n/resolve/{COMMIT}/data/train-0.jsonl")
    before = len(files(server))
    with pytest.raises(DataError, match=r"data/train-0\.jsonl could not be downloaded"):
        bring(server, entry(), out="other", connections=1)
    assert len(files(server)) == before + 1  # the rest was not begun


SCRIPT = """
import sys
from pathlib import Path
from oriole import cli
from oriole.text import catalogue
catalogue.CATALOGUE = Path(sys.argv.pop(1))
cli.main()
"""


def start(server: Server, *words: str) -> subprocess.Popen[str]:
    """`oriole data fetch mini` in a process of its own."""
    sets = [entry().model_dump(mode="json")]
    Path("catalogue.json").write_text(json.dumps({"schema": 1, "sets": sets}), encoding="utf-8")
    command = [sys.executable, "-c", SCRIPT, "catalogue.json", "data", "fetch", "mini"]
    keys = [f"huggingface={server.url}", "modelscope=http://127.0.0.1:9", "connections=1", "timeout=120", *words]
    return subprocess.Popen([*command, *keys], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def half(process: subprocess.Popen[str], part: Path, size: int) -> None:
    """Wait until half of a file is on disk."""
    until = time.monotonic() + 120
    while not part.exists() or part.stat().st_size < size:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_and_resumed(server: Server, signum: signal.Signals) -> None:
    put(server, {"a.jsonl": lines({"text": "a"}), "b.jsonl": DATA})
    page = server.pages[f"/datasets/o/n/resolve/{COMMIT}/b.jsonl"]
    page.faults.append("hang")
    process = start(server)
    part = Path("data/mini/b.jsonl.part")
    half(process, part, len(DATA) // 2)
    second = start(server)
    assert "another process is fetching into data/mini" in second.communicate(timeout=120)[1] and second.returncode == 2
    process.send_signal(signum)
    _, said = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[signum]
    if signum != signal.SIGKILL:
        assert "oriole: stopped; what has arrived stays, and the same command goes on" in said
        assert "Traceback" not in said
    assert part.read_bytes() == DATA[: len(DATA) // 2] and Path("data/mini/a.jsonl").exists()
    before = len(files(server))
    process = start(server, "--json")
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert Path("data/mini/b.jsonl").read_bytes() == DATA and not part.exists()
    assert json.loads(out)["downloaded"] == len(DATA) // 2
    (asked,) = server.asked[-1:]
    assert asked.range == f"bytes={len(DATA) // 2}-" and asked.sent == len(DATA) // 2
    assert len(files(server)) == before + 1


@pytest.mark.soak
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_at_random_twenty_times(server: Server) -> None:
    dice = random.Random(0)
    many = {f"{n}.jsonl": dice.randbytes(1_500_000) for n in range(4)}
    put(server, many)
    for page in server.pages.values():
        page.pause = 0.05
    for _ in range(20):
        process = start(server, "connections=2")
        until = time.monotonic() + dice.uniform(0.8, 2.0)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.kill()
        process.communicate(timeout=120)
    process = start(server, "connections=2")
    assert process.wait(120) == 0, process.communicate()
    process.communicate()
    assert {p.name: p.read_bytes() for p in Path("data/mini").glob("*.jsonl")} == many
    # A killed process loses what was on its way at most.
    assert (
        sum(a.sent for a in server.asked if "/resolve/" in a.path) < sum(map(len, many.values())) + 20 * 2 * 1_000_000
    )


# --- rewriting -------------------------------------------------------------------------------------------------------


def recast(folder: Path, file: str, data: bytes, **rule: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, counts) of one file rewritten by a rule."""
    (folder / file).write_bytes(data)
    how = Recast.model_validate(rule).model_dump()
    counts = recast_file([str(folder / file)], str(folder / "out.jsonl.zst"), how, "mini", "zh")
    packed = (folder / "out.jsonl.zst").read_bytes()
    text = zstandard.ZstdDecompressor().decompressobj().decompress(packed).decode()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == counts["rows"] and all(r["source"] == "mini" and r["lang"] in ("zh", "en") for r in rows)
    return rows, counts


def chats(folder: Path, rows: list[dict[str, Any]]) -> list[list[tuple[str, str]]]:
    """What the readers make of rows."""
    (folder / "rows.jsonl").write_bytes(lines(*rows))
    return [[(m.role, m.content) for m in chat.messages] for chat in read_chats(folder / "rows.jsonl")]


def test_fields_of_question_and_answer(tmp_path: Path) -> None:
    records = [
        {"title": "几点？", "desc": "请问几点？", "answer": "三点。"},
        {"title": "几点？", "desc": "", "answer": "四点。"},
        {"title": "天气", "desc": "明天下雨吗？", "answer": "下。"},
        {"title": "", "desc": "", "answer": "没有问题"},
        {"title": "没有回答", "desc": "", "answer": " "},
        {"title": "数字", "desc": 3, "answer": "x"},
    ]
    rows, counts = recast(tmp_path, "a.json", lines(*records), to="chat", ask=["title", "desc"], answer="answer")
    assert chats(tmp_path, rows) == [
        [("user", "请问几点？"), ("assistant", "三点。")],
        [("user", "几点？"), ("assistant", "四点。")],
        [("user", "天气\n明天下雨吗？"), ("assistant", "下。")],
    ]
    assert counts["skipped"] == 3 and counts["examples"][0].endswith("line 4: question or answer is empty")
    rule = {"to": "chat", "ask": ["q"], "answer": "a", "system": "s"}
    rows, _ = recast(tmp_path, "b.jsonl", lines({"s": "简短", "q": "问", "a": ["", "答", "别的"]}), **rule)
    assert chats(tmp_path, rows) == [[("system", "简短"), ("user", "问"), ("assistant", "答")]]


def test_csv_in_gb18030_with_line_ends_in_fields(tmp_path: Path) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["title", "ask", "answer"], ["头疼", "两天了，\n怎么办", "多喝水，\n多休息。"]])
    rule = {"to": "chat", "ask": ["title", "ask"], "answer": "answer"}
    want = [[("user", "头疼\n两天了，\n怎么办"), ("assistant", "多喝水，\n多休息。")]]
    for encoding in ("gb18030", "utf-8", "utf-8-sig"):
        rows, _ = recast(tmp_path, "a.csv", text.getvalue().encode(encoding), **rule)
        assert chats(tmp_path, rows) == want


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"INSTRUCTION": ["问"], "RESPONSE": ["答"]}), tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    rows, _ = recast(tmp_path, "a.parquet", data, to="chat", ask=["INSTRUCTION"], answer="RESPONSE")
    assert chats(tmp_path, rows) == [[("user", "问"), ("assistant", "答")]]
    with pytest.raises(DataError, match="is no valid parquet file"):
        recast(tmp_path, "b.parquet", data[:-20], to="chat", ask=["INSTRUCTION"], answer="RESPONSE")


def test_running_text_from_several_fields(tmp_path: Path) -> None:
    records = [{"title": "题", "content": "文"}, {"title": "", "content": "只有文"}, {"other": 1}]
    rows, counts = recast(tmp_path, "a.json", lines(*records), to="text", text=["title", "content"])
    assert [r["text"] for r in rows] == ["题\n文", "只有文"] and counts["skipped"] == 1


def test_turns_and_marked_dialogues(tmp_path: Path) -> None:
    turns = [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]
    rows, _ = recast(tmp_path, "a.jsonl", lines({"conversation": turns}), to="turns", turns="conversation")
    want = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert chats(tmp_path, rows) == [want]
    record = {"instruction": "Human:a\nAssistant:b\nHuman: c\nAssistant:", "input": "", "output": "d"}
    rule = {"to": "human_assistant", "ask": ["instruction"], "answer": "output"}
    rows, counts = recast(tmp_path, "b.jsonl", lines(record, {"instruction": "x", "output": "y"}), **rule)
    assert chats(tmp_path, rows) == [want] and counts["skipped"] == 1
    moss = {
        "turn_1": {"Human": "<|Human|>: a<eoh>\n", "Inner Thoughts": "None", "MOSS": "<|MOSS|>: b<eom>\n"},
        "turn_2": {"Human": "<|Human|>: c<eoh>\n", "MOSS": "<|MOSS|>: d<eom>\n"},
    }
    rows, _ = recast(tmp_path, "c.jsonl", lines({"chat": moss, "meta_instruction": "You are MOSS"}), to="moss")
    assert chats(tmp_path, rows) == [want]


def test_pairs_of_marked_dialogues(tmp_path: Path) -> None:
    opening = "\n\nHuman: How?\n\nAssistant: So.\n\nHuman: And then?"
    good = {"chosen": f"{opening}\n\nAssistant: Thus.\nSee: below.", "rejected": f"{opening}\n\nAssistant: No."}
    same = {"chosen": f"{opening}\n\nAssistant: No.", "rejected": f"{opening}\n\nAssistant: No."}
    rows, counts = recast(tmp_path, "a.jsonl", lines(good, same), to="human_assistant")
    assert counts["skipped"] == 1 and len(rows[0]["prompt"]) == 3
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "Thus.\nSee: below."}]
    records = [{"q": "问", "y": "好", "n": "差"}, {"q": "问", "y": "好", "n": "好 "}]
    rule = {"to": "preference", "ask": ["q"], "chosen": "y", "rejected": "n"}
    rows, counts = recast(tmp_path, "b.jsonl", lines(*records), **rule)
    assert rows[0]["prompt"] == "问" and rows[0]["chosen"] == "好" and rows[0]["rejected"] == "差"
    assert counts["skipped"] == 1


def test_trees_follow_the_best_rank(tmp_path: Path) -> None:
    def node(role: str, text: str, *replies: Any, **more: Any) -> dict[str, Any]:
        return {"role": role, "text": text, "lang": "zh-CN", "replies": list(replies), **more}

    worse = node("assistant", "bad", rank=1)
    better = node("assistant", "b", node("prompter", "c", rank=0), rank=0)
    gone = node("assistant", "gone", rank=-1, deleted=True)
    tree = {"prompt": node("prompter", "a", worse, better, gone)}
    other = {"prompt": node("prompter", "a", better) | {"lang": "es"}}
    rows, counts = recast(tmp_path, "a.jsonl", lines(tree, other, {"x": 1}), to="oasst")
    assert chats(tmp_path, rows) == [[("user", "a"), ("assistant", "b")]]
    assert counts["skipped"] == 1 and rows[0]["lang"] == "zh"


def test_questions_for_evaluation(tmp_path: Path) -> None:
    head = "id,Question,A,B,C,D,Answer\n"
    text = f"{head}0,黄鹂是什么？,鸟,鱼,树,石,A\n1,秘密？,a,b,c,d,\n2,?,a,b,c,d,E\n".encode()
    rows, counts = recast(tmp_path, "a.csv", text, to="choices")
    assert rows[0]["messages"][0]["content"] == "黄鹂是什么？\nA. 鸟\nB. 鱼\nC. 树\nD. 石"
    assert rows[0]["answers"] == ["A", "A. 鸟", "鸟"] and rows[1]["answers"] == [] and counts["skipped"] == 1
    listed = {"question": "2+2?", "choices": ["3", "4"], "answer": 1}
    rows, _ = recast(tmp_path, "b.jsonl", lines(listed), to="choices")
    assert rows[0]["answers"] == ["B", "B. 4", "4"]
    sums = {"question": "How many?", "answer": "So 1,000 + 72.\n#### 1,072"}
    rows, _ = recast(tmp_path, "c.jsonl", lines(sums), to="gsm8k")
    assert rows[0]["answers"] == ["1,072", "1072"]
    qas = [{"question": "谁？", "answers": [{"text": "黄鹂"}, {"text": "黄鹂"}]}, {"question": "?", "answers": []}]
    squad = {"version": "1", "data": [{"paragraphs": [{"context": "黄鹂鸣。", "qas": qas}]}]}
    rows, _ = recast(tmp_path, "d.json", json.dumps(squad).encode(), to="squad")
    assert [(r["messages"][0]["content"], r["answers"]) for r in rows] == [("黄鹂鸣。\n谁？", ["黄鹂"])]
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))
    assert len(read_questions(tmp_path / "rows.jsonl")) == 1


def test_xml_of_questions(tmp_path: Path) -> None:
    pair = "<QAPair><Question>What is {0}?</Question><Answer>{1}</Answer></QAPair>"
    document = (
        f"<Document><QAPairs>{pair.format('gout', 'It &lt;hurts&gt;.')}{pair.format('x', '')}</QAPairs></Document>"
    )
    rows, counts = recast(tmp_path, "a.xml", document.encode(), to="medquad")
    assert chats(tmp_path, rows) == [[("user", "What is gout?"), ("assistant", "It <hurts>.")]]
    rows, counts = recast(tmp_path, "b.xml", b"<Document><QA", to="medquad")
    assert rows == [] and counts["skipped"] == 1


def test_rewritten_sets_keep_their_originals_out_of_sight(server: Server) -> None:
    put(server, {"a.json": lines({"content": "一"}, {"x": 1}), "b.json": lines({"content": "二"})})
    about = entry(recast={"to": "text", "text": ["content"]})
    result = bring(server, about)
    assert sorted(p.name for p in expand([result.folder])) == ["a.jsonl.zst", "b.jsonl.zst"]
    assert [p.name for p in result.outputs] == ["a.jsonl.zst", "b.jsonl.zst"]
    assert (result.rows, result.skipped) == (2, 1) and "line 2" in result.examples[0]
    assert (result.folder / ".original" / "a.json").exists()
    assert "2 records rewritten as JSON lines by Oriole's rule 'text', 1 that did not fit left out" in (
        result.folder / "README"
    ).read_text(encoding="utf-8")
    stamps = [p.stat().st_mtime_ns for p in result.outputs]
    again = bring(server, about)
    assert (again.rows, again.skipped, again.downloaded) == (2, 1, 0)
    assert [p.stat().st_mtime_ns for p in again.outputs] == stamps  # nothing is rewritten twice
    assert bring(server, about, out="raw", convert=False).outputs == [Path("raw/a.json"), Path("raw/b.json")]
    put(server, {"a.json": lines({"body": "一"})}, repo="o/changed")
    with pytest.raises(DataError, match=r"no record of 'mini' could be rewritten .*; the set has changed its form"):
        bring(server, entry(hub="o/changed", recast={"to": "text", "text": ["content"]}), out="changed")


LONG = (
    "黄鹂在柳树上唱歌，河水慢慢地流过村子，孩子们在桥上数着落下的叶子。老人坐在门口，看着远处的山，说起很久以前的事情。"
)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "text": ({"content": LONG}, {"to": "text", "text": ["content"]}),
    "chat": ({"q": "黄鹂在哪里唱歌？", "a": LONG}, {"to": "chat", "ask": ["q"], "answer": "a"}),
    "preference": ({"prompt": "黄鹂在哪里？", "chosen": LONG, "rejected": "不知道。"}, None),
    "eval": ({"question": "2+2?", "answer": "So it is.\n#### 4"}, {"to": "gsm8k"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_commands_that_are_named_next_work(server: Server, kind: str) -> None:
    record, rule = KINDS[kind]
    put(server, {"a.jsonl": lines(record)})
    (command,) = bring(server, entry(kind=kind, recast=rule)).following
    Path("in.jsonl").write_bytes(lines({"text": LONG}))
    words = command.replace("IN...", "in.jsonl").replace("OUT", "out").split()
    assert words[0] == "oriole"
    done = CliRunner().invoke(cli.app, [*words[1:], "workers=1", "rules=light", "--json"])
    assert done.exit_code == 0, done.output or done.exception
    assert list(Path().glob("clean/mini/*.jsonl.zst")) or list(Path().glob("out/*.jsonl.zst"))


def test_files_that_differ_in_their_endings_only_stay_two(server: Server) -> None:
    put(server, {"a.json": lines({"content": "一"}), "a.csv": b"id,content\n1,two\n"})
    result = bring(server, entry(recast={"to": "text", "text": ["content"]}))
    assert result.rows == 2 and {d.text for d in read_docs(result.outputs)} == {"一", "two"}


def zipped(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return out.getvalue()


def test_archives_become_one_file_for_each_folder(server: Server) -> None:
    head = b"id,question,A,B,C,D,answer\n"
    inside = {
        "val/law.csv": head + b"0,q1,a,b,c,d,A\n",
        "val/art.csv": head + b"0,q2,a,b,c,d,B\n",
        "test/art.csv": head + b"0,q3,a,b,c,d,\n",
        "readme.md": b"x",
    }
    put(server, {"exam.zip": zipped(inside)})
    result = bring(server, entry(kind="eval", recast={"to": "choices"}))
    assert [p.name for p in result.outputs] == ["test.jsonl.zst", "val.jsonl.zst"] and result.rows == 3
    unpacked = Path("data/mini/.original/exam.zip.d/val/law.csv")
    stamp = unpacked.stat().st_mtime_ns
    bring(server, entry(kind="eval", recast={"to": "choices"}))
    assert unpacked.stat().st_mtime_ns == stamp  # nothing is unpacked twice
    inside["val/law.csv"] = inside["val/law.csv"].replace(b"q1", b"Q1")  # a new version of the same size
    put(server, {"exam.zip": zipped(inside)}, commit=SECOND)
    bring(server, entry(kind="eval", recast={"to": "choices"}))
    assert b"Q1" in unpacked.read_bytes()
    assert result.following == ["oriole data clean IN... OUT decontaminate=data/mini"]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        info = tarfile.TarInfo("d/a.jsonl")
        data = lines({"text": "tar"})
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("d/b.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    put(server, {"x.tar.gz": out.getvalue()}, repo="o/tar")
    result = bring(server, entry(hub="o/tar"), out="tar")
    assert [d.text for d in read_docs(result.outputs)] == ["tar"] and not Path("tar/d/b.jsonl").exists()


def test_archives_that_are_not_to_be_trusted(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(zipped({"../out.jsonl": b"x"}))
    with pytest.raises(DataError, match=r"'\.\./out\.jsonl' cannot be written safely"):
        unpack(path, tmp_path / "in", lambda name: True)
    assert not (tmp_path / "out.jsonl").exists()
    path.write_bytes(zipped({f"{n}.txt": b"\0" * (64 << 20) for n in range(3)}))  # 192 MB in 200 kB
    with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
        unpack(path, tmp_path / "in", lambda name: True)
    path.write_bytes(zipped({"a.txt": random.Random(0).randbytes(1000)})[:-200])
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(path, tmp_path / "in", lambda name: True)


# --- the catalogue ---------------------------------------------------------------------------------------------------

SETS = list(catalogue().values())


@pytest.mark.parametrize("about", SETS, ids=lambda e: e.name)
def test_every_entry(about: Entry) -> None:
    assert about.kind in get_args(Kind) and about.licence and about.title and about.format
    assert about.name == about.name.lower() and " " not in about.name and "/" not in about.name
    assert bool(about.hub or about.modelscope) != bool(about.links), "on a hub or by links"
    assert about.hub.count("/") == (1 if about.hub else 0)
    assert len(addresses(about)) >= 2 or "one address" in about.trap, "two mirrors, or said that there is one"
    assert about.homepage.startswith("https://")
    for link in about.links:
        assert link.addresses and all(a.startswith("https://") for a in link.addresses)
        assert link.sha256 is None or (len(link.sha256) == 64 and about.verified.checksum)
    if about.bytes is not None or about.rows is not None:
        assert about.verified.size, "a size needs its source"
    assert about.recast is None or about.recast.to in _RULES
    assert about.name in describe(about) and about.licence in describe(about)


def test_the_catalogue_holds_what_the_earlier_systems_were_trained_on() -> None:
    assert len(SETS) == len({e.name for e in SETS}) == len(json.loads(catalogue_module.CATALOGUE.read_text())["sets"])
    used = {system for about in SETS for system in about.used_by}
    assert used == {"ChatLM", "Phi2-mini-Chinese", "KHAOSZ", "mini-ChatGPT-Chinese", "HaoAI", "MiniMind"}
    assert {e.kind for e in SETS} == set(get_args(Kind))
    for languages in ("zh", "en"):
        assert all(any(e.kind == kind and languages in e.languages for e in SETS) for kind in get_args(Kind))


def test_a_catalogue_that_is_not_right() -> None:
    good = entry().model_dump(mode="json")
    for sets, said in (
        ([good, good], "two entries named 'mini'"),
        ([good | {"kind": "music"}], "entry 'mini' is not right"),
        ([good | {"license": "x"}], "entry 'mini' is not right"),
    ):
        with pytest.raises(DataError, match=said):
            parse(json.dumps({"schema": 1, "sets": sets}))
    with pytest.raises(DataError, match="schema 2, this version reads 1"):
        parse(json.dumps({"schema": 2, "sets": []}))


def test_names_that_are_nearly_right() -> None:
    known = {n: entry(name=n) for n in ("belle-0.5m", "belle-1m", "tinystories")}
    with pytest.raises(DataError, match=r"no data set 'bele-1m'; did you mean belle-1m"):
        find("bele-1m", known)
    with pytest.raises(DataError, match="`oriole data fetch` lists"):
        find("zzz", known)


def test_the_command_lists_shows_and_complains() -> None:
    run = CliRunner().invoke
    listed = run(cli.app, ["data", "fetch"])
    assert listed.exit_code == 0 and all(e.name in listed.output for e in SETS)
    assert listed.stdout.strip() == table(SETS).strip()
    narrow = json.loads(run(cli.app, ["data", "fetch", "kind=preference", "lang=zh", "--json"]).output)
    assert narrow and all(e["kind"] == "preference" and "zh" in e["languages"] for e in narrow)
    shown = run(cli.app, ["data", "fetch", SETS[0].name, "show=true"]).output
    assert SETS[0].licence in shown and "verified" in shown
    for words, said in (
        (["kinds=chat"], "the list knows no 'kinds'"),
        (["kind=music"], "kind=music is none of text, chat"),
        ([SETS[0].name, "show=true", "prox=x"], "unknown key 'prox'; did you mean 'proxy'"),
        (["no-such-set"], "no data set 'no-such-set'"),
    ):
        result = run(cli.app, ["data", "fetch", *words])
        assert isinstance(result.exception, ConfigError | DataError) and said in str(result.exception)


def test_the_command_fetches(server: Server) -> None:
    put(server, FILES)
    process = start(server)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert out == "oriole data clean data/mini clean/mini\n" and "data/mini/README" in said
