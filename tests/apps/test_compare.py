"""Runs beside each other: figures, differing settings, curves."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oriole.apps import compare
from oriole.apps.compare import Compared
from oriole.errors import ConfigError, DataError

HOSTILE = "<script>alert(1)</script>"


def run(folder: Path, lr: float, bpb: float, more: str = "", **questions: Any) -> Path:
    """A run of one stage whose loss falls to `bpb`."""
    stage = folder / "pretrain"
    stage.mkdir(parents=True)
    steps = [{"event": "step", "step": n, "tokens": 100 * n, "loss": bpb + 1 / n, "lr": lr} for n in range(1, 6)]
    evaluations = [{"event": "eval", "step": n, "bpb": {"zh": bpb + 1 - n / 5}} for n in (0, 5)]
    done = {
        "event": "done",
        "tokens": 500,
        "seconds": 60,
        "loss": bpb + 0.2,
        "parameters": 5_000_000,
        "bpb": {"zh": bpb},
    }
    asked = [{"event": "questions", **questions}] if questions else []
    lines = [json.dumps(r) for r in [{"event": "start", "step": 0}, *steps, *evaluations, done, *asked]]
    (stage / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = f'run = "{folder}"\nmodel = "demo"\n[train]\nlr = {lr}\nseed = 1\n{more}'
    (stage / "recipe.toml").write_text(recipe, encoding="utf-8")
    return folder


def test_figures_and_differences(tmp_path: Path) -> None:
    a = run(tmp_path / "a", 1e-3, 2.0, exact_match={"zh": 0.75})
    b = run(tmp_path / "b", 3e-3, 1.5, more="clip = 0.5\nfresh = false\nnote = ''\nsteps = 1750000.0\n")
    compared = Compared([a, b])
    assert compared.table["differences"] == {
        "pretrain": {
            "train.lr": {"a": 1e-3, "b": 3e-3},
            "train.clip": {"a": None, "b": 0.5},
            "train.steps": {"a": None, "b": 1_750_000},
        }
    }
    assert compared.table["stages"]["pretrain"]["b"]["bpb"] == {"zh": 1.5}
    said = compare.text(compared)
    assert re.search(r"^a\s+5M\s+500\s+1:00\s+2\.200\s+2\.000\s+75\.0 %$", said, re.M), said
    assert re.search(r"^b\s+5M\s+500\s+1:00\s+1\.700\s+1\.500$", said, re.M), said
    assert re.search(r"^train\.lr\s+0\.001\s+0\.003$", said, re.M), said
    assert re.search(r"^train\.steps\s+1,750,000$", said, re.M), said
    assert "model" not in said and str(tmp_path) not in said  # what is equal, and where a run lies, is not told


def test_stages_that_only_one_has_and_equal_names(tmp_path: Path) -> None:
    a = run(tmp_path / "x" / "same", 1e-3, 2.0)
    b = run(tmp_path / "y" / "same", 1e-3, 1.5)
    (b / "pretrain").rename(b / "sft")
    compared = Compared([a, b])
    assert list(compared.runs) == [str(a), str(b)] and compared.names == ["pretrain", "sft"]
    assert list(compared.table["stages"]["sft"]) == [str(b)] and not compared.table["differences"]["sft"]
    compare.text(compared)


def test_the_page_has_a_line_for_each_run_and_escapes_names(tmp_path: Path) -> None:
    paths = [run(tmp_path / name, 1e-3 * (n + 1), 2.0) for n, name in enumerate(("a", "b", "<script>x"))]
    compare.write_page(Compared(paths), tmp_path / "pages" / "compare.html")
    page = (tmp_path / "pages" / "compare.html").read_text(encoding="utf-8")
    loss = page[page.index("<b>Loss</b>") : page.index("</figure>")]
    assert [len(re.findall(rf'class="c{n}" d="M', loss)) for n in range(4)] == [1, 1, 1, 0]
    assert re.findall(r"<figcaption><b>(.*?)</b>", page) == ["Loss", "Bits per byte, zh", "Learning rate"]
    assert "<script" not in page and "&lt;script&gt;x" in page


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    a = run(tmp_path / "a", 1e-3, 2.0)
    with pytest.raises(ConfigError, match="at least two runs"):
        Compared([a])
    with pytest.raises(DataError, match="holds no stage that has begun"):
        Compared([a, tmp_path / "nothing"])


def test_the_verb(tmp_path: Path) -> None:
    run(tmp_path / "a", 1e-3, 2.0), run(tmp_path / "b", 3e-3, 1.5)
    verb = [sys.executable, "-m", "oriole.cli", "compare", "a", "b"]
    done = subprocess.run([*verb, "output=c.html", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["differences"]["pretrain"]["train.lr"] == {"a": 1e-3, "b": 3e-3}
    assert (tmp_path / "c.html").exists() and "c.html" in done.stderr
    wrong = subprocess.run([*verb, "outputs=c.html"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and "unknown key 'outputs'" in wrong.stderr
