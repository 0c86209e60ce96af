"""What a run has reached: report.json for programs, report.html to look at, a page of text for the terminal.

Built from the run's own files, whether its stages are finished or not.
"""

import io
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from oriole.apps import gatereport, pairfigures
from oriole.apps.curves import Points, StageLog, number, read_events, read_stage
from oriole.apps.reportpage import page
from oriole.errors import DataError, raise_for_os_error
from oriole.log import duration, human

__all__ = ["SCHEMA", "build", "gate_table", "questions_table", "read_events", "read_stages", "replace", "text", "write"]

SCHEMA = 1
STAGES = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo", "distill", "seq2seq")
NUM_SAMPLES = 6
WIDTH = 100


def read_stages(run: Path) -> list[StageLog]:
    """The stages of a run folder that have recorded something, in the order of training; DataError without any."""
    folders = [path.parent for path in run.glob("*/metrics.jsonl")]
    order = {name: n for n, name in enumerate(STAGES)}
    stages = [read_stage(folder) for folder in sorted(folders, key=lambda f: (order.get(f.name, len(order)), f.name))]
    stages = [stage for stage in stages if stage.events]
    if not stages and (run / "metrics.jsonl").exists():
        raise DataError(f"{run} is one stage; give the run folder above it: oriole report {run.parent}")
    if not stages:
        raise DataError(f"{run} holds no stage that has begun; train one first, for example with oriole demo run={run}")
    return stages


def build(stages: Sequence[StageLog]) -> dict[str, Any]:
    """The report of a run's stages, as it stands in report.json."""
    newest = stages[-1]
    kept = next((s for s in reversed(stages) if s.last("gate").get("verdict") != "worse"), newest)
    return {
        "schema": SCHEMA,
        "commit": str(newest.env.get("commit", "")),
        "device": str(newest.last("done").get("device") or newest.last("start").get("device", "")),
        "stages": {stage.name: _stage(stage) for stage in stages},
        "samples": _samples(kept.folder),
    }


def _stage(stage: StageLog) -> dict[str, Any]:
    """A stage's figures; of one that is not finished, those so far."""
    done, step, start = stage.last("done"), stage.last("step"), stage.last("start")
    evaluations = stage.all("eval")
    times = stage.times()
    steps = [int(e["step"]) for e in (step, start) if e.get("step") is not None]
    made = {
        "finished": stage.finished,
        "seconds": done.get("seconds", round(sum(times.values()), 2)),
        "tokens": done.get("tokens", step.get("tokens", 0)),
        "step": max(steps, default=0),
        "parameters": done.get("parameters"),
        "loss": _finite(done.get("loss", step.get("loss"))),
        "tokens_per_second": done.get("tokens_per_second", step.get("tokens_per_second")),
        "mfu": _median(stage.points("mfu")),
        "skipped": done.get("skipped", step.get("skipped")),
        "bpb_before": done.get("bpb_before", evaluations[0].get("bpb") if evaluations else None),
        "bpb": done.get("bpb", evaluations[-1].get("bpb") if evaluations else None),
        "times": {what: round(seconds, 2) for what, seconds in times.items()},
    }
    if pairs := pairfigures.figures(stage):
        made["pairs"] = pairs
    asked, gate = stage.last("questions"), stage.last("gate")
    made |= {k: asked[k] for k in ("exact_match", "loop_rate") if k in asked}
    if gate:
        made["gate"] = {k: v for k, v in gate.items() if k not in ("event", "settings")}
        made["gate"]["examples"] = gatereport.side_by_side(stage.folder)
    return made


def _finite(value: Any) -> float | None:
    found = number(value)
    return found if math.isfinite(found) else None


def _median(points: Points) -> float | None:
    values = [value for _, value in points if math.isfinite(value)]
    return round(median(values), 4) if values else None


def write(run: Path) -> dict[str, Any]:
    """Build the report of a run, keep it in `report.json` and `report.html`, and return it."""
    stages = read_stages(run)
    report = build(stages)
    replace(run / "report.json", json.dumps(report, ensure_ascii=False, indent=2) + "\n")
    replace(run / "report.html", page(run.resolve().name, report, stages))
    return report


