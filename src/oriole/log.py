"""What a run says: `metrics.jsonl` for programs, one live line for people, plain lines when piped."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from oriole.errors import OrioleError, raise_for_os_error

__all__ = [
    "Metrics", "Sink", "Tracker", "console", "duration", "human", "judged_worse", "last_record", "lines_of",
    "say", "track",
]  # fmt: skip

console = Console(stderr=True, highlight=False)
"""Progress and remarks go to stderr; stdout carries results only."""

PLAIN_EVERY_S = 10.0
"""Seconds between two plain progress lines when stderr is not a terminal."""


def say(message: str, style: str = "") -> None:
    """One remark for the person at the terminal (never wrapped when piped)."""
    console.print(Text(message, style=style), soft_wrap=True)


def human(n: float) -> str:
    """`1234567` -> `1.23M`; `5.5e6` -> `5.5M`; below a thousand as it is."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= limit:
            return f"{n / limit:.3g}{unit}"
    return f"{n:.3g}"


def duration(seconds: float) -> str:
    """`75` -> `1:15`; `3700` -> `1:01:40`; unknown (inf, nan) -> `-:--`."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Sink(Protocol):
    """A place besides metrics.jsonl that gets every record: a dashboard, or whoever compares with what is expected."""

    def write(self, record: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """Appends one JSON object a line to `metrics.jsonl`. Non-finite numbers are written as strings ("nan").

    Each record then goes to the sinks in `also`. One that fails is said aloud and left out from then on: the file is
    the record of the run, and nothing that only looks at it may end a training.
    """

    def __init__(self, path: Path, also: Sequence[Sink] = ()) -> None:
        self.path = path
        self._also = list(also)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(path)
            self._file = open(path, "a", encoding="utf-8")
        except OSError as error:
            raise_for_os_error(error, "opening", path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and flush it, so that a crash loses nothing already said."""
        line = json.dumps({k: _finite(v) for k, v in record.items()}, ensure_ascii=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise_for_os_error(error, "writing", self.path)
        for sink in [*self._also]:
            try:
                sink.write(record)
            except OrioleError:
                raise
            except Exception as error:
                self._also.remove(sink)
                say(f"{type(sink).__name__} failed ({error}); going on with {self.path.name} alone", "yellow")

    def close(self) -> None:
        """Close the file and the sinks; writing afterwards is an error."""
        self._file.close()
        for sink in self._also:
            sink.close()


def _drop_torn_line(path: Path) -> None:
    """Cut off what a crash or a full disk left of a last line, lest the next record be written behind it."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def lines_of(path: Path) -> list[str]:
    """The lines of a metrics.jsonl, none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def last_record(path: Path, event: str, *, after: str = "") -> dict[str, Any]:
    """The last record of that kind in a metrics.jsonl, {} when there is none, or none since the last event `after`."""
    for line in reversed(lines_of(path)):
        try:
            record = json.loads(line)
        except ValueError:  # a torn last line
            continue
        if isinstance(record, dict) and record.get("event") == event:
            return record
        if after and isinstance(record, dict) and record.get("event") == after:
            return {}
    return {}


def judged_worse(stage: Path) -> bool:
    """Whether the gate found the stage in this folder, as it stands, worse than its parent (apps.gate)."""
    return last_record(stage / "metrics.jsonl", "gate", after="done").get("verdict") == "worse"


class _Fields(ProgressColumn):
    """Rate, extra fields (loss …) and time left of a task, as one text column."""

    def render(self, task: Task) -> Text:
        return Text(_status(task.fields["tracker"]), style="cyan")


class Tracker:
    """Progress of one piece of work: a live bar on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, what: str, total: float | None, unit: str, done: float = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self._start_done = done
        self.fields: dict[str, str] = {}
        self._start = self._last_plain = time.monotonic()
        self._bar: Progress | None = None
        # rich may draw only when stderr is a real terminal; CI logs and pipes get whole lines.
        if console.is_terminal and os.environ.get("TERM") != "dumb":
            self._bar = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"), _Fields(), console=console, transient=False,
                refresh_per_second=4,
            )  # fmt: skip
            self._task = self._bar.add_task(what, total=total, completed=int(done), tracker=self)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and time.monotonic() - self._start > 2:
            self._plain()

    def update(self, advance: float = 0, **fields: str) -> None:
        """Move on by `advance` units and show `fields` (for example `loss="2.31"`)."""
        self.done += advance
        self.fields |= fields
        if self._bar:
            self._bar.update(self._task, completed=self.done)
        elif time.monotonic() - self._last_plain >= PLAIN_EVERY_S:
            self._plain()

    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self._start_done) / max(1e-9, time.monotonic() - self._start)

    def eta(self) -> float:
        """Seconds left at the present rate, `inf` when unknown."""
        rate = self.rate()
        return (self.total - self.done) / rate if self.total and rate > 0 else math.inf

    def _plain(self) -> None:
        self._last_plain = time.monotonic()
        percent = f" {100 * self.done / self.total:.0f}%" if self.total else ""
        if not console.quiet:
            print(f"{self.what}{percent} · {_status(self)}", file=sys.stderr, flush=True)


def _status(t: Tracker) -> str:
    left = f"{duration(t.eta())} left" if t.total and t.done < t.total else duration(time.monotonic() - t._start)
    return " · ".join([f"{human(t.rate())} {t.unit}/s", *(f"{k} {v}" for k, v in t.fields.items()), left])


@contextmanager
def track(what: str, total: float | None = None, unit: str = "it", done: float = 0) -> Iterator[Tracker]:
    """`with track("cleaning", total=n, unit="docs") as bar: … bar.update(1, kept="93%")`."""
    with Tracker(what, total, unit, done) as tracker:
        yield tracker
