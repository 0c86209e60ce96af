"""The report of a run: finished, broken, resumed, rolled back, old, and with hostile text in it."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oriole.apps import report
from oriole.apps.charts import Band, Chart, Line, draw, linear_ticks, log_ticks, merged_marks
from oriole.apps.curves import Mark, read_stage
from oriole.errors import DataError

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\u202egnihton\x07&amp;"


def start(step: int = 0) -> dict[str, Any]:
    return {"event": "start", "step": step, "device": "cpu", "dtype": "bf16", "compile": False, "threads": 2}


def with_mfu(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"start": {"mfu_is": "tokens/s x 3 FLOP a token"}, "step": {"mfu": 0.25}}.get(record["event"], {})


def step(n: int, loss: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "event": "step", "step": n, "tokens": 100 * n, "loss": 5.0 / n if loss is None else loss, "grad_norm": 1.0,
        "lr": 1e-3, "tokens_per_second": 50.0, "data_wait": 0.1, "skipped": 0, **more,
    }  # fmt: skip


def evaluation(n: int, text: str = "两个黄鹂鸣翠柳") -> dict[str, Any]:
    return {"event": "eval", "step": n, "tokens": 100 * n, "seconds": 3.0, "bpb": {"zh": 3.0 - n / 10, "en": 2.5},
            "samples": [{"prompt": "春天", "text": text}]}  # fmt: skip


DONE = {"event": "done", "stage": "pretrain", "seconds": 30.0, "tokens": 1000, "parameters": 5_476_352, "device": "cpu",
        "bpb_before": {"zh": 3.0, "en": 2.5}, "bpb": {"zh": 2.0, "en": 2.5}, "loss": 0.5, "skipped": 0,
        "tokens_per_second": 50.0}  # fmt: skip
FINISHED = [start(), evaluation(0), *(step(n) for n in range(1, 11)), evaluation(10), DONE]


def write(stage: Path, records: list[dict[str, Any]], **files: Any) -> Path:
    """A stage folder with these records; the run folder comes back."""
    stage.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    (stage / "metrics.jsonl").write_text(text, encoding="utf-8")
    for name, content in files.items():
        (stage / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return stage.parent


class Reader(HTMLParser):
    """What a browser would make of a page: tags with attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.open = "", list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.words += data

    def titles(self) -> list[str]:
        """The titles of the charts that are drawn."""
        return re.findall(r"<figcaption><b>(.*?)</b>", self.rawdata)


def read(run: Path) -> Reader:
    report.write(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    reader = Reader(page)
    reader.rawdata = page
    assert not reader.open
    return reader


def test_a_finished_run_has_its_figures_and_pictures(tmp_path: Path) -> None:
    env = json.dumps({"schema": 1, "commit": "abc", "data": {"zh": "f00"}})
    run = write(tmp_path / "run" / "pretrain", FINISHED, env_json=env, recipe_toml='stage = "pretrain"\n')
    made = report.write(run)
    assert json.loads((run / "report.json").read_text(encoding="utf-8")) == made
    assert made["commit"] == "abc" and made["device"] == "cpu" and made["schema"] == 1
    stage = made["stages"]["pretrain"]
    assert (
        stage["finished"] and stage["step"] == 10 and stage["tokens"] == 1000 and stage["bpb"] == {"zh": 2.0, "en": 2.5}
    )
    # 10 windows of 2 s each, a tenth of it waiting; two evaluations of 3 s; the rest of the 30 s
    assert stage["times"] == {
        "training": 18.0, "waiting for data": 2.0, "evaluations": 6.0, "starting and the rest": 4.0,
    }  # fmt: skip
    page = read(run)
    assert page.titles() == ["Loss", "Bits per byte", "Learning rate", "Gradient norm", "Speed", "Data wait"]  # no MFU
    for words in ("3.00 →", "2.00", "两个黄鹂鸣翠柳", "commit abc", 'stage = "pretrain"', "f00", "5.48M"):
        assert words in page.words, words
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "link", "iframe", "object")]
    assert "http" not in page.rawdata.replace("http-equiv", "")
    mfu = read(write(tmp_path / "gpu" / "pretrain", [with_mfu(record) for record in FINISHED]))
    assert "MFU" in mfu.titles() and "25.0 %" in mfu.words and "MFU = tokens/s x 3 FLOP a token" in mfu.words
    assert "3.00 → 2.00" in report.text(made) and "not finished" not in report.text(made)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    bad = HOSTILE
    records = [start() | {"device": bad}, evaluation(0, bad), step(1), step(2)]
    records[1]["samples"][0]["prompt"] = bad
    records[1]["bpb"] = {bad: 1.0}
    records += [{"event": "smart", "step": 2, "what": bad, "why": bad}]
    exam = {"exact_match": {bad: 0.5, "by_kind": {bad: {bad: 0.5}}}, "loop_rate": 0.0}
    answer = {"kind": bad, "lang": bad, "messages": [{"role": bad, "content": bad}], "answers": [bad], "answer": bad,
              "correct": False}  # fmt: skip
    run = write(
        tmp_path / "a<b>" / "sft<i>", [*records, DONE | {"device": bad}, {"event": "questions", **exam}],
        answers_jsonl=json.dumps(answer) + "\n", recipe_toml=bad, env_json=json.dumps({"commit": bad, bad: {bad: bad}}),
        reference_json=json.dumps({"device": bad, "loss": {"tokens": [0, 200], "mean": [1, 1], "spread": [1, 1]}}),
    )  # fmt: skip
    page = read(run)
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    assert "\u202e" not in page.rawdata and "\x07" not in page.rawdata
    assert page.rawdata.count("&lt;script&gt;") > 15
    assert page.words.count("alert(1)") > 15
    report.text(report.write(run))


