"""Reference curves: made from real runs, found by the same run only, and compared with at each evaluation."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.reference import pooled, smooth
from oriole.apps import report
from oriole.cli import RECIPES, load_recipe
from oriole.config import validate
from oriole.errors import ConfigError
from oriole.train import reference
from oriole.train.recipe import Recipe
from oriole.train.reference import Curve, StageReference, Watch
from oriole.train.stage import run_stage

ROOT = Path(__file__).parents[2]
ZH = "春天来了，柳树发芽，两只黄鹂在枝头唱歌。"
EN = "Two orioles sing in the willow, and the children fly kites by the river. "

Record = dict[str, Any]


def recipe(folder: Path, run: str, **train: Any) -> Recipe:
    table: Record = {
        "stage": "pretrain", "run": folder / run, "data": str(folder),
        "parts": {"zh": {"files": ["zh.txt"], "val": ["zh.txt"]}, "en": {"files": ["en.txt"], "val": ["en.txt"]}},
        "model": {"vocab_size": 300, "dim": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
                  "ffn_dim": 48, "context": 64},
        "tokenizer": {"vocab_size": 300}, "eval": {"tokens": 256, "prompts": ["春"]},
        "train": {"tokens": 3200, "batch_size": 2, "length": 32, "compile": False, "device": "cpu", "log_every": 1,
                  "lr": 3e-3} | train,
    }  # fmt: skip
    return validate(Recipe, table, "test")


def write(folder: Path, text: str = ZH) -> None:
    (folder / "zh.txt").write_text("\n".join(f"{i}：{text[i % 9 :]}" for i in range(80)), encoding="utf-8")
    (folder / "en.txt").write_text("\n".join(f"{i}. {EN[i % 13 :]}" for i in range(80)), encoding="utf-8")


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.reference", *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, three finished runs, and the reference made from them."""
    folder = tmp_path_factory.mktemp("reference")
    write(folder)
    for seed in (1, 2, 3):
        run_stage(recipe(folder, f"seed{seed}", seed=seed))
    done = bench(f"out={folder / 'reference.json'}", *(str(folder / f"seed{seed}") for seed in (1, 2, 3)))
    assert done.returncode == 0, done.stderr
    return folder


def with_reference(made: Path, run: str, **train: Any) -> Recipe:
    return recipe(made, run, **train).model_copy(update={"reference": made / "reference.json"})


def test_another_seed_is_as_expected_and_the_report_shows_the_band(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage(with_reference(made, "fourth", seed=4))
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if "expected" in line]
    assert len(lines) == 5 and all(line.startswith(("as expected: loss ", "better than")) for line in lines), said
    assert "zh " in lines[0] and "(reference " in lines[0]
    report.write(made / "fourth")
    page = (made / "fourth" / "report.html").read_text(encoding="utf-8")
    assert page.count('class="band') == 3 and "3 seeds" in page  # the loss and both parts


