"""docs/presets.md says what the shapes and the benchmark records say."""

import re

import pytest

from bench import presets
from oriole.model.config import PRESETS


def cells(language: str) -> list[list[str]]:
    """The rows of all tables on a page."""
    page = presets.PAGES[language].read_text(encoding="utf-8")
    return [[c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_sizes_are_what_is_generated(language: str) -> None:
    """If this fails: python -m bench.presets"""
    page = presets.PAGES[language].read_text(encoding="utf-8")
    assert page.count(presets.START) == page.count(presets.END) == 1
    assert presets.sizes(presets.WORDS[language]) in page


@pytest.mark.parametrize("language", ["en", "zh"])
def test_each_speed_has_its_record(language: str) -> None:
    found = list(presets.records())
    rows = [row for row in cells(language) if len(row) == 10 and row[0].startswith("`")]
    assert rows
    for name, machine, rate, _, mfu, _, _, one, *_ in rows:
        mine = [r for r in found if f"`{r['settings']['preset']}`" == name and r["machine"] == machine]
        training = [r for r in mine if r["case"] == "train"]
        figures = {(f"{r['tokens_per_second']:,.0f}", f"{r['mfu']:.2f}" if r.get("mfu") else "") for r in training}
        assert not rate or (rate.removesuffix(" \\*"), mfu) in figures, (name, rate)
        decoding = {presets._rate(r["tokens_per_second"].get("one")) for r in mine if r["case"] == "decode"}
        assert not one or one in decoding, (name, one)


def test_both_languages_hold_the_same_figures() -> None:
    figures = [re.findall(r"\d[\d.,]*", presets.generated(lang, list(presets.records()))) for lang in ("en", "zh")]
    assert figures[0] == figures[1] and len(figures[0]) > 50
    assert presets.WORDS["en"].keys() == presets.WORDS["zh"].keys()


def test_a_row_by_hand() -> None:
    row = presets._size("26m", PRESETS["26m"])
    # 26m: 6400 x 512 + 8 x (512 x 768 + 512 x 512 + 3 x 512 x 1408 + 1024 + 128) + 512
    assert row[:4] == ["`26m`", "25.8M", "2,048", "0.21"]
    assert row[5:] == ["52 MB", "103 MB", "8 MB"]  # a cache of 2 x 8 layers x 2048 x 2 heads x 64 x 2 bytes


def test_the_newest_record_of_an_idle_machine_is_shown() -> None:
    def record(time: str, rate: float, load: float) -> dict[str, object]:
        return {"case": "train", "time": time, "commit": "abcdef123", "threads": 2, "load": load, "machine": "cpu-x",
                "settings": {"preset": "26m", "batch": 8, "seq": 512}, "tokens_per_second": rate,
                "mfu": 0.31}  # fmt: skip

    found = [record("2026-01-01", 1000, 1.9), record("2026-01-02", 2000, 2.0), record("2026-01-03", 3000, 5.0)]
    text = presets.generated("en", found)
    assert "| 2,000 | 8 × 512 | 0.31 |" in text and "3,000" not in text and "600M: 3.5 d" in text
    loaded = presets.generated("en", found[2:])
    assert "| 3,000 \\* |" in loaded and "other work ran" in loaded
    assert "Nothing was measured yet" in presets.generated("en", [])
