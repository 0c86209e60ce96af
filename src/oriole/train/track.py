"""A run's records on a dashboard as well: TensorBoard or trackio, chosen by the recipe's key `track`.

metrics.jsonl stays the record of the run; what is written here are the same figures, at the same steps.
"""

import contextlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oriole.config import to_toml
from oriole.errors import MissingExtra
from oriole.log import Sink, lines_of
from oriole.train.recipe import Recipe

__all__ = ["figures", "sinks", "texts"]

GROUPS = {"step": "train", "eval": "eval"}
"""Records that hold figures, and the group in which a dashboard shows them."""


def sinks(recipe: Recipe) -> list[Sink]:
    """The dashboard that the recipe wants; `MissingExtra` at once when its library is not installed."""
    match recipe.track:
        case "none":
            return []
        case "tensorboard":
            return [TensorBoard(recipe)]
        case "trackio":
            return [Trackio(recipe)]


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by dashboard name: {"event": "eval", "bpb": {"zh": 2.1}} -> {"eval/bpb/zh": 2.1}."""
    group = GROUPS.get(record.get("event", ""))
    return _numbers({k: v for k, v in record.items() if k not in ("event", "step")}, group) if group else {}


def _numbers(table: Mapping[str, Any], prefix: str) -> dict[str, float]:
    out: dict[str, float] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            out |= _numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out[f"{prefix}/{key}"] = float(value)
    return out


def texts(record: Mapping[str, Any]) -> dict[str, str]:
    """What a record says in words, as Markdown that shows it verbatim: its samples, or the whole of a rare event."""
    match record.get("event"):
        case "step" | "save":
            return {}
        case "eval":
            return {f"samples/{s['prompt']}": _verbatim(s["prompt"] + s["text"]) for s in record.get("samples", ())}
        case event:
            words = {k: v for k, v in record.items() if k != "event"}
            return {f"events/{event}": _verbatim(json.dumps(words, ensure_ascii=False, indent=1, default=str))}


def _verbatim(text: str) -> str:
    """Markdown of a code block: a dashboard must neither format nor run what a model has said."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


class TensorBoard:
    """Writes TensorBoard's event files to `runs/<name>/<stage>/tensorboard`.

    They begin with the start record, whose step says what an earlier, broken process has written too far: TensorBoard
    then leaves those scalars out. (Of texts it would show both; they are the same ones.)
    """

    def __init__(self, recipe: Recipe) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("track=tensorboard", "track") from error
        self._writer_class: Any = SummaryWriter
        self._folder = recipe.folder / "tensorboard"
        self._recipe = to_toml(recipe)
        self._writer: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        """One record; it is on disk when this returns."""
        step = record.get("step")
        if self._writer is None:
            # Everything later than this step was written by a process that did not get to save it.
            self._writer = self._writer_class(str(self._folder), purge_step=(step or 0) + 1)
            self._writer.add_text("recipe", _verbatim(self._recipe), step)
        for name, value in figures(record).items():
            self._writer.add_scalar(name, value, step)
        for name, text in texts(record).items():
            self._writer.add_text(name, text, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class Trackio:
    """Sends records to a local trackio project: project = the run's name, run = the stage.

    trackio cannot take back what a broken process has written after its last checkpoint; a resumed run goes through
    the same steps with the same result, so they are left out the second time.
    """

    def __init__(self, recipe: Recipe) -> None:
        try:
            import trackio
        except ImportError as error:
            raise MissingExtra("track=trackio", "track") from error
        self._trackio: Any = trackio
        self._recipe = recipe
        self._run: Any = None
        self._written = _last_step(recipe.folder / "metrics.jsonl")

    def write(self, record: Mapping[str, Any]) -> None:
        """One record; trackio stores it from a thread of its own."""
        step = int(record.get("step") or 0)
        if self._run is None:
            project = re.sub(r"[^\w.-]+", "-", self._recipe.run.resolve().name).strip("-") or "oriole"
            with contextlib.redirect_stdout(sys.stderr):  # trackio greets on stdout, where only results belong
                self._run = self._trackio.init(
                    project=project, name=self._recipe.stage, config=self._recipe.model_dump(mode="json"),
                    resume="allow" if step else "never", embed=False,
                )  # fmt: skip
            if not step:
                self._written = -1
        found: dict[str, Any] = dict(figures(record))
        found |= {name: self._trackio.Markdown(text) for name, text in texts(record).items()}
        if found and (step > self._written or record.get("event") not in GROUPS):
            self._run.log(found, step=step)

    def close(self) -> None:
        """Wait until trackio has stored everything."""
        if self._run is not None:
            with contextlib.redirect_stdout(sys.stderr):
                self._trackio.finish()


def _last_step(path: Path) -> int:
    """The last step in a metrics.jsonl, -1 when there is none."""
    steps = [int(found[1]) for line in lines_of(path) if (found := re.search(r'"step": (\d+)', line))]
    return max(steps, default=-1)
