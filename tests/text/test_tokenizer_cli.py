"""The verbs of `oriole tokenizer`: what they print, what they write, and one sentence for each mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from oriole.cli import app
from oriole.errors import ConfigError, DataError, ModelError, OrioleError
from oriole.text.tokenizer import Tokenizer


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["tokenizer", *map(str, words)], env={"COLUMNS": "160", "TERM": "dumb"})


def ok(*words: str | Path) -> str:
    result = run(*words)
    if result.exception:
        raise result.exception
    return result.stdout


def fails(kind: type[OrioleError], message: str, *words: str | Path) -> str:
    result = run(*words)
    assert isinstance(result.exception, kind), result.output
    assert re.search(message, str(result.exception)), result.exception
    assert "\n" not in str(result.exception)
    return result.stdout


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    zh = "春天来了，柳树发芽，两只黄鹂在枝头唱歌。小河的冰化了，孩子们在河边放风筝。"
    en = "Spring has come. Two orioles sing in the willow, and the children fly kites by the river. "
    for lang, text in (("zh", zh), ("en", en)):
        rows = [{"text": f"{i}: {text[i % 9 :]}", "source": f"{lang}-{i % 2}"} for i in range(80)]
        (folder / f"{lang}.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    return folder


@pytest.fixture
def folder(tok: Tokenizer, tmp_path: Path) -> Path:
    tok.save(tmp_path / "run" / "tokenizer", chat=True, context=99)
    return tmp_path / "run" / "tokenizer"


# --- train -----------------------------------------------------------------------------------------------------------


def test_train(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    made = json.loads(ok("train", data / "zh.jsonl", f"{data}/e*.jsonl", f"out={out}", "vocab_size=400", "--json"))
    tokenizer = Tokenizer.load(out)
    assert made["vocab_size"] == tokenizer.vocab_size == 400 and made["kind"] == "bpe"
    assert made["fingerprint"] == tokenizer.fingerprint()
    assert len(tokenizer.encode("两只黄鹂")) < 12 and len(tokenizer.encode(" orioles")) < 8
    assert ok("check", out)
    fails(ConfigError, "holds a tokenizer already", "train", data, f"out={out}", "vocab_size=300")
    ok("train", data, f"out={tmp_path / 'seed'}", "vocab_size=400", "sample_mb=0.004", "seed=1")
    assert Tokenizer.load(tmp_path / "seed").fingerprint() != tokenizer.fingerprint()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def talk(user: str, assistant: str, **more: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant, **more}]


def test_chats_and_pairs_are_text_to_learn_from_and_to_measure(data: Path, tmp_path: Path) -> None:
    asked = [talk(f"谁在唱歌？{i}", "willowsong 黄鹂。", reasoning_content="thoughtful") for i in range(60)]
    system = {"role": "system", "content": "bespectacled"}
    write(data / "chat.jsonl", [{"conversations": [system, *messages]} for messages in asked])
    write(data / "pairs.jsonl", [{"prompt": f"{i}?", "chosen": "marvellous", "rejected": "abysmal"} for i in range(60)])
    write(data / "marks.jsonl", [{"completion": "zigzagging", "prompt": f"{i}?", "label": True} for i in range(60)])
    write(
        data / "rendered.jsonl",
        [{"text": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"}] * 90,
    )
    out = tmp_path / "new"
    ok("train", data, f"out={out}", "vocab_size=470")
    tok = Tokenizer.load(out)
    for word in ("willowsong", "thoughtful", "bespectacled", "marvellous", "abysmal", "zigzagging"):
        assert len(tok.encode(word)) <= 2, word
    assert len(tok.encode("im_start")) > 2, "role marks are no text to learn"
    made = json.loads(ok("report", out, data, "--json"))
    docs = {row["source"]: row["docs"] for row in made["sources"]}
    assert (docs["chat"], docs["pairs"], docs["marks"], docs["rendered"], docs["zh-0"]) == (60, 60, 60, 90, 40)

    chats = data / "chat.jsonl"
    chats.write_text('{"conversations": 3}\n' + chats.read_text("utf-8"), "utf-8")
    fails(DataError, r"chat\.jsonl, line 1", "report", out, chats)
    made = json.loads(ok("report", out, chats, data / "zh.jsonl", "skip_bad=true", "--json"))
    assert {row["source"] for row in made["sources"]} == {"zh-0", "zh-1"}


def test_train_characters(data: Path, tmp_path: Path) -> None:
    result = run("train", data, f"out={tmp_path / 'new'}", "kind=char")
    assert result.exit_code == 0 and "a model for it needs vocab_size=" in result.stderr
    tokenizer = Tokenizer.load(tmp_path / "new")
    assert tokenizer.kind == "char" and len(tokenizer.encode("两只黄鹂在唱 two")) == 10
    assert str(tokenizer.vocab_size) in result.stderr


def test_train_leaves_out_bad_records_only_when_told(data: Path, tmp_path: Path) -> None:
    with (data / "en.jsonl").open("a") as file:
        file.write('\n{"text": \n')
    words = ("train", data, f"out={tmp_path / 'new'}", "vocab_size=300")
    fails(DataError, r"en\.jsonl, line 81", *words)
    assert not (tmp_path / "new").exists()
    assert "1 records were left out" in run(*words, "skip_bad=true").stderr


def test_mistakes_in_training(data: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'new'}"
    fails(ConfigError, "'out' is missing", "train", data)
    fails(ConfigError, "did you mean 'vocab_size'", "train", data, out, "vocabsize=300")
    fails(ConfigError, "vocab_size = 100", "train", data, out, "vocab_size=100")
    fails(ConfigError, "kind = 'word'", "train", data, out, "kind=word")
    fails(ConfigError, "name the text", "train", out)
    fails(DataError, r"at most [\d,]+ ids, not 50,000", "train", data, out, "vocab_size=50000")
    fails(DataError, "nowhere", "train", tmp_path / "nowhere.jsonl", out)


# --- show ------------------------------------------------------------------------------------------------------------


def test_show(folder: Path, tok: Tokenizer) -> None:
    rows = json.loads(ok("show", folder, "两个 sing🦜", "--json"))
    assert [row["id"] for row in rows] == tok.encode("两个 sing🦜")
    text = ok("show", folder.parent, "a\t🦜")  # the run's folder will do
    assert "⇥" in text and "byte 4 of 🦜" in text and "characters a token" in text
    assert "[bold]" in ok("show", folder, "[bold]x").replace("·", " ").replace("\n", "")  # text is not markup
    assert "1 tokens, 1 characters" in ok("show", folder, "=")
    assert "0 tokens" in ok("show", folder, "")


def test_show_the_vocabulary(folder: Path) -> None:
    assert "several Han characters" in ok("show", folder)
    assert json.loads(ok("show", folder, "--json"))["vocab_size"] == 900
    fails(ModelError, "no tokenizer at", "show", folder / "nowhere")


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_says_what_failed_and_exits_with_2(folder: Path) -> None:
    assert json.loads(ok("check", folder, "--json"))["ok"] is True
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    out = fails(ModelError, "fails 1 of 26 checks: template: the file renders the same", "check", folder, "--json")
    assert [f["name"] for f in json.loads(out)["findings"] if not f["ok"]] == ["template: the file renders the same"]
    assert "✗" in fails(ModelError, "renders", "check", folder.parent)
    done = subprocess.run(
        [sys.executable, "-m", "oriole.cli", "tokenizer", "check", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()
    assert len(last) == 1 and last[0].startswith("oriole: ") and "template" in last[0]


# --- add -------------------------------------------------------------------------------------------------------------


def test_add(folder: Path, tok: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "more"
    result = run("add", folder, "白鹭", "a=b", "e", f"out={out}")
    assert result.exit_code == 0 and result.stdout == "900\t白鹭\n901\ta=b\n"
    assert "grow its embedding by 2 rows" in result.stderr and "in the vocabulary already: e" in result.stderr
    again = Tokenizer.load(out)
    assert again.encode("白鹭") == [900]
    assert [again.token_bytes(i) for i in range(900)] == [tok.token_bytes(i) for i in range(900)]
    config = json.loads((out / "tokenizer_config.json").read_text("utf-8"))
    assert config["eos_token"] == "<|im_end|>" and config["model_max_length"] == 99  # as in the folder it came from
    assert ok("check", out)
    made = json.loads(ok("add", out, "青天", f"out={out}", "--json"))  # in place is allowed: ids only grow
    assert made == {"out": str(out), "vocab_size": 903, "before": 902, "added": {"青天": 902}, "known": []}


def test_mistakes_in_adding(folder: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'more'}"
    fails(ConfigError, "at least one token and one out=DIR", "add", folder, "白鹭")
    fails(ConfigError, "at least one token and one out=DIR", "add", folder, out)
    fails(ConfigError, "nothing to add", "add", folder, "e", out)
    fails(ConfigError, "reserved <think>", "add", folder, "<think>", out)
    assert not (tmp_path / "more").exists()
    Tokenizer([]).save(tmp_path / "more")
    fails(ConfigError, "holds another tokenizer", "add", folder, "白鹭", out)
    (folder / "tokenizer_config.json").write_text("{")
    fails(ModelError, "cannot be read", "add", folder, "白鹭", f"out={tmp_path / 'third'}")


# --- report ----------------------------------------------------------------------------------------------------------


def test_report(folder: Path, data: Path, tmp_path: Path) -> None:
    Tokenizer([]).save(tmp_path / "bytes")
    peer = tmp_path / "bytes" / "tokenizer.json"
    made: dict[str, Any] = json.loads(ok("report", folder, data, f"peer={peer}", "--json"))
    assert set(made["languages"]) == {"zh", "en"} and len(made["sources"]) == 4
    for row in made["sources"]:
        assert row["peers"][str(peer)]["tokens"] == row["bytes"] > row["tokens"]
    text = ok("report", folder, data, f"peer=['{peer}', '{tmp_path / 'bytes'}']")
    for words in ("zh-0", "chars/token", "bytes", "no text by themselves", "begins", "Of 900 ids this text uses"):
        assert words in text, words
    fails(ConfigError, "unknown key 'pear'", "report", folder, data, "pear=x")
    fails(ModelError, "no tokenizer at", "report", folder, data, f"peer={tmp_path / 'nowhere'}")


def test_every_verb_has_an_example() -> None:
    for verb in ("train", "show", "check", "add", "report"):
        assert f"Example: oriole tokenizer {verb}" in ok(verb, "--help")
