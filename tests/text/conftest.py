"""A small tokenizer for the tests of this room, trained on a small bilingual text of our own."""

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).parent))  # for webserver.py, which two files share

import pytest

from oriole.text.tokenizer import Tokenizer, train_tokenizer

WORDS = {
    "en": "the oriole sings in a green willow near our old stone bridge and two small boats drift slowly down river "
    "while children count every yellow leaf that falls into cold clear water before winter comes don't we'll",
    "zh": "两个黄鹂鸣翠柳一行白鹭上青天春风吹过小河边孩子们数着落下的叶子老师说今天的天气很好"
    "我们一起去公园看花听鸟唱歌",
}


def bilingual_text(lines: int = 400, seed: int = 7) -> list[tuple[str, str]]:
    """(language, text) pairs: shuffled words and characters, with digits, code, tabs and line breaks among them."""
    rng = random.Random(seed)
    out = []
    for n in range(lines):
        en = " ".join(rng.choices(WORDS["en"].split(), k=12)).capitalize()
        zh = "".join(rng.choices(WORDS["zh"], k=14))
        out.append(("en", f"{en}, {n}.\n\n\tif x == {n}:\n        return {{'name': [x]}}\n"))
        out.append(("zh", f"{zh}，{zh[:5]}！第{n}句。\n"))
    return out


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither these tests nor the processes that they start (nosync/sitecustomize.py) sync: with small files that is
    most of the time, and only a power cut, not a kill, loses what was not synced."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    folder = str(Path(__file__).parent / "nosync")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")])))


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    """About 900 ids: enough merges for the boundaries to matter."""
    return train_tokenizer(bilingual_text(), vocab_size=900)


@pytest.fixture(scope="session")
def bilingual() -> Callable[..., list[tuple[str, str]]]:
    """`bilingual_text(lines, seed)`, the kind of text that `tok` learned from."""
    return bilingual_text
