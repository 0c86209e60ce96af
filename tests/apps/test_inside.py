"""`oriole inspect RUN TEXT`: its figures are the model's, its page is whole, offline and safe from its text."""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from oriole import cli
from oriole.apps.api import Oriole
from oriole.apps.inside import InsideConfig, describe, kind_of, spelled, split_characters
from oriole.apps.insidedraw import (
    alone,
    attention_cells,
    attention_map,
    expert_map,
    grid,
    layers_chart,
    plane,
    sign,
    strip,
)
from oriole.apps.insidepage import page
from oriole.apps.insidetext import show
from oriole.errors import ConfigError, DataError, ModelError
from oriole.model.config import ModelConfig
from oriole.model.folder import save_model
from oriole.model.lm import LM
from oriole.model.seq2seq import START, Seq2Seq
from oriole.model.seq2seqconfig import Seq2SeqConfig
from oriole.model.seq2seqfolder import save_seq2seq
from oriole.text.tokenizer import Tokenizer

TEXT = InsideConfig(mode="text")
CLASSIC: dict[str, Any] = {
    "norm": "layer", "norm_at": "post", "positions": "sinusoid", "activation": "relu", "biases": True, "qk_norm": False,
}  # fmt: skip
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


SAVED = Callable[..., Oriole]


@pytest.fixture
def save_two(tokenizer: Tokenizer, tmp_path: Path) -> SAVED:
    """`save_two(chat=…, **shape)`: a tiny encoder-decoder, loaded."""

    def save(*, chat: bool = True, **shape: Any) -> Oriole:
        torch.manual_seed(4)
        base = {"vocab_size": tokenizer.vocab_size, "dim": 16, "encoder_layers": 1, "decoder_layers": 2, "num_heads": 2,
                "ffn_dim": 16, "context": 96, "init_std": 0.3}  # fmt: skip
        save_seq2seq(Seq2Seq(Seq2SeqConfig.model_validate(base | shape)), tmp_path / "two", chat=chat)
        tokenizer.save(tmp_path / "two", chat=chat)
        return Oriole(tmp_path / "two")

    return save


@pytest.fixture
def mixture(oriole: Oriole, tokenizer: Tokenizer, tmp_path: Path) -> Oriole:
    """A tiny model whose second layer has four experts, two of them for a token."""
    torch.manual_seed(5)
    changes = {"pattern": "GGe", "moe": {"experts": 4, "active": 2, "ffn_dim": 16}, "init_std": 0.4}
    save_model(LM(ModelConfig.model_validate(oriole.model.config.model_dump() | changes)), tmp_path, chat=True)
    tokenizer.save(tmp_path)
    model = Oriole(tmp_path)
    model.model.backend = "eager"  # the grouped products are compiled anew for a length, which takes seconds
    return model


def printed(made: dict[str, Any]) -> str:
    """What the terminal shows."""
    console = Console(record=True, file=io.StringIO(), width=120)
    show(made, console)
    return console.export_text()


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


# --- experts ---------------------------------------------------------------------------------------------------------