def test_a_broken_run_shows_what_there_is(tmp_path: Path) -> None:
    run = write(tmp_path / "run" / "pretrain", [start(), evaluation(0), step(1), step(2)])
    with (run / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')  # killed while writing
    page = read(run)
    made = json.loads((run / "report.json").read_text())
    assert made["stages"]["pretrain"]["finished"] is False and made["stages"]["pretrain"]["step"] == 2
    assert made["stages"]["pretrain"]["seconds"] == 7.0  # two windows and an evaluation
    assert "not finished" in page.words and "Loss" in page.titles()
    assert "pretrain (not finished)" in report.text(made)
    # Begun, but nothing trained yet.
    page = read(write(tmp_path / "new" / "pretrain", [start()]))
    assert page.titles() == [] and "Nothing has been recorded yet" in page.words


def test_steps_done_anew_count_once(tmp_path: Path) -> None:
    first = [start(), *(step(n) for n in range(1, 9)), evaluation(8)]
    resumed = [start(5), *(step(n, 7.0) for n in range(6, 10))]
    spike = {"event": "smart", "step": 9, "what": "rollback", "why": "the loss is 9 instead of 7 since step 8", "to": 7}
    resumed.append(evaluation(9))  # of weights that the rollback gives up
    again = [*(step(n, 6.0, skipped=int(n > 8)) for n in range(8, 11)), evaluation(10)]
    run = write(tmp_path / "run" / "pretrain", [*first, *resumed, spike, *again])
    stage = read_stage(run / "pretrain")
    assert [x for x, _ in stage.points("loss")] == [100.0 * n for n in range(1, 11)]
    assert [y for _, y in stage.points("loss")][5:] == [7.0, 7.0, 6.0, 6.0, 6.0]
    assert [x for x, _ in stage.points("loss", undone=True)] == [600, 700, 800, 800, 900]
    assert [x for x, _ in stage.bpb()["zh"]] == [1000]
    assert [(m.step, m.what) for m in stage.marks()] == [(5, "resumed"), (9, "skipped"), (9, "rollback")]
    page = read(run)
    for words in ("went on from step 5", "one update left out", "the loss is 9 instead of 7"):
        assert words in page.words
    assert page.rawdata.count('class="mark k-rollback"') == len(page.titles())  # in every picture


def test_numbers_that_are_none_and_fields_that_are_missing(tmp_path: Path) -> None:
    old = [{"event": "eval", "step": 0, "bpb": {"zh": 3.0}}, {"event": "step", "step": 10, "tokens": 1000, "loss": 2.0},
           {"event": "step", "step": 20, "tokens": 2000, "loss": "nan"}, {"event": "step", "step": 30, "loss": 1.0},
           {"event": "eval", "step": 25, "bpb": {"zh": "inf"}}, {"event": "eval", "step": 30, "bpb": None},
           {"event": "done", "tokens": 3000, "seconds": 5}, {"event": "questions", "exact_match": {}}]  # fmt: skip
    run = write(tmp_path / "run" / "sft", old)
    stage = read_stage(run / "sft")
    assert [x for x, _ in stage.points("loss")] == [1000, 2000, 3000]
    assert [x for x, _ in stage.bpb()["zh"]] == [0, 2500]
    page = read(run)
    assert page.titles() == ["Loss", "Bits per byte"]
    assert (
        "nan" not in page.rawdata and "NaN" not in page.rawdata and "inf" not in re.findall(r'd="[^"]*"', page.rawdata)
    )
    report.text(report.write(run))


def test_several_stages_stand_in_their_order(tmp_path: Path) -> None:
    for name in ("sft", "dpo", "pretrain"):
        run = write(tmp_path / "run" / name, FINISHED)
    assert list(report.write(run)["stages"]) == ["pretrain", "sft", "dpo"]
    assert re.findall(r"<h2>(.*?)</h2>", read(run).rawdata)[1:] == ["pretrain", "sft", "dpo"]


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no stage that has begun"):
        report.write(tmp_path)
    run = write(tmp_path / "run" / "pretrain", FINISHED)
    with pytest.raises(DataError, match=f"is one stage; give the run folder above it: oriole report {run}"):
        report.write(run / "pretrain")


# --- charts ----------------------------------------------------------------------------------------------------------


def test_ticks() -> None:
    assert linear_ticks(0, 1.75e6) == [0, 500_000, 1_000_000, 1_500_000]
    assert linear_ticks(0, 0.0085) == [0, 0.002, 0.004, 0.006, 0.008]
    assert linear_ticks(0.31, 0.36) == [0.31, 0.32, 0.33, 0.34, 0.35, 0.36]
    assert log_ticks(0.65, 8.5) == [1, 2, 5]
    assert log_ticks(0.8, 3e5) == [1, 10, 100, 1000, 10_000, 100_000]
    assert log_ticks(2.1, 2.9) == [2.2, 2.4, 2.6, 2.8]


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_linear_ticks_are_few_and_inside(low: float, span: float) -> None:
    if low + span == low or span < 1e-6 * abs(low):
        return
    ticks = linear_ticks(low, low + span)
    assert 2 <= len(ticks) <= 7 and ticks == sorted(set(ticks))
    assert all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) for t in ticks)


