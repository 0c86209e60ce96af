"""Dashboards show what metrics.jsonl says, after a break as well; read back with their own readers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_training import Counting, trainer

from oriole.config import validate
from oriole.errors import MissingExtra
from oriole.log import Metrics, Sink
from oriole.train.batch import Batch, Packer
from oriole.train.recipe import Recipe
from oriole.train.track import figures, sinks

HOSTILE = "**<script>alert(1)</script>**\n# 黄鹂"


def recipe(run: Path, track: str) -> Recipe:
    table = {"stage": "pretrain", "run": run, "track": track, "parts": {"zh": {"files": ["x"]}}}
    return validate(Recipe, table | {"train": {"tokens": 1}}, "test")


def evaluate(step: int) -> dict[str, Any]:
    return {"bpb": {"zh": 2.0 - step / 100, "en": 1.5}, "samples": [{"prompt": "春天 Spring,", "text": HOSTILE}]}


class StopsAt(Packer):
    """A stream that breaks in the middle of a run."""

    def __init__(self, last: int) -> None:
        super().__init__(Counting(), 4, 32)
        self.left = last

    def __next__(self) -> Batch:
        if not self.left:
            raise RuntimeError("the power went off")
        self.left -= 1
        return super().__next__()


def broken_and_resumed(run: Path, track: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train 12 steps, broken after the 9th and gone on with from the 5th; the records before and after the break."""
    made = recipe(run, track)
    settings: dict[str, Any] = {"steps": 12, "log_every": 2, "eval_every": 4, "checkpoint_every": 5}
    for data in (StopsAt(9), StopsAt(-1)):
        metrics = Metrics(made.folder / "metrics.jsonl", sinks(made))
        try:
            trainer(made.folder, **settings, more={"metrics": metrics, "evaluate": evaluate, "data": data}).fit()
        except RuntimeError as error:
            assert "power" in str(error)
        metrics.close()
    records = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    again = next(i for i, r in enumerate(records) if r["event"] == "start" and r["step"] == 5)
    return records[:again], records[again:]


def test_tensorboard_holds_the_same_figures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    before, after = broken_and_resumed(tmp_path / "run", "tensorboard")
    records = [r for r in before if r["step"] <= 5] + after  # the broken process went further than it had saved
    read = accumulator.EventAccumulator(str(tmp_path / "run" / "pretrain" / "tensorboard"))
    read.Reload()
    for event in ("step", "eval"):
        ours = [r for r in records if r["event"] == event]
        for name in figures(ours[0]):
            found = [(e.step, e.value) for e in read.Scalars(name)]
            assert found == [(r["step"], pytest.approx(figures(r)[name], rel=1e-6)) for r in ours], name
    assert {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "eval/bpb/zh"} <= set(
        read.Tags()["scalars"]
    )
    (samples,) = (tag for tag in read.Tags()["tensors"] if tag.startswith("samples/"))
    said = {e.step: e.tensor_proto.string_val[0].decode() for e in read.Tensors(samples)}
    assert said == dict.fromkeys((0, 4, 8, 12), "    春天 Spring,**<script>alert(1)</script>**\n    # 黄鹂")


TRAIN = """
import json, sys, test_track
print(json.dumps(test_track.broken_and_resumed(test_track.Path(sys.argv[1]), "trackio")))
"""
READ = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage as storage
print(json.dumps({run: storage.get_logs(sys.argv[1], run) for run in storage.get_runs(sys.argv[1])}, default=str))
"""


def test_trackio_holds_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path / "my run")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)  # trackio's own greetings are not on stdout
    records = before + [r for r in after if r["step"] > 8]  # which the broken process had reached
    read = subprocess.run([sys.executable, "-c", READ, "my-run"], env=env, capture_output=True, text=True)
    runs = json.loads(read.stdout)
    assert list(runs) == ["pretrain"]  # the resumed run is the same run
    for event in ("step", "eval"):
        ours = [r for r in records if r["event"] == event]
        for name in figures(ours[0]):
            found = [(row["step"], row[name]) for row in runs["pretrain"] if name in row]
            assert found == [(r["step"], figures(r)[name]) for r in ours], name
    said = [v["_value"] for row in runs["pretrain"] for k, v in row.items() if k.startswith("samples/")]
    assert said[-1].startswith("    春天 Spring,**<script>")


@pytest.mark.parametrize(("track", "module"), [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")])
def test_a_missing_library_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, track: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"^track={track} needs .*oriole-lm\[track\]"):
        sinks(recipe(tmp_path, track))


def test_a_dashboard_that_fails_does_not_end_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    made = recipe(tmp_path, "tensorboard")
    made.folder.mkdir()
    (made.folder / "tensorboard").write_text("a file where the folder should be")
    metrics = Metrics(made.folder / "metrics.jsonl", sinks(made))
    trainer(made.folder, more={"metrics": metrics}).fit()
    metrics.close()
    assert (made.folder / "metrics.jsonl").read_text().count('"step"') > 3
    assert capsys.readouterr().err.count("going on with metrics.jsonl alone") == 1


def test_figures_are_the_numbers_of_steps_and_evaluations() -> None:
    step = {"event": "step", "step": 3, "loss": 2.5, "compile": True, "note": "x", "skipped": 0}
    assert figures(step) == {"train/loss": 2.5, "train/skipped": 0.0}
    assert figures({"event": "eval", "step": 3, "bpb": {"zh": 1.5}, "samples": []}) == {"eval/bpb/zh": 1.5}
    assert figures({"event": "start", "step": 3, "threads": 2}) == {}


def test_none_is_no_sink(tmp_path: Path) -> None:
    none: list[Sink] = sinks(recipe(tmp_path, "none"))
    assert none == [] and not (tmp_path / "pretrain").exists()