def test_each_token_has_its_experts_and_each_expert_its_share(mixture: Oriole) -> None:
    made = describe(mixture, "两个黄鹂 sing", TEXT)
    (layer,) = made["experts"]
    model = mixture.model
    seen: list[torch.Tensor] = []
    hook = model.blocks[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        model(torch.tensor([[token["id"] for token in made["tokens"]]]))
        _, choice, weights = model.blocks[1].mlp.route(seen[0])
    hook.remove()
    assert layer["layer"] == 1 and layer["count"] == 4 and not layer["shared"]
    for pairs, ids, shares in zip(layer["chosen"], choice.tolist(), weights.tolist(), strict=True):
        assert dict(map(tuple, pairs)) == pytest.approx(dict(zip(ids, shares, strict=True)), abs=1e-4)
        assert pairs[0][1] >= pairs[1][1]
    used = [sum(e in [c for c, _ in pairs] for pairs in layer["chosen"]) / len(layer["chosen"]) for e in range(4)]
    assert layer["share"] == pytest.approx(used, abs=1e-4) and sum(layer["share"]) == pytest.approx(2, abs=1e-3)


def test_experts_have_a_section_and_a_table(mixture: Oriole) -> None:
    made = describe(mixture, "两个黄鹂 sing", TEXT)
    reader, (layer,) = Reader(page(made)), made["experts"]
    assert not reader.open and "<h2>Experts</h2>" in page(made)
    picks = [attrs for tag, attrs in reader.tags if tag == "button" and "data-expert" in attrs]
    assert [p["aria-label"] for p in picks] == [f"layer 2, expert {n}" for n in (1, 2, 3, 4)]
    busiest = max(range(4), key=lambda e: layer["share"][e])
    assert [p["aria-pressed"] for p in picks] == ["true" if e == busiest else "false" for e in range(4)]
    weights = json.loads(reader.scripts[1])
    assert [[[int(e), w] for e, w in token.items()] for token in weights[0]] == layer["chosen"]
    shown = printed(made)
    first = "  ".join(f"{e + 1} {100 * w:.0f}" for e, w in layer["chosen"][0])
    assert first in shown and "share of the tokens" in shown and "layer 2" in shown


def test_a_map_of_experts_has_a_cell_for_each_choice_and_a_bar_for_each_share() -> None:
    chosen = [[(0, 1.0)], [(2, 1.0)], [(2, 1.0)]]
    drawn = expert_map(chosen, [1 / 3, 0.0, 2 / 3], ["a", "b", "c"], "experts")
    (path,) = re.findall(r'opacity="1.00" d="([^"]*)"', drawn)
    assert path == "M0 0.5h1M1 2.5h2"
    assert re.findall(r'class="share"[^>]* width="([\d.]+)"', drawn) == ["32.0", "0.0", "64.0"]


def test_of_many_layers_with_experts_the_terminal_shows_the_outer_ones(made: dict[str, Any]) -> None:
    tokens = len(made["tokens"])
    layers = [{"layer": n, "count": 2, "shared": True, "chosen": [[[n % 2, 1.0]]] * tokens, "share": [0.5, 0.5]}
              for n in range(9)]  # fmt: skip
    heads = next(line for line in printed(made | {"experts": layers}).splitlines() if "layer 1" in line).split()
    assert [heads[n] for n in range(3, 15, 2)][:3] == ["1", "2", "3"] and heads[-1] == "9" and "…" in heads
    assert "5" not in heads


# --- encoder-decoders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["chat", "question"])
def test_an_encoder_decoder_reads_the_source_and_its_own_greedy_answer(save_two: SAVED, source: str) -> None:
    two = save_two(source=source)
    made = describe(two, "两个黄鹂 sing", InsideConfig(answer=7))
    read = [token["id"] for token in made["source"]["tokens"]]
    plain = two.tokenizer.encode("两个黄鹂 sing")
    assert read == plain if source == "question" else read[0] == START and len(read) > len(plain)
    ids = [token["id"] for token in made["tokens"]]
    assert ids[0] == START and made["written"] == 1 and len(ids) == 8
    with torch.no_grad():
        h = two.model(torch.tensor([ids]), source=torch.tensor([read])).h
        p = two.model.head("logits", h)[0, :, : two.tokenizer.vocab_size].softmax(-1)
    for t, what in enumerate(made["next"]):
        assert what["top"][0][1] == pytest.approx(p[t].max().item(), abs=1e-4)
        assert what["entropy"] == pytest.approx(-(p[t] * p[t].log()).nansum().item(), abs=1e-3)
        assert what["rank"] == (1 if t < 7 else None)  # the engine's cached answer is what one pass finds likeliest
    assert made["lens"][-1][2] == [[word, pytest.approx(c, abs=1e-4)] for word, c in made["next"][2]["top"][:5]]
    shapes = {"source": made["source"]["attention"], "own": made["attention"], "cross": made["cross"]}
    assert {name: (len(x), len(x[0]), len(x[0][0])) for name, x in shapes.items()} == {
        "source": (1, 2, len(read)), "own": (2, 2, 8), "cross": (2, 2, 8),
    }  # fmt: skip
    assert {len(row) for head in made["cross"][1] for row in head} == {len(read)}
    assert [len(row) for row in made["attention"][0][0]] == list(range(1, 9))
    assert len(made["embedding"]["norms"]) == len(read) + 8


def test_an_encoder_decoder_has_a_page_of_its_own_sections(save_two: SAVED) -> None:
    made = describe(save_two(), "两个鹂 sing", InsideConfig(answer=4))
    shown = printed(made)
    mean = torch.tensor([head[2] for head in made["cross"][-1]]).mean(0)
    best = sign(made["source"]["tokens"][int(mean.argmax())]["text"])
    (third,) = [line for line in shown.splitlines() if line.lstrip().startswith("3  ")]
    assert "looks most at" in shown and f"{best} {100 * mean.max():.0f}%" in third
    assert "source: " in shown and "the answer's first token, by depth" in shown
    word, chance = made["lens"][-1][0][0]
    assert shown.rstrip().endswith(f"layer 2  {sign(word)} {100 * chance:.0f}%")
    made["source"]["tokens"][3]["text"] = HOSTILE
    text = page(made)
    reader = Reader(text)
    assert not reader.open and not [tag for tag, _ in reader.tags if tag == "img"]
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Tokens", "Embeddings", "Encoder attention", "Decoder attention", "Cross-attention", "Residual stream",
        "Logit lens", "What comes next",
    ]  # fmt: skip
    read, wrote = len(made["source"]["tokens"]), len(made["tokens"])
    assert f'viewBox="0 0 {read} {wrote}"' in text.split('id="cross"')[1]  # the answer asks, the source is looked at
    encoder, own, cross = (json.loads(data) for data in reader.scripts[:3])
    assert [encoder["causal"], own["causal"], cross["causal"]] == [False, True, False]
    assert [round(255 * w) for w in made["cross"][1][0][2]] == list(
        base64.b64decode(cross["maps"][2])[2 * len(made["source"]["tokens"]) :][: len(made["source"]["tokens"])]
    )
    assert [len(each["maps"]) for each in (encoder, own, cross)] == [2, 4, 4]