def test_a_run_that_goes_wrong_is_told(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same settings on paper, but the model does not learn."""
    wrong = with_reference(made, "wrong", lr=1e-6)
    known = json.loads((made / "reference.json").read_text("utf-8"))
    known["stages"]["pretrain"]["identity"]["train.lr"] = 1e-6
    (made / "lying.json").write_text(json.dumps(known), encoding="utf-8")
    run_stage(wrong.model_copy(update={"reference": made / "lying.json"}))
    last = [line for line in capsys.readouterr().err.splitlines() if "expected" in line][-1]
    assert last.startswith("not as expected, more than 3 standard deviations off: loss ")


@pytest.mark.parametrize(
    "change", [{"lr": 1e-3}, {"tokens": 6400}, {"length": 16}, {"optimizer": "muon"}, {"beta2": 0.9}]
)
def test_other_settings_have_no_reference(made: Path, change: Record) -> None:
    mine = with_reference(made, "x", **change)
    known = json.loads((made / "seed1" / "pretrain" / "identity.json").read_text("utf-8"))["identity"]
    same = with_reference(made, "x", log_every=7, seed=9, dtype="fp32", resume="no")
    assert reference.find(same, known | reference._settings(same)) is not None
    assert reference.find(mine, known | reference._settings(mine)) is None


def test_other_data_and_other_shapes_have_none(made: Path) -> None:
    same = with_reference(made, "x")
    known = json.loads((made / "seed1" / "pretrain" / "identity.json").read_text("utf-8"))["identity"]
    assert reference.find(same, known) is not None
    for key in ("train_data.zh", "val_data.en", "tokenizer.fingerprint", "model.dim", "start"):
        assert key in known
        assert reference.find(same, known | {key: "another"}) is None, key
    # A key that came after the reference was made: at its default it changes nothing.
    table = json.loads((made / "reference.json").read_text("utf-8"))
    del table["stages"]["pretrain"]["identity"]["train.dropout"]
    (made / "older.json").write_text(json.dumps(table), encoding="utf-8")
    older = same.model_copy(update={"reference": made / "older.json"})
    assert reference.find(older, known) is not None
    assert reference.find(older, known | {"train.dropout": 0.1}) is None


def test_a_later_stage_is_known_where_the_first_one_was(made: Path, tmp_path: Path) -> None:
    table = json.loads((made / "reference.json").read_text("utf-8"))
    known = table["stages"]["sft"] = table["stages"].pop("pretrain")
    (tmp_path / "sft.json").write_text(json.dumps(table), encoding="utf-8")
    sft = recipe(made, "x").model_copy(update={"stage": "sft", "run": tmp_path, "reference": tmp_path / "sft.json"})
    assert reference.find(sft, known["identity"]) is None
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "reference.json").write_text("{}")
    assert reference.find(sft, known["identity"]) is not None


def test_a_run_without_a_reference_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    run_stage(recipe(tmp_path, "run", tokens=256))
    assert "expected" not in capsys.readouterr().err
    assert not (tmp_path / "run" / "pretrain" / "reference.json").exists()


def test_runs_that_do_not_belong_together_are_refused(made: Path, tmp_path: Path) -> None:
    seed1 = str(made / "seed1")
    assert "have the seeds [1, 1]" in bench(f"out={tmp_path / 'r.json'}", seed1, seed1).stderr
    write(tmp_path, ZH[::-1])
    run_stage(recipe(tmp_path, "other", seed=5))
    stderr = bench(f"out={tmp_path / 'r.json'}", seed1, str(tmp_path / "other")).stderr
    assert "is another run than" in stderr and "tokenizer.fingerprint" in stderr
    assert not (tmp_path / "r.json").exists()


def test_what_is_no_reference_is_named(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    for text, message in (("{", "is no reference"), ('{"schema": 9, "stages": {}}', "schema 9, this Oriole reads 1")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            reference.read_reference(path)


@pytest.mark.parametrize("path", [p.parent for p in sorted(RECIPES.glob("*/*.toml"))])
def test_built_in_references_fit_their_recipes(path: Path) -> None:
    """A recipe that was changed needs a new reference."""
    file = path / "reference.json"
    for name, known in reference.read_reference(file).items() if file.exists() else ():
        mine = reference._settings(load_recipe(f"{path.name}/{name}", []))
        theirs = {k: v for k, v in known.identity.items() if k in mine}
        assert len(theirs) > 20 and theirs == {k: mine[k] for k in theirs}


def test_curves() -> None:
    curve = Curve(tokens=(0, 100, 200), mean=(4, 2, 1), spread=(0.4, 0.2, 0.1))
    assert curve.at(50) == (3, pytest.approx(0.3)) and curve.at(200) == (1, 0.1)
    assert math.isnan(curve.at(201)[0]) and math.isnan(Curve(tokens=(), mean=(), spread=()).at(0)[0])
    assert curve.point(100.9) == (2, 0.2) and math.isnan(curve.point(103)[0])


def test_mean_and_spread_are_those_of_the_records() -> None:
    rng = np.random.default_rng(0)
    tokens = np.arange(1, 3001) * 10.0
    truth = 2 + 3 * np.exp(-tokens / 8000)
    made = smooth([[*zip(tokens, truth + rng.normal(0, 0.05, len(tokens)), strict=True)] for _ in range(3)])
    assert 50 <= len(made.tokens) <= 60 and made.tokens[0] == 10 and made.tokens[-1] == 30_000
    expected = 2 + 3 * np.exp(-np.array(made.tokens) / 8000)
    assert np.abs(np.array(made.mean) - expected).max() < 0.02
    assert 0.045 < np.median(made.spread) < 0.06

    one = pooled([[(0, 3.0), (10, 2.0)]])
    assert one.mean == (3, 2) and one.spread == (0.09, 0.06)
    three = pooled([[(0, 3.0), (10, 1.9)], [(0, 3.0), (10, 2.0)], [(0, 3.0), (10, 2.1)]])
    assert three.mean == (3, 2) and three.spread == (pytest.approx(0.1225, abs=1e-3), pytest.approx(0.0816, abs=1e-3))


def test_the_watch_tells_better_from_worse(capsys: pytest.CaptureFixture[str]) -> None:
    curve = Curve(tokens=(0, 100), mean=(2, 2), spread=(0.1, 0.1))
    known = StageReference(identity={}, seeds=(1,), device="", commit="", loss=curve, bpb={"zh": curve})

    def said(loss: float, zh: float, tokens: float = 100) -> str:
        watch = Watch(known)
        watch.write({"event": "step", "step": 1, "tokens": tokens, "loss": loss})
        watch.write({"event": "eval", "step": 1, "tokens": tokens, "bpb": {"zh": zh, "en": 9.0}})
        return capsys.readouterr().err.strip()

    assert said(2.1, 1.8) == "as expected: loss 2.100 (reference 2.000 ± 0.100), zh 1.800 (reference 2.000 ± 0.100)"
    assert said(1.5, 2.0) == "better than expected: loss 1.500 (reference 2.000 ± 0.100)"
    worse = "not as expected, more than 3 standard deviations off: "
    assert said(1.5, 2.5) == f"{worse}loss 1.500 (reference 2.000 ± 0.100), zh 2.500 (reference 2.000 ± 0.100)"
    assert said(math.nan, 2.0) == f"{worse}loss nan (reference 2.000 ± 0.100)"
    assert "nothing is known" in said(2.0, 2.0, tokens=500)