def replace(path: Path, content: str) -> None:
    """Write a file whole or not at all; `ResourceError` when that cannot be."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content.encode("utf-8", "replace"))
        os.replace(part, path)
    except OSError as error:
        raise_for_os_error(error, "writing", path)


def _samples(stage: Path) -> list[dict[str, Any]]:
    """Six answered questions, each of another kind and the languages in turn; the first of their kind, not the best."""
    path = stage / "answers.jsonl"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        answers = [json.loads(line) for line in file]
    kinds = list(dict.fromkeys(a["kind"] for a in answers))
    languages = itertools.cycle(sorted({a["lang"] for a in answers}, reverse=True))
    samples: list[dict[str, Any]] = []
    for kind, lang in zip(kinds, languages, strict=False):
        found = next((a for a in answers if (a["kind"], a["lang"]) == (kind, lang)), None)
        if found and len(samples) < NUM_SAMPLES:
            samples.append({k: found[k] for k in ("kind", "lang", "messages", "answer", "answers", "correct")})
    return samples


# --- for the terminal ------------------------------------------------------------------------------------------------


def text(report: Mapping[str, Any]) -> str:
    """The report as a page of plain text, Chinese aligned."""
    page = _Page()
    page.heading("Stages")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("", "parameters", "tokens", "time", "bits per byte zh", "bits per byte en"):
        table.add_column(column, justify="left" if not column else "right")
    for name, stage in report["stages"].items():
        bpb = [_change(stage, lang) for lang in ("zh", "en")]
        size = human(stage["parameters"]) if stage["parameters"] else ""
        state = name if stage["finished"] else f"{name} (not finished)"
        table.add_row(state, size, human(stage["tokens"]), duration(stage["seconds"]), *bpb)
    page.add(table)
    for name, stage in report["stages"].items():
        if "pairs" in stage:
            page.heading(f"Held-out preference pairs, {name}")
            page.add(pairfigures.table(stage["pairs"]))
    for stage in report["stages"].values():
        if "exact_match" in stage:
            page.heading("Held-out questions, exact match")
            page.add(_questions(stage))
    for name, stage in report["stages"].items():
        if "gate" in stage:
            page.heading(f"{name} against its parent, {stage['gate'].get('parent', '')}: {stage['gate']['verdict']}")
            page.add(_gate(stage["gate"]))
            page.add(Text(stage["gate"]["why"]))
    if report["samples"]:
        page.heading("Samples")
        for sample in report["samples"]:
            page.add(_conversation(sample))
    page.heading(f"commit {report['commit'] or 'unknown'} · {report['device']}")
    return page.text()


def questions_table(result: Mapping[str, Any]) -> str:
    """Exact match by kind and language, and the loop rate, as plain text."""
    page = _Page()
    page.add(_questions(result))
    return page.text()


def gate_table(gate: Mapping[str, Any]) -> str:
    """A comparison of two models (apps.gate) as plain text, the verdict first."""
    page = _Page()
    page.heading(gate["verdict"])
    page.add(_gate(gate))
    page.add(Text(gate["why"]))
    return page.text()


class _Page:
    """Collects rich renderables and gives them back as plain text of a fixed width."""

    def __init__(self) -> None:
        self._buffer = io.StringIO()
        self._console = Console(file=self._buffer, width=WIDTH, color_system=None, legacy_windows=False)

    def heading(self, words: str) -> None:
        self._console.print()
        self._console.rule(f" {words} ", align="left", characters="─")

    def add(self, what: Table | Text) -> None:
        self._console.print(Padding(what, (0, 0, 0, 2)))

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._buffer.getvalue().splitlines()).strip("\n")


def _change(stage: Mapping[str, Any], lang: str) -> str:
    before, after = (stage.get(key) or {} for key in ("bpb_before", "bpb"))
    return f"{before[lang]:.2f} → {after[lang]:.2f}" if lang in before and lang in after else ""


def _questions(result: Mapping[str, Any]) -> Table:
    match: Mapping[str, Any] = result["exact_match"]
    languages = [key for key in match if key != "by_kind"]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for lang in languages:
        table.add_column(lang or "all", justify="right")
    for kind, shares in match.get("by_kind", {}).items():
        table.add_row(kind, *(gatereport.percent(shares.get(lang)) for lang in languages))
    table.add_row("mean over kinds", *(gatereport.percent(match[lang]) for lang in languages), style="bold")
    table.add_row("loop rate", gatereport.percent(result.get("loop_rate")))
    return table


def _gate(gate: Mapping[str, Any]) -> Table:
    """A preference stage beside its parent: what each reaches, and the difference or win rate with its interval."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in (f"{gate['prompts']:,} held-out prompts", "parent", "stage", "", "95 % interval"):
        table.add_column(column, justify="left" if "prompts" in column else "right")
    for row in gatereport.rows(gate):
        table.add_row(*row)
    return table


def _conversation(sample: Mapping[str, Any]) -> Text:
    """The turns of a conversation, the model's answer last; ✓ where it is an accepted one."""
    turns: Sequence[Mapping[str, Any]] = sample["messages"]
    lines = [
        f"{'·' if turn['role'] == 'system' else '›' if turn['role'] == 'user' else ' '} {turn['content']}"
        for turn in turns
    ]
    mark = "✓" if sample["correct"] else f"✗ (expected: {sample['answers'][0]})"
    lines.append(f"  {sample['answer']}   {mark}")
    return Text("\n".join([*lines, ""]))
