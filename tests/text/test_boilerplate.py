"""Lines that stand in many documents stay in the first one only; code, short lines and everything else stay."""

import json
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oriole.text import boilerplate
from oriole.text.boilerplate import Lines
from oriole.text.dedup import DedupConfig, find_duplicates, find_lines

MENU = "Home | News | About us | Contact"
NOTICE = "版权所有，未经书面许可不得转载本站内容。"
CONFIG = DedupConfig(lines=True, line_documents=3)


def write(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_repeated_lines_stay_in_the_first_document_only(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", ["first text", f"a\n{MENU}\nb", f"c\n\n{NOTICE}\n\nd\n{MENU}\n{MENU}"])
    two = write(tmp_path / "2.jsonl", [f"{MENU.upper()}  \ne", f"f\n{NOTICE}", f"{NOTICE}\ng\n"])
    lines = find_lines([one, two], CONFIG, tmp_path / "w", workers=1)
    assert lines.strip(f"a\n{MENU}\nb", one, 1) == (f"a\n{MENU}\nb", 0)
    assert lines.strip(f"c\n\n{NOTICE}\n\nd\n{MENU}\n{MENU}", one, 2) == (f"c\n\n{NOTICE}\n\nd", 2)
    assert lines.strip(f"{MENU.upper()}  \ne", two, 0) == ("e", 1)
    assert lines.strip(f"f\n\n{NOTICE}\n\ng", two, 1) == ("f\n\ng", 1)
    assert lines.strip("nothing\nhere", two, 2) == ("nothing\nhere", 0)
    assert pickle.loads(pickle.dumps(lines)) == lines
    assert find_lines([one, two], CONFIG, tmp_path / "w", workers=1) == lines


def test_a_document_counts_once_and_code_and_short_lines_never(tmp_path: Path) -> None:
    code = "```python\nfrom __future__ import annotations\n```\n    x"
    texts = ["\n".join([MENU] * 5), MENU, *[f"{code}\n短行\nshort line{n}" for n in range(5)]]
    lines = find_lines([write(tmp_path / "1.jsonl", texts)], CONFIG, tmp_path / "w", workers=1)
    assert len(lines.first) == 0


def test_dedup_compares_what_is_left(tmp_path: Path) -> None:
    words = [f"{'甲乙丙丁戊己'[n]}文章第一句很长，" * 3 + "鼠牛虎兔龙蛇"[n] * 9 for n in range(6)]
    notices = "\n".join(f"{NOTICE}{x}" for x in "天地玄黄宇宙洪荒日月盈昃")
    path = write(tmp_path / "1.jsonl", [*(f"{notices}\n{w}" for w in words), notices, f"{words[5]}"])
    plain = find_duplicates([path], DedupConfig(), tmp_path / "plain", workers=1)[path]
    assert len(plain) == 6 and 7 not in plain  # one of those with the notices stays
    found = find_duplicates([path], CONFIG, tmp_path / "w", workers=1)[path]
    assert found == {6: "lines", 7: "exact"}
    report = json.loads((tmp_path / "w" / "duplicates.json").read_text())["report"]
    assert (report["lines"], report["exact"], report["near"], report["documents"]) == (1, 1, 0, 8)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.sampled_from([MENU, NOTICE, "", "x", "another line of enough bytes"]), max_size=6), min_size=1)
)
def test_counting_in_parts_is_counting_at_once(texts: list[list[str]]) -> None:
    rows = [(n, "\n".join(lines)) for n, lines in enumerate(texts)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counted = []
        for n in range(3):
            counted.append(folder / f"{n}.npy")
            boilerplate.count(n, rows[n::3], 24, counted[-1])
        found: dict[int, int] = {}
        for n in range(boilerplate.SLICES):
            result = boilerplate.merge(counted, n, 2, folder / "out.npy")
            table = np.load(folder / "out.npy")
            assert len(table) == result["lines"]
            found |= dict(zip(table["line"].tolist(), table["documents"].tolist(), strict=True))
    names = {line for lines in texts for line in lines if len(line.encode()) >= 24}
    wanted = sorted(c for line in names if (c := sum(line in lines for lines in texts)) >= 2)
    assert sorted(found.values()) == wanted


@pytest.mark.parametrize("flush", [1, 3])
def test_sums_do_not_depend_on_when_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush: int) -> None:
    rows = [(n, f"{MENU}\nline number {n % 3} of the text") for n in range(10)]
    boilerplate.count(0, rows, 8, tmp_path / "a.npy")
    monkeypatch.setattr(boilerplate, "_FLUSH", flush)
    boilerplate.count(0, rows, 8, tmp_path / "b.npy")
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_lines_of_no_file(tmp_path: Path) -> None:
    assert find_lines([], CONFIG, tmp_path, workers=1) == Lines({}, CONFIG.line_bytes, {})
