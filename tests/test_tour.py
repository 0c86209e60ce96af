"""The guided tour: every block of code runs, both languages show the same, its pictures are what `inspect` draws."""

import re
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from oriole.model.config import ModelConfig
from oriole.model.folder import save_model
from oriole.model.lm import LM
from oriole.text.tokenizer import Tokenizer

TOUR = Path(__file__).parents[1] / "docs" / "tour"
CHAPTERS = sorted((p for p in TOUR.glob("[0-9]*.md") if ".zh" not in p.name), key=lambda p: int(p.name.split("-")[0]))


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
def test_the_code_of_a_chapter_runs(
    chapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    assert blocks(chapter)
    for block in blocks(chapter):
        exec(compile(block, str(chapter), "exec"), names)
    assert capsys.readouterr().out.strip(), "an experiment shows something"


def test_both_languages_have_the_same_chapters_code_and_pictures() -> None:
    assert [int(p.name.split("-")[0]) for p in CHAPTERS] == list(range(1, len(CHAPTERS) + 1))
    for page in [*CHAPTERS, TOUR / "README.md"]:
        chinese = page.with_name(page.name.replace(".md", ".zh.md"))
        assert blocks(page) == blocks(chinese)
        texts = [p.read_text(encoding="utf-8") for p in (page, chinese)]
        assert len({tuple(re.findall(r"images/[\w.]+", text)) for text in texts}) == 1
        for text in texts:
            for target in re.findall(r"\]\(([^)#]+)", text):
                assert target.startswith("http") or (TOUR / target).exists(), f"{page} -> {target}"


def test_the_pictures_are_drawn_anew_from_any_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tok = Tokenizer([])
    shape = {"vocab_size": 272, "dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
             "ffn_dim": 32, "context": 256}  # fmt: skip
    save_model(LM(ModelConfig.model_validate(shape)), tmp_path / "model", chat=True)
    tok.save(tmp_path / "model", chat=True, context=256)
    runpy.run_path(str(TOUR / "pictures.py"))["main"](str(tmp_path / "model"), str(tmp_path / "images"))
    made = {p.name for p in (tmp_path / "images").iterdir()}
    pages = "".join(p.read_text(encoding="utf-8") for p in TOUR.glob("*.md"))
    assert made == set(re.findall(r"images/([\w.]+)", pages)) == {p.name for p in (TOUR / "images").iterdir()}
    for folder in (tmp_path / "images", TOUR / "images"):
        for picture in folder.iterdir():
            assert ET.fromstring(picture.read_text(encoding="utf-8")).tag.endswith("svg")
