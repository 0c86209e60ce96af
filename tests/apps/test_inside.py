"""`oriole inspect RUN TEXT`: its figures are the model's, its page is whole, offline and safe from its text."""

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from oriole import cli
from oriole.apps.api import Oriole
from oriole.apps.inside import InsideConfig, describe, kind_of, spelled, split_characters
from oriole.apps.insidedraw import alone, attention_cells, attention_map, grid, layers_chart, plane, strip
from oriole.apps.insidepage import page
from oriole.apps.insidetext import show
from oriole.errors import ConfigError, DataError, ModelError
from oriole.model.config import ModelConfig
from oriole.model.folder import save_model
from oriole.model.lm import LM
from oriole.model.seq2seq import Seq2Seq
from oriole.model.seq2seqconfig import Seq2SeqConfig
from oriole.model.seq2seqfolder import save_seq2seq
from oriole.text.tokenizer import Tokenizer

TEXT = InsideConfig(mode="text")
HOSTILE = "</text></script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e'\"&amp;"


class Reader(HTMLParser):
    """Tags with attributes, the words a reader sees, and what the scripts hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.scripts, self.open = "", list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "rect", "circle", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.words += data


@pytest.fixture(scope="module")
def made(oriole: Oriole) -> dict[str, Any]:
    return describe(oriole, "两个黄鹂 sing 鹂", TEXT)


def test_every_figure_is_what_the_model_computes(oriole: Oriole, made: dict[str, Any]) -> None:
    ids = oriole.tokenizer.encode("两个黄鹂 sing 鹂")
    with torch.no_grad():
        logits = oriole.model.head("logits", oriole.model(torch.tensor([ids])).h)[0]
    p = logits.softmax(-1)
    assert [token["id"] for token in made["tokens"]] == ids and made["written"] == len(ids)
    for t, what in enumerate(made["next"]):
        best = p[t].topk(10)
        assert [word for word, _ in what["top"]] == [spelled(oriole.tokenizer, int(i)) for i in best.indices]
        assert [chance for _, chance in what["top"]] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert what["entropy"] == pytest.approx(-sum(x * math.log(x) for x in p[t].tolist() if x > 0), abs=1e-3)
        if t + 1 < len(ids):
            assert what["loss"] == pytest.approx(-math.log(p[t, ids[t + 1]].item()), abs=1e-3)
            assert what["rank"] == 1 + int((p[t] > p[t, ids[t + 1]]).sum())
    assert made["next"][-1]["loss"] is None
    assert made["lens"][-1][3] == [[word, pytest.approx(c, abs=1e-4)] for word, c in made["next"][3]["top"][:5]]
    assert all(sum(row) == pytest.approx(1, abs=2e-3) for layer in made["attention"] for head in layer for row in head)
    assert [len(row) for row in made["attention"][1][3]] == list(range(1, len(ids) + 1))
    norms = oriole.model.embedding.weight[torch.tensor(ids)].norm(dim=1).tolist()
    assert made["embedding"]["norms"] == pytest.approx(norms, abs=1e-3)
    assert made["residual"][0] == pytest.approx(norms, abs=1e-3)


def test_a_question_is_asked_in_its_roles_and_answered(oriole: Oriole) -> None:
    made = describe(oriole, "两个黄鹂", InsideConfig(answer=6))
    words = [token["text"] for token in made["tokens"]]
    assert words[0] == "<|im_start|>" and words[: made["written"]].count("<|im_end|>") == 1
    assert len(words) - made["written"] <= 6
    prompt = [token["id"] for token in made["tokens"]][: made["written"]]
    greedy = oriole.model.head("logits", oriole.model(torch.tensor([prompt])).h)[0, -1, : oriole.tokenizer.vocab_size]
    assert made["tokens"][made["written"]]["id"] == int(greedy.argmax())
    assert all(what["rank"] == 1 for what in made["next"][made["written"] - 1 : -1])


def test_characters_over_several_tokens_are_found() -> None:
    bird = "鹂".encode()
    assert split_characters(["黄".encode(), bird[:2], bird[2:], b"a"]) == [("鹂", 1, 2)]
    assert split_characters([bird[:1], bird[1:2], bird[2:] + "🐦".encode()[:2], "🐦".encode()[2:]]) == [
        ("鹂", 0, 2), ("🐦", 2, 3),
    ]  # fmt: skip
    assert split_characters([b"\xff", bird[:2], b"\xff", bird[2:]]) == []  # a role token between: no character


def test_tokens_are_spelt_for_people(tokenizer: Tokenizer) -> None:
    byte = {b: 16 + b for b in range(256)}
    assert spelled(tokenizer, byte[0xE9]) == "⟨E9⟩" and kind_of(tokenizer, byte[0xE9]) == "bytes"
    assert spelled(tokenizer, 1) == "<|im_start|>" and kind_of(tokenizer, 1) == "mark"
    assert spelled(tokenizer, tokenizer.vocab_size) == f"⟨id {tokenizer.vocab_size}⟩"
    (bird,) = tokenizer.encode("鹂")
    assert spelled(tokenizer, bird) == "鹂" and kind_of(tokenizer, bird) == "zh"


def test_the_page_has_every_section_and_one_known_script(made: dict[str, Any]) -> None:
    text = page(made)
    reader = Reader(text)
    assert not reader.open
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == ["Tokens", "Embeddings", "Attention", "Residual stream", "Logit lens", "What comes next"]
    assert not [tag for tag, _ in reader.tags if tag in ("img", "link", "iframe", "object")] and "http:" not in text
    data, code = reader.scripts
    import hashlib

    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    maps = [base64.b64decode(m) for m in json.loads(data)["maps"]]
    size = len(made["tokens"])
    assert len(maps) == made["layers"] * made["heads"] and {len(m) for m in maps} == {size * (size + 1) // 2}
    assert [round(255 * w) for w in made["attention"][1][2][4]] == list(maps[made["heads"] + 2][10:15])
    assert [a for tag, a in reader.tags if tag == "button"][5]["aria-label"] == "layer 2, head 2"


def test_a_model_that_reasons_has_a_section_of_its_steps(tokenizer: Tokenizer, tmp_path: Path, oriole: Oriole) -> None:
    shape = oriole.model.config.model_dump() | {"reasoning": {"steps": 2}}
    save_model(LM(ModelConfig.model_validate(shape)), tmp_path, chat=False)
    tokenizer.save(tmp_path)
    made = describe(Oriole(tmp_path), "两个黄鹂", InsideConfig(answer=2))
    assert [step["lens"][-1] for step in made["steps"]][-1] == made["next"][-1]["top"][:5]
    assert all(0 < c < 1 for step in made["steps"] for c in step["confidence"])
    assert "<h2>Reasoning steps</h2>" in page(made) and "step 2" in Reader(page(made)).words


def test_hostile_text_stays_text(oriole: Oriole) -> None:
    made = describe(oriole, HOSTILE, TEXT)
    # As tokens of one character, and as one token: whatever the vocabulary, and the folder's name as well.
    made["model"] = f"/runs/{HOSTILE}"
    made["tokens"][0]["text"] = HOSTILE
    made["lens"][0][0][0][0] = made["next"][0]["top"][0][0] = HOSTILE
    made["split"] = [{"text": "<b onclick=x>", "from": 1, "to": 2}]
    reader = Reader(page(made))
    assert not reader.open and len(reader.scripts) == 2
    assert not [a for _, attrs in reader.tags for a in attrs if a.startswith("on")]
    assert not [tag for tag, _ in reader.tags if tag == "img"]
    assert "\u202e" not in page(made) and "alert(1)" in reader.words


@pytest.mark.parametrize("text", ["两", "sing", "黄黄黄黄"])
def test_a_text_of_one_token_or_of_one_kind_has_a_page(oriole: Oriole, text: str) -> None:
    made = describe(oriole, text, TEXT)
    assert made["embedding"]["map"] is None
    assert not Reader(page(made)).open
    console = Console(record=True, file=open("/dev/null", "w"), width=100)
    with console.file:
        show(made, console)
        assert "after the last token, by depth" in console.export_text()


def test_what_cannot_be_looked_at_is_named(
    oriole: Oriole, save_tiny: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="the text is empty"):
        describe(oriole, "", TEXT)
    with pytest.raises(ModelError, match=r"the text has \d+ tokens, the model's context is 160; give a shorter one"):
        describe(oriole, "两个黄鹂鸣翠柳" * 80, TEXT)
    with pytest.raises(ModelError, match=r"\d+ tokens in its roles, the model's context is 160"):
        describe(oriole, "两个黄鹂鸣翠柳" * 80, InsideConfig())
    long = Oriole(save_tiny(tmp_path / "long", context=1024))
    with pytest.raises(ModelError, match="a page of attention maps shows at most 256"):
        describe(long, "x" * 300, TEXT)
    pretrained = Oriole(save_tiny(tmp_path / "pre", chat=False))
    assert describe(pretrained, "两个", InsideConfig())["mode"] == "text"
    with pytest.raises(ModelError, match="cannot chat yet"):
        describe(pretrained, "两个", InsideConfig(mode="question"))
    shape = oriole.model.config.model_copy(update={"tie_embeddings": True})
    save_model(LM(shape, heads=("reward",)), tmp_path / "rm", chat=True)
    small = {"vocab_size": tokenizer.vocab_size, "dim": 16, "encoder_layers": 1, "decoder_layers": 1, "num_heads": 2}
    save_seq2seq(Seq2Seq(Seq2SeqConfig.model_validate(small | {"ffn_dim": 16})), tmp_path / "two", chat=True)
    tokenizer.save(tmp_path / "two", chat=True)
    with pytest.raises(ModelError, match="holds an encoder-decoder; oriole inspect looks inside decoder-only models"):
        describe(Oriole(tmp_path / "two"), "两个", TEXT)
    with pytest.raises(ModelError, match="holds a reward model: it scores answers and cannot write any"):
        Oriole(tmp_path / "rm")


def test_the_command_writes_the_page_or_prints_json(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["oriole", "inspect", str(model_folder), "两个黄鹂", "answer=3", "html=out/p.html"]
    )
    with pytest.raises(SystemExit) as done:
        cli.app()
    out = capsys.readouterr()
    assert done.value.code == 0 and "likeliest next" in out.out and "out/p.html" in out.err.replace("\n", "")
    assert (tmp_path / "out" / "p.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    cli.inspect(model_folder, "两个黄鹂", ["mode=text"], as_json=True)
    assert json.loads(capsys.readouterr().out)["mode"] == "text"
    assert not (tmp_path / "inspect.html").exists()
    with pytest.raises(ConfigError, match="did you mean 'answer'"):
        cli.inspect(model_folder, "两", ["anser=3"])


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_cells_of_one_shade_are_one_stroke_and_nothing_is_drawn_of_nothing() -> None:
    drawn = attention_cells([[1.0], [0.0, 1.0], [0.5, 0.5, 0.0]])
    paths = dict(re.findall(r'opacity="([\d.]+)" d="([^"]*)"', drawn))
    assert paths["1.00"] == "M0 0.5h1M1 1.5h1"
    assert [d for shade, d in paths.items() if shade != "1.00"] == ["M0 2.5h2"]


def test_a_picture_stands_alone(made: dict[str, Any]) -> None:
    import xml.etree.ElementTree as ET

    words = [token["text"] for token in made["tokens"]]
    pictures = [
        strip(made["tokens"], [{"text": "鹂", "from": 0, "to": 1}]),
        attention_map(made["attention"][0][0], words, "a head"),
        grid([[("<b>", 0.5, "x & y")]], ["layer 1"], ["一"], "a grid"),
        plane([[0.0, 1.0], [1.0, 0.0], [1.0, 0.01]], ["一", "two", "<b>"], ["zh", "en", "bytes"], "points"),
        layers_chart({"a": [(0, 1.0), (1, 2.0)], "b": [(1, 2.0)]}, "norm"),
    ]
    for picture in pictures:
        root = ET.fromstring(alone(picture))
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and float(root.attrib["width"]) > 30
        assert "prefers-color-scheme:dark" in alone(picture)
