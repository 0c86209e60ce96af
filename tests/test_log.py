"""What a run says: records that survive, progress that reads well in a pipe."""

import json
import math
from pathlib import Path

import pytest

from oriole import log
from oriole.log import Metrics, duration, human, track


def test_metrics_appends_whole_lines_and_keeps_nan_readable(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    for value in (1.5, math.nan):
        metrics = Metrics(path)
        metrics.write({"loss": value, "text": "黄鹂"})
        metrics.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.5, "nan"]
    assert "黄鹂" in lines[0]


@pytest.mark.parametrize("left", ['{"event": "st', "", '{"event": "step"}\n{"torn": "春'])
def test_metrics_drops_a_torn_last_line_before_it_appends(tmp_path: Path, left: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(left.encode()[:-1] if left.endswith("春") else left.encode())
    metrics = Metrics(path)
    metrics.write({"event": "start"})
    metrics.close()
    whole = [] if "\n" not in left else ["step"]
    assert [json.loads(line)["event"] for line in path.read_text(encoding="utf-8").splitlines()] == [*whole, "start"]


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0"), (950, "950"), (1234, "1.23k"), (1_234_567, "1.23M"), (2e9, "2B"), (3e12, "3T")]
)
def test_human(n: float, text: str) -> None:
    assert human(n) == text


@pytest.mark.parametrize(
    ("s", "text"), [(0, "0:00"), (75.9, "1:15"), (3700, "1:01:40"), (math.inf, "-:--"), (math.nan, "-:--")]
)
def test_duration(s: float, text: str) -> None:
    assert duration(s) == text


def test_piped_progress_is_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(log, "PLAIN_EVERY_S", 0.0)
    with track("packing", total=4, unit="docs") as bar:
        for _ in range(2):
            bar.update(1, kept="50%")
    out = capsys.readouterr()
    assert out.out == ""  # stdout is for results
    first, second = out.err.splitlines()
    assert first.startswith("packing 25% · ") and "docs/s · kept 50% · " in first and first.endswith("left")
    assert second.startswith("packing 50% · ")
    assert "\x1b" not in out.err
