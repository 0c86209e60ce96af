"""The curves that a recipe is expected to follow, from finished runs of it with several seeds.

    oriole train demo/pretrain run=runs/seed1 train.seed=1          (then demo/sft; and 2, and 3)
    python -m bench.reference out=src/oriole/recipes/demo/reference.json runs/seed1 runs/seed2 runs/seed3

A run of the same recipe then says at each evaluation whether it goes as expected, and its report shows the band. At
each of about 60 places the mean and the spread come from a straight line through the records nearby, of all seeds: the
spread is what a single record deviates from it. Of the bits per byte, which are few, the spread is taken over all
evaluations together, relative to the value and widened by sqrt(1 + 1/n), as a new run is compared with the mean of n;
it is at least 1 % (3 % when there is one seed only). Three seeds are the least that deserve trust.
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from oriole.apps.curves import Points, StageLog
from oriole.apps.report import read_stages
from oriole.config import read_toml
from oriole.errors import OrioleError
from oriole.train.reference import SCHEMA, Curve, StageReference

PLACES = 60
LEAST_SPREAD, LEAST_OF_ONE = 0.01, 0.03


def main() -> None:
    """Make the file and print what it says."""
    runs = [Path(word) for word in sys.argv[1:] if not word.startswith("out=")]
    out = next((Path(word.removeprefix("out=")) for word in sys.argv[1:] if word.startswith("out=")), None)
    if out is None or not runs:
        raise SystemExit("python -m bench.reference out=FILE RUN...")
    try:
        made = make(runs)
    except OrioleError as error:
        raise SystemExit(f"bench.reference: {error}") from error
    out.write_text(json.dumps(made, ensure_ascii=False) + "\n", encoding="utf-8")
    table = Table(title=str(out))
    for column in ("stage", "seeds", "last loss", "last bits per byte"):
        table.add_column(column)
    for name, stage in made["stages"].items():
        bpb = ", ".join(f"{part} {_last(curve)}" for part, curve in stage["bpb"].items())
        table.add_row(name, str(len(stage["seeds"])), _last(stage["loss"]), bpb)
    Console().print(table)


def make(runs: Sequence[Path]) -> dict[str, Any]:
    """The content of a reference.json from the finished stages that all `runs` have."""
    logs = [{stage.name: stage for stage in read_stages(run) if stage.finished} for run in runs]
    names = [name for name in logs[0] if all(name in each for each in logs)]
    if not names:
        raise OrioleError(f"no stage is finished in all of {', '.join(map(str, runs))}")
    stages = {name: _stage([each[name] for each in logs]).model_dump(mode="json") for name in names}
    return {"schema": SCHEMA, "stages": stages}


def _stage(logs: Sequence[StageLog]) -> StageReference:
    identities = [_identity(log) for log in logs]
    for log, identity in zip(logs, identities, strict=True):
        differ = [k for k in identities[0].keys() | identity.keys() if identities[0].get(k) != identity.get(k)]
        if differ:
            raise OrioleError(
                f"{log.folder} is another run than {logs[0].folder}: {', '.join(sorted(differ)[:4])} differ"
            )
    seeds = [int(read_toml(log.folder / "recipe.toml")["train"]["seed"]) for log in logs]
    if len(set(seeds)) < len(seeds):
        raise OrioleError(f"the runs of stage {logs[0].name} have the seeds {seeds}; give each its own train.seed")
    done = logs[0].last("done")
    bpb = [log.bpb() for log in logs]
    return StageReference(
        identity=identities[0],
        seeds=tuple(seeds),
        device=f"{done.get('device', '')} {done.get('dtype', '')}".strip(),
        commit=str(logs[0].env.get("commit", "")),
        loss=smooth([log.points("loss") for log in logs]),
        bpb={part: pooled([each[part] for each in bpb]) for part in bpb[0]},
    )


def _identity(log: StageLog) -> dict[str, Any]:
    try:
        return dict(json.loads((log.folder / "identity.json").read_text(encoding="utf-8"))["identity"])
    except (OSError, ValueError, KeyError) as error:
        raise OrioleError(f"{log.folder} has no identity.json; train it with this version") from error


def smooth(curves: Sequence[Points]) -> Curve:
    """Mean and spread at about 60 places, from a line through the nearby records of all seeds."""
    grid = np.array([tokens for tokens, _ in curves[0]])
    values = np.array([np.interp(grid, *zip(*_finite(points), strict=True)) for points in curves])  # (seeds, records)
    # A step of a few records early on, where the loss falls steeply, and wider ones later.
    reach = max(2, len(grid) // PLACES)
    places = sorted({round(p) for p in np.linspace(0, len(grid) - 1, min(PLACES, len(grid)))})
    rows = []
    for place in places:
        near = slice(max(0, place - reach), place + reach + 1)
        x = np.tile(grid[near] - grid[place], len(curves))
        y = values[:, near].ravel()
        slope, mean = np.polyfit(x, y, 1)
        deviations = y - (mean + slope * x)
        spread = math.sqrt(float(np.square(deviations).sum()) / max(1, len(y) - 2))
        rows.append((float(grid[place]), float(mean), max(spread, LEAST_SPREAD * abs(float(mean)))))
    return _curve(rows)


def pooled(curves: Sequence[Points]) -> Curve:
    """Mean at each evaluation, and one relative spread for all of them."""
    rows = [(points[0][0], [value for _, value in points]) for points in zip(*curves, strict=True)]
    relative = [statistics.stdev(ys) / statistics.fmean(ys) for _, ys in rows if len(ys) > 1]
    widened = math.sqrt(1 + 1 / len(curves))
    spread = widened * math.sqrt(statistics.fmean(r * r for r in relative)) if relative else LEAST_OF_ONE
    means = [(tokens, statistics.fmean(ys)) for tokens, ys in rows]
    return _curve([(tokens, mean, max(spread, LEAST_SPREAD) * mean) for tokens, mean in means])


def _finite(points: Points) -> Points:
    return [point for point in points if math.isfinite(point[1])]


def _curve(rows: Sequence[tuple[float, float, float]]) -> Curve:
    tokens, mean, spread = zip(*rows, strict=True)
    return Curve(
        tokens=tokens, mean=tuple(float(f"{m:.5g}") for m in mean), spread=tuple(float(f"{s:.3g}") for s in spread)
    )


def _last(curve: dict[str, Any]) -> str:
    return f"{curve['mean'][-1]:.3f} ± {curve['spread'][-1]:.3f}"


if __name__ == "__main__":
    main()
