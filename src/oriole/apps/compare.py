"""Runs beside each other: what their stages have reached, which settings differ, their curves in one picture."""

import io
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from oriole.apps import report
from oriole.apps.charts import Chart, Line, draw, visible
from oriole.apps.curves import StageLog
from oriole.apps.reportpage import frame
from oriole.config import flat
from oriole.errors import ConfigError
from oriole.log import duration, human

__all__ = ["SCHEMA", "Compared", "text", "write_page"]

SCHEMA = 1

UNTOLD = ("run", "data", "train.resume")
"""Settings in which runs differ without being different."""

COLUMNS = ("parameters", "tokens", "time", "tokens/s", "loss")


class Compared:
    """Runs beside each other. `runs` are their stages by name, `table` is what `--json` prints.

    Raises `ConfigError` for fewer than two, `DataError` for a folder that is no run.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if len(paths) < 2:
            raise ConfigError("oriole compare needs at least two runs, for example oriole compare runs/a runs/b")
        self.runs = {name: report.read_stages(path) for name, path in zip(_names(paths), paths, strict=True)}
        made = {name: report.build(stages)["stages"] for name, stages in self.runs.items()}
        self.names = list(dict.fromkeys(stage for stages in made.values() for stage in stages))
        self.table: dict[str, Any] = {
            "schema": SCHEMA,
            "stages": {
                stage: {run: stages[stage] for run, stages in made.items() if stage in stages} for stage in self.names
            },
            "differences": {stage: _differences(self.logs(stage)) for stage in self.names},
        }

    def logs(self, stage: str) -> dict[str, StageLog]:
        """What was recorded of that stage, by run."""
        return {run: log for run, logs in self.runs.items() for log in logs if log.name == stage}


def _names(paths: Sequence[Path]) -> list[str]:
    """A run's folder name, or its path where two have the same name."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _differences(logs: Mapping[str, StageLog]) -> dict[str, dict[str, Any]]:
    """Settings that are not the same in all runs, by dotted key: {key: {run: value}}; an absent one is None.

    A key that an older run does not have yet is no difference where it is empty or off in the others.
    """
    settings = {run: _settings(log.recipe) for run, log in logs.items()}
    keys = dict.fromkeys(key for table in settings.values() for key in table if key not in UNTOLD)
    found = {key: {run: table.get(key) for run, table in settings.items()} for key in keys}
    return {key: values for key, values in found.items() if len({repr(v or None) for v in values.values()}) > 1}


def _settings(recipe: str) -> dict[str, Any]:
    try:
        return flat(tomllib.loads(recipe))
    except tomllib.TOMLDecodeError:
        return {}


def _rows(stage: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], dict[str, list[str]]]:
    """(columns, cells by run) of one stage's figures."""
    parts = list(dict.fromkeys(part for made in stage.values() for part in made.get("bpb") or {}))
    langs = list(
        dict.fromkeys(key for made in stage.values() for key in made.get("exact_match") or {} if key != "by_kind")
    )
    rows = {}
    for run, made in stage.items():
        size, rate, loss = made.get("parameters"), made.get("tokens_per_second"), made.get("loss")
        rows[run] = [
            human(size) if size else "", human(made["tokens"]), duration(made["seconds"]),
            f"{rate:,.0f}" if rate else "", f"{loss:.3f}" if loss is not None else "",
            *(_figure((made.get("bpb") or {}).get(part)) for part in parts),
            *(_percent((made.get("exact_match") or {}).get(lang)) for lang in langs),
        ]  # fmt: skip
    heads = [*COLUMNS, *(f"bpb {part}" for part in parts), *(f"exact {lang}".strip() for lang in langs)]
    return heads, rows


def _figure(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float | int) else ""


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, float | int) else ""


def text(compared: Compared) -> str:
    """The figures and the differing settings as plain text."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=report.WIDTH, color_system=None, legacy_windows=False)
    for stage in compared.names:
        heads, rows = _rows(compared.table["stages"][stage])
        console.print()
        console.rule(f" {stage} ", align="left", characters="─")
        for names, cells in ((heads, rows), _turned(compared.table["differences"][stage], list(rows))):
            if cells and names:
                table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
                for name in ("", *names):
                    table.add_column(name, justify="right" if name else "left", overflow="fold")
                for run, row in cells.items():
                    table.add_row(run, *row)
                console.print(table)
                console.print()
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip("\n")


def _turned(differences: Mapping[str, Mapping[str, Any]], runs: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The differing settings as a table with a row for each: (runs, {key: values})."""
    return runs, {key: [_setting(v) for v in values.values()] for key, values in differences.items()}


def _setting(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case int() | float():
            return f"{value:,.10g}"
        case _:
            return str(value)


# --- the page --------------------------------------------------------------------------------------------------------


def write_page(compared: Compared, path: Path) -> None:
    """Write the page to a file; `ResourceError` when that cannot be."""
    report.replace(path, _page(compared))


def _page(compared: Compared) -> str:
    sections = [(f"stage-{n}", stage, _stage(compared, stage)) for n, stage in enumerate(compared.names)]
    return frame(" · ".join(compared.runs), [], sections)


def _stage(compared: Compared, stage: str) -> str:
    heads, rows = _rows(compared.table["stages"][stage])
    runs, differ = _turned(compared.table["differences"][stage], list(rows))
    out = [_table(heads, rows)]
    if differ:
        out.append(f"<h3>Settings that differ</h3>{_table(runs, differ)}")
    return "".join([*out, _charts(compared, stage)])


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    head = "".join(f"<th>{visible(name)}</th>" for name in ("", *heads))
    body = "".join(
        f"<tr><th>{visible(name)}</th>{''.join(f'<td>{visible(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows.items()
    )
    table = f'<table class="numbers stages"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _charts(compared: Compared, stage: str) -> str:
    logs = compared.logs(stage)
    colours = {run: n for n, run in enumerate(compared.runs)}
    width = max((x for log in logs.values() for x, _ in log.points("loss")), default=0.0)
    bpb = {run: log.bpb() for run, log in logs.items()}
    parts = list(dict.fromkeys(part for points in bpb.values() for part in points))

    def one(name: str) -> list[Line]:
        return [Line(run, log.points(name), colours[run], "noisy") for run, log in logs.items()]

    charts = [
        Chart("Loss", "nats per trained token", one("loss"), log=None),
        *(
            Chart(f"Bits per byte, {part}", "held-out text",
                  [Line(run, points[part], colours[run], "dots") for run, points in bpb.items() if part in points],
                  log=None)
            for part in parts
        ),
        Chart("Learning rate", "of AdamW", one("lr"), zero=True),
        Chart("Gradient norm", "before clipping", one("grad_norm"), log=None),
        Chart("Speed", "tokens per second", one("tokens_per_second"), zero=True),
    ]  # fmt: skip
    drawn = "".join(draw(chart, width) for chart in charts)
    return f'<div class="charts large">{drawn}</div>' if drawn else ""