@given(st.floats(1e-9, 1e9), st.floats(1.01, 1e9))
def test_log_ticks_are_few_and_inside(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert 2 <= len(ticks) <= 9 and ticks == sorted(set(ticks))
    assert all(low * 0.999 <= t <= low * factor * 1.001 for t in ticks)


def places(svg: str, style: str) -> list[tuple[float, float]]:
    """The points of the path that has the class."""
    (found,) = re.findall(rf'class="{style}" d="([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", found)]


def test_points_lie_where_their_values_say() -> None:
    svg = draw(Chart("t", "u", [Line("", [(0, 0.0), (50, 5.0), (100, 10.0)])], zero=True), 100)
    assert [x for x, _ in places(svg, "c0")] == [0, 500, 1000]
    ys = [y for _, y in places(svg, "c0")]
    assert ys[0] == 1000 and ys[1] == pytest.approx((ys[0] + ys[2]) / 2, abs=0.1) and 0 < ys[2] < 100
    log = draw(Chart("t", "u", [Line("", [(0, 1.0), (50, 10.0), (100, 100.0)])], log=None), 100)
    ys = [y for _, y in places(log, "c0")]
    assert "log scale" in log and ys[1] == pytest.approx((ys[0] + ys[2]) / 2, abs=0.1)


def test_a_gap_stays_a_gap_and_a_spike_a_spike() -> None:
    gap = draw(Chart("t", "u", [Line("", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 2.0), (4, 1.0)])]), 4)
    assert re.findall(r'class="c0" d="([^"]*)"', gap)[0].count("M") == 2
    many = [(float(n), 100.0 if n == 7777 else 1.0) for n in range(20_000)]
    svg = draw(Chart("t", "u", [Line("", many, style="noisy")]), 20_000)
    raw = places(svg, "raw c0")
    assert len(raw) <= 800 and min(y for _, y in raw) < 100 < 800 < max(y for _, y in raw)
    assert max(y for _, y in places(svg, "c0")) - min(y for _, y in places(svg, "c0")) < 20  # the smooth one ignores it


def test_the_band_is_three_spreads_wide() -> None:
    line = Line("", [(0, 0.0), (100, 10.0)])
    svg = draw(Chart("t", "u", [line], bands=[Band([(0, 5.0, 1.0), (100, 5.0, 1.0)])], zero=True), 100)
    ys = [y for _, y in places(svg, "band c0")]
    assert max(ys) - min(ys) == pytest.approx(1000 * 6 / 10.6, abs=1)


def test_marks_that_would_lie_on_each_other_are_one() -> None:
    marks = [Mark(t, int(t), what, "") for t, what in ((1, "skipped"), (2, "skipped"), (2, "resumed"), (90, "skipped"))]
    assert [(m.tokens, m.what) for m in merged_marks(marks, 100)] == [(1, "skipped"), (2, "resumed"), (90, "skipped")]


def test_nothing_to_draw_is_nothing() -> None:
    assert draw(Chart("t", "u", [Line("", [])]), 10) == ""
    assert draw(Chart("t", "u", [Line("", [(1, math.nan)])]), 10) == ""
    one = draw(Chart("t", "u", [Line("", [(1, 0.0)])]), 10)
    assert 'class="dot c0"' in one
