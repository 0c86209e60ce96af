"""A stage that trains on folders of `oriole data pack`: by language and source, with its tokenizer and its held-out."""

import json
from pathlib import Path
from typing import Any

import pytest

from oriole.apps.inspect import InspectConfig
from oriole.cli.inspection import inspect
from oriole.config import validate
from oriole.errors import ConfigError, DataError
from oriole.text.mixture import Mixture
from oriole.text.pack import PackConfig, pack
from oriole.text.shards import Shards, View
from oriole.text.tokenizer import Tokenizer, train_tokenizer
from oriole.train.prepare import make_shards, make_tokenizer, weighted
from oriole.train.recipe import Recipe
from oriole.train.stage import run_stage

ZH = "春天来了，柳树发芽，两只黄鹂在枝头唱歌。"
EN = "Two orioles sing in the willow, and the children fly kites by the river. "


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    records = [{"text": f"{i}：{ZH}" if i % 2 else f"{i}. {EN}", "source": "abc"[i % 3]} for i in range(300)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    train_tokenizer([("zh", ZH), ("en", EN)], vocab_size=300).save(tmp_path / "tok")
    pack([path], tmp_path / "packed", PackConfig(tokenizer=tmp_path / "tok", heldout=0.1, workers=1))
    return tmp_path / "packed"


def recipe(packed: Path, **parts: dict[str, Any]) -> Recipe:
    table = {
        "stage": "pretrain", "run": packed.parent / "run",
        "parts": {name: {"shards": packed, **part} for name, part in parts.items()},
        "model": {"vocab_size": 300, "dim": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
                  "ffn_dim": 48, "context": 64},
        "train": {"tokens": 512, "batch_size": 2, "length": 32, "compile": False, "device": "cpu"},
        "eval": {"tokens": 256},
    }  # fmt: skip
    return validate(Recipe, table, "test")


def test_parts_are_languages_and_sources_of_one_folder(packed: Path) -> None:
    made = recipe(packed, zh={"lang": "zh", "weight": 3, "sources": {"a": 0.5}}, en={"lang": "en"})
    tokenizer = make_tokenizer(made, None)
    assert tokenizer.fingerprint() == Tokenizer.load(packed / "tokenizer").fingerprint()
    assert Tokenizer.load(made.run / "tokenizer").fingerprint() == tokenizer.fingerprint()  # the run has it, too
    train, val = make_shards(made, tokenizer)
    whole, heldout = Shards.open(packed), Shards.open(packed / "heldout")
    assert [len(train[lang]) for lang in ("zh", "en")] == [whole.where(lang=lang).size for lang in ("zh", "en")]
    assert [len(val[lang]) for lang in ("zh", "en")] == [heldout.where(lang=lang).size for lang in ("zh", "en")]
    parts, shares = weighted(made, train)
    assert shares == {"zh/a": 1.5, "zh": 1.5, "en": 1}
    assert len(parts["zh/a"]) == whole.where(lang="zh", source="a").size
    assert len(parts["zh"]) + len(parts["zh/a"]) == whole.where(lang="zh").size
    text = {name: tokenizer.decode(part.doc(0)[0]) for name, part in parts.items()}
    assert "春" in text["zh"] and "春" in text["zh/a"] and "orioles" in text["en"]
    next(Mixture(parts, shares, seed=0))


def test_a_stage_trains_on_them_and_inspect_shows_its_first_batch(packed: Path) -> None:
    made = recipe(packed, zh={"lang": "zh"}, en={"lang": "en"})
    done = run_stage(made)
    assert set(done["bpb"]) == {"zh", "en"} and done["bpb"]["zh"] > 0
    assert not (made.run / "shards").exists()  # nothing is made again
    seen = inspect(made.run, InspectConfig(samples=1))
    assert [(p["name"], p["share"]) for p in seen["parts"]] == [("zh", 0.5), ("en", 0.5)]
    assert seen["parts"][0]["total"]["documents"] == Shards.open(packed).where(lang="zh").size
    assert seen["batch"]["length"] == 32 and seen["batch"]["batch_size"] == 2


def test_what_cannot_be_is_named(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give parts\.zh either files or shards"):
        recipe(packed, zh={"files": ["*.jsonl"]})
    with pytest.raises(ConfigError, match=r"it needs parts\.zh\.shards"):
        recipe(packed, zh={"shards": None, "files": ["*.jsonl"], "lang": "zh"})
    fr = recipe(packed, fr={"lang": "fr"})
    tokenizer = make_tokenizer(fr, None)
    with pytest.raises(DataError, match=r"parts\.fr: .*holds no documents with lang = 'fr'; it holds "):
        make_shards(fr, tokenizer)
    other = train_tokenizer([("zh", ZH * 2), ("en", EN)], vocab_size=290)
    with pytest.raises(DataError, match=r"parts\.all: .* was packed with another tokenizer than the model's"):
        make_shards(recipe(packed, all={}), other)
    pack([tmp_path / "data.jsonl"], tmp_path / "all", PackConfig(tokenizer=tmp_path / "tok", heldout=0, workers=1))
    with pytest.raises(DataError, match=r"no held-out documents to validate parts\.all with; pack it with heldout="):
        make_shards(recipe(tmp_path / "all", all={}), tokenizer)


def test_a_view_of_a_view_chooses_within_it(packed: Path) -> None:
    shards = Shards.open(packed)
    view = View(shards, shards.where(lang="en"))
    assert view.sources == shards.sources and len(view.source_ids) == len(view)
    few = view.only([2, 5])
    assert [few.doc(i)[0].tolist() for i in range(2)] == [view.doc(i)[0].tolist() for i in (2, 5)]