def test_an_encoder_decoder_without_an_answer_shows_how_it_would_begin(save_two: SAVED) -> None:
    made = describe(save_two(**CLASSIC), "两个黄鹂", InsideConfig(mode="text", answer=0))
    assert [token["id"] for token in made["tokens"]] == [START] and made["next"][0]["loss"] is None
    assert made["norm_at"] == "post" and not Reader(page(made)).open
    assert "its head, put on the stream" in page(made) and "after the last token" in printed(made)


def test_what_an_encoder_decoder_cannot_read_is_named(save_two: SAVED) -> None:
    plain = save_two(source="question")
    with pytest.raises(DataError, match="the text is empty"):
        describe(plain, "", InsideConfig())
    with pytest.raises(ModelError, match=r"the text has \d+ tokens, the model's context is 96; give a shorter one"):
        describe(plain, "两个黄鹂鸣翠柳" * 80, InsideConfig())
    roles = save_two()
    with pytest.raises(ModelError, match=r"the text has \d+ tokens in its roles, the model's context is 96"):
        describe(roles, "两个黄鹂鸣翠柳" * 80, InsideConfig())
    mended = save_two(chat=False)
    assert describe(mended, "两个", InsideConfig(answer=1))["mode"] == "text"
    with pytest.raises(ModelError, match="cannot chat yet"):
        describe(mended, "两个", InsideConfig(mode="question"))


def test_in_a_browser_the_script_says_where_a_token_looks_and_what_an_expert_gets(
    save_two: SAVED, tmp_path: Path
) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    made = describe(save_two(), "两个鹂 sing", InsideConfig(answer=4))
    chosen = [[[2, 0.75], [0, 0.25]], *[[[2, 0.5], [1, 0.5]]] * 3, [[1, 0.6], [0, 0.4]]]
    layer = {"layer": 1, "count": 4, "shared": False, "chosen": chosen, "share": [0.4, 0.8, 0.8, 0.0]}
    (tmp_path / "page.html").write_text(page(made | {"experts": [layer]}), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    ran = subprocess.run([browser, *options, "--dump-dom", (tmp_path / "page.html").as_uri()],
                         capture_output=True, timeout=120, check=True)  # fmt: skip

    def said(section: str) -> tuple[str, str]:
        """What is chosen there, and the sentence about it."""
        inside = ran.stdout.decode().split(f'<section id="{section}">')[1]
        title, sentence = re.search("<h3>(.*?)</h3>", inside), re.search('<p class="said">(.*?)</p>', inside)
        assert title and sentence
        return title[1], html.unescape(re.sub("<[^>]*>", "", sentence[1]))

    answer, source = made["tokens"], made["source"]["tokens"]
    for section, layers, asks, keys in (
        ("encoder", made["source"]["attention"], source, source),
        ("attention", made["attention"], answer, answer),
        ("cross", made["cross"], answer, source),
    ):
        row = layers[0][0][-1]
        best = max(range(len(row)), key=row.__getitem__)
        looks = f"{sign(asks[-1]['text'])} looks at {sign(keys[best]['text'])} {100 * row[best]:.0f} %"
        head, sentence = said(section)
        assert head == "layer 1, head 1" and sentence.startswith(looks)
    pick, sentence = said("experts")
    assert pick == "layer 2, expert 2" and sentence.startswith("expert 2 gets 4 of 5 tokens and counts most for ")
    assert answer[0]["text"] not in sentence  # it goes to others


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
    assert "after the last token, by depth" in printed(made)


def test_what_cannot_be_looked_at_is_named(oriole: Oriole, save_tiny: Any, tmp_path: Path) -> None:
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
        expert_map([[(1, 0.7), (0, 0.3)]] * len(words), [1.0, 1.0, 0.0], words, "experts"),
        layers_chart({"a": [(0, 1.0), (1, 2.0)], "b": [(1, 2.0)]}, "norm"),
    ]
    for picture in pictures:
        root = ET.fromstring(alone(picture))
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and float(root.attrib["width"]) > 30
        assert "prefers-color-scheme:dark" in alone(picture)
