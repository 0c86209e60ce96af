"""What a run has reached: report.json for programs, a page of text for the terminal. Built from the run's own files."""

import io
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from oriole.errors import DataError, raise_for_os_error
from oriole.log import duration, human

__all__ = ["SCHEMA", "build", "questions_table", "read_events", "text", "write"]

SCHEMA = 1
STAGES = ("pretrain", "sft")
NUM_SAMPLES = 6
WIDTH = 100


def read_events(stage: Path) -> list[dict[str, Any]]:
    """The records of a stage's metrics.jsonl; a torn last line (a crash while writing) is left out."""
    try:
        lines = (stage / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{stage / 'metrics.jsonl'}, line {number}: not valid JSON; restore the file") from error
    return records


def build(run: Path) -> dict[str, Any]:
    """The report of a run folder; DataError when no stage in it is finished."""
    stages: dict[str, Any] = {}
    commit = device = ""
    for stage in STAGES:
        events = read_events(run / stage)
        done = next((e for e in reversed(events) if e.get("event") == "done"), None)
        if done is None:
            continue
        stages[stage] = {k: done[k] for k in ("seconds", "tokens", "parameters", "bpb_before", "bpb") if k in done}
        device = done.get("device", "")
        commit = _commit(run / stage)
        if asked := next((e for e in reversed(events) if e.get("event") == "questions"), None):
            stages[stage] |= {k: asked[k] for k in ("exact_match", "loop_rate") if k in asked}
    if not stages:
        raise DataError(f"{run} holds no finished stage; train one first, for example with oriole demo run={run}")
    return {
        "schema": SCHEMA,
        "commit": commit,
        "device": device,
        "stages": stages,
        "samples": _samples(run / list(stages)[-1]),
    }


def write(run: Path) -> dict[str, Any]:
    """Build the report of a run, keep it in `report.json`, and return it."""
    report = build(run)
    path = run / "report.json"
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise_for_os_error(error, "writing", path)
    return report


def _commit(stage: Path) -> str:
    try:
        return str(json.loads((stage / "env.json").read_text(encoding="utf-8"))["commit"])
    except (OSError, json.JSONDecodeError, KeyError):
        return ""


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
        table.add_row(name, human(stage["parameters"]), human(stage["tokens"]), duration(stage["seconds"]), *bpb)
    page.add(table)
    for stage in report["stages"].values():
        if "exact_match" in stage:
            page.heading("Held-out questions, exact match")
            page.add(_questions(stage))
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
    for kind, shares in match["by_kind"].items():
        table.add_row(kind, *(_percent(shares.get(lang)) for lang in languages))
    table.add_row("mean over kinds", *(_percent(match[lang]) for lang in languages), style="bold")
    table.add_row("loop rate", _percent(result["loop_rate"]))
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


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
