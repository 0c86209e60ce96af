"""A stage's files, read for its report: what was recorded, in the order in which it counts.

metrics.jsonl is only ever appended to. A process that was killed, and went on from its last checkpoint, or a run that
rolled back after a spike, has records of steps that were then done anew; `read_stage` sets those aside.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from oriole.errors import DataError
from oriole.log import lines_of

__all__ = ["Mark", "Points", "StageLog", "number", "read_events", "read_stage"]

Points = list[tuple[float, float]]
"""(trained tokens, value), in order; a value may be nan."""

REPEATED = ("step", "eval", "save")
"""Events that a process repeats which goes on from an earlier step."""

ORDINARY = ("start", "step", "eval", "save", "done", "questions")
"""Events that are not worth a mark in a picture."""


def read_events(stage: Path) -> list[dict[str, Any]]:
    """The records of a stage's metrics.jsonl; a torn last line (a crash while writing) is left out."""
    path = stage / "metrics.jsonl"
    lines, records = lines_of(path), []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not valid JSON; restore the file") from error
    return [record for record in records if isinstance(record, dict)]


def number(value: Any) -> float:
    """A recorded number, nan and inf included (they are written as strings); nan when there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


@dataclass(frozen=True)
class Mark:
    """Something out of the ordinary: a skipped update, a resume, a spike."""

    tokens: float
    step: int
    what: str
    why: str


@dataclass(frozen=True)
class StageLog:
    """One stage of a run, finished or not."""

    name: str
    folder: Path
    events: list[dict[str, Any]]
    """The records that count."""
    undone: list[dict[str, Any]]
    """Records of steps that were later done anew."""
    env: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    """recipe.toml, as text."""
    reference: dict[str, Any] = field(default_factory=dict)
    """reference.json: the curves that this recipe is expected to follow, where it is known (train.reference)."""

    def last(self, event: str) -> dict[str, Any]:
        """The last record of that kind, {} when there is none."""
        return next((e for e in reversed(self.events) if e.get("event") == event), {})

    def all(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e.get("event") == event]

    @property
    def finished(self) -> bool:
        return bool(self.last("done"))

    @cached_property
    def _tokens_at(self) -> dict[int, float]:
        found = {0: 0.0}
        for e in [*self.undone, *self.events]:
            if "step" in e and "tokens" in e:
                found[int(e["step"])] = number(e["tokens"])
        return found

    def tokens_at(self, step: int) -> float:
        """Tokens trained after `step` steps; older runs did not write them with every record."""
        known = self._tokens_at
        if step in known:
            return known[step]
        before = max(s for s in known if s <= step)
        after = min((s for s in known if s > step), default=None)
        if after is None:
            last = max(known)
            return known[last] * step / last if last else 0.0
        return known[before] + (known[after] - known[before]) * (step - before) / (after - before)

    def points(self, name: str, *, undone: bool = False) -> Points:
        """A figure of the step records over the tokens."""
        steps = [e for e in (self.undone if undone else self.events) if e.get("event") == "step" and name in e]
        return [(self.tokens_at(int(e["step"])), number(e[name])) for e in steps]

    def bpb(self) -> dict[str, Points]:
        """Bits per byte of each part over the tokens."""
        out: dict[str, Points] = {}
        for e in self.all("eval"):
            bpb = e.get("bpb")
            for part, value in bpb.items() if isinstance(bpb, Mapping) else ():
                out.setdefault(str(part), []).append((self.tokens_at(int(e["step"])), number(value)))
        return out

    def samples(self) -> dict[str, list[tuple[float, str]]]:
        """How each fixed prompt was continued, over the tokens."""
        out: dict[str, list[tuple[float, str]]] = {}
        for e in self.all("eval"):
            for sample in e.get("samples") or ():
                at = self.tokens_at(int(e["step"]))
                out.setdefault(str(sample.get("prompt", "")), []).append((at, str(sample.get("text", ""))))
        return out

    def expected(self, name: str, part: str = "") -> list[tuple[float, float, float]]:
        """(tokens, mean, spread) of the reference's curve of the loss, or of a part's bits per byte."""
        curve = self.reference.get(name, {})
        curve = curve.get(part, {}) if part else curve
        columns = [[number(v) for v in curve.get(key, ())] for key in ("tokens", "mean", "spread")]
        return [(t, m, s) for t, m, s in zip(*columns, strict=False) if math.isfinite(t + m + s)]

    def marks(self) -> list[Mark]:
        """What is worth a mark, by tokens: resumes, skipped updates, and every event that is not ordinary."""
        return sorted(self._marks(), key=lambda mark: mark.tokens)

    def _marks(self) -> Iterator[Mark]:
        for first, e in enumerate(self.all("start")):
            if first and e.get("step") is not None:
                step = int(e["step"])
                yield Mark(self.tokens_at(step), step, "resumed", f"went on from step {step:,}")
        before = 0
        for e in self.all("step"):
            step, skipped = int(e["step"]), int(number(e.get("skipped", 0)))
            if skipped > before:
                updates = "one update" if skipped == before + 1 else f"{skipped - before} updates"
                yield Mark(self.tokens_at(step), step, "skipped", f"{updates} left out: loss or gradients not finite")
            before = skipped
        for e in [*self.undone, *self.events]:
            if e.get("event") not in ORDINARY and "step" in e:
                step = int(e["step"])
                yield Mark(self.tokens_at(step), step, str(e.get("what", e.get("event"))), str(e.get("why", "")))

    def times(self) -> dict[str, float]:
        """Where the time went, in seconds; only what the records tell."""
        windows = self._windows()
        if not windows:
            return {}
        stepping = sum(seconds for seconds, _, _ in windows)
        parts = {"waiting for data": sum(seconds * wait for seconds, _, wait in windows if math.isfinite(wait))}
        if self.last("start").get("compile"):
            first, rate, _ = windows[0]
            usual = median(rate for _, rate, _ in windows)
            parts["compiling, in the first steps"] = max(0.0, first - first * rate / usual)
        training = stepping - sum(parts.values())
        for what, event in (("evaluations", "eval"), ("checkpoints", "save")):
            parts[what] = sum(max(0.0, number(e.get("seconds", 0))) for e in self.all(event))
        whole = number(self.last("done").get("seconds"))
        if math.isfinite(whole):
            beside = stepping + parts["evaluations"] + parts["checkpoints"]
            parts["starting and the rest"] = max(0.0, whole - beside)
        return {"training": training} | {what: seconds for what, seconds in parts.items() if seconds > 0}

    def _windows(self) -> list[tuple[float, float, float]]:
        """(seconds, tokens/s, share of them waited for data) of each step record."""
        out, before = [], 0.0
        for e in self.events:
            if e.get("event") in ("start", "step") and e.get("step") is not None:
                tokens, rate = self.tokens_at(int(e["step"])), number(e.get("tokens_per_second"))
                if rate > 0 and tokens > before:
                    out.append(((tokens - before) / rate, rate, number(e.get("data_wait", 0))))
                before = tokens
        return out


def read_stage(folder: Path) -> StageLog:
    """A stage from its folder; what cannot be read in it is empty."""
    events, undone = _settled(read_events(folder))
    try:
        recipe = (folder / "recipe.toml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        recipe = ""
    env, reference = (_table(folder / name) for name in ("env.json", "reference.json"))
    return StageLog(folder.name, folder, events, undone, env, recipe, reference)


def _table(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _settled(records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(records that count, records of steps that were done anew), each in order."""
    kept: list[dict[str, Any]] = []
    undone: list[dict[str, Any]] = []
    newest: dict[Any, int] = {}
    for record in records:
        step, event = record.get("step"), record.get("event")
        back = step if event == "start" else record.get("to") if record.get("what") == "rollback" else None
        if isinstance(step, int) and (isinstance(back, int) or event in ("step", "eval")):
            # A process that starts after step s, or goes back to it, does s + 1 anew; a record of step s does s anew.
            limit, again = (back, REPEATED) if isinstance(back, int) else (step - 1, (event,))
            if any(newest.get(kind, -1) > limit for kind in again):
                late = [r.get("event") in again and r.get("step", -1) > limit for r in kept]
                undone += [r for r, gone in zip(kept, late, strict=True) if gone]
                kept = [r for r, gone in zip(kept, late, strict=True) if not gone]
                newest |= dict.fromkeys(again, limit)
        if isinstance(step, int):
            newest[event] = max(step, newest.get(event, -1))
        kept.append(record)
    return kept, undone
