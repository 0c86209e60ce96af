"""What `oriole plan` says beside what training then takes: time of `Trainer.fit`, and the process's highest memory.

    python -m bench.plan
    python -m bench.plan recipes=demo/pretrain tokens=1.75e6      # the whole demo stage
    python -m bench.plan recipes=26m/pretrain data=DATA tokens=1e6 json=/tmp/plan.json

Every recipe is planned and then really trained, each in a process of its own, one after the other, in its short form
(SHORT) unless `tokens` says more. On a machine with other work the two meet different machines.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.record import save, settings

DEFAULTS = {
    "recipes": "demo/pretrain,demo/sft,26m/pretrain",
    "tokens": 0.0,
    "data": "builtin",
    "probe": 20.0,
    "json": "",
}
SHORT = {
    "demo/pretrain": ["train.tokens=3.2e5"],
    "demo/sft": ["train.tokens=2.5e5"],
    "26m/pretrain": [
        "tokenizer.vocab_size=6400", "tokenizer.sample_mb=4", "train.tokens=1e5", "train.batch_size=4",
        "train.length=512", "train.accumulate=2", "eval.tokens=4000",
    ],
}  # fmt: skip
"""Lengths at which a stage takes some minutes on two cores."""


def main() -> None:
    """Plan, train, compare and print."""
    chosen = settings(DEFAULTS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in str(chosen["recipes"]).split(","):
            words = [f"run={folder}/{name.partition('/')[0]}", *SHORT.get(name, [])]
            if chosen["tokens"]:
                words.append(f"train.tokens={chosen['tokens']}")
            if name.partition("/")[0] != "demo":
                words.append(f"data={chosen['data']}")
            planned = _planned(name, [*words, f"probe={chosen['probe']}"])
            rows.append({"recipe": name, "words": words, **_compared(planned, _trained(name, words))})
            print(json.dumps(rows[-1]), file=sys.stderr)
    save("plan", chosen, {"rows": rows}, str(chosen["json"]) or None)
    _show(rows)


def _fresh_cache() -> dict[str, str]:
    """An environment in which nothing was compiled yet: otherwise training finds what its plan has compiled."""
    return os.environ | {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(prefix="oriole-compiled-")}


def _planned(name: str, words: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "oriole.cli", "plan", name, *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=_fresh_cache())
    stage: dict[str, Any] = json.loads(done.stdout)["stages"][0]
    return stage


def _trained(name: str, words: list[str]) -> dict[str, Any]:
    """The stage's closing record, with the process's highest memory."""
    child = subprocess.Popen([sys.executable, "-m", "oriole.cli", "train", name, *words], env=_fresh_cache())
    peak, status = 0, Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        except OSError:
            found = None
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.05)
    if child.returncode:
        raise SystemExit(f"training {name} ended with {child.returncode}")
    run = next(w for w in words if w.startswith("run=")).removeprefix("run=")
    records = (Path(run) / name.partition("/")[2] / "metrics.jsonl").read_text().splitlines()
    done: dict[str, Any] = next(r for r in map(json.loads, reversed(records)) if r["event"] == "done")
    return done | {"peak_bytes": peak}


def _compared(planned: dict[str, Any], real: dict[str, Any]) -> dict[str, Any]:
    seconds = planned["total_seconds"] - planned["seconds"]["preparing"]  # `fit` begins when the data is there
    return {
        "planned_seconds": seconds,
        "real_seconds": real["seconds"],
        "time_ratio": seconds / real["seconds"],
        "planned_bytes": planned["peak_bytes"],
        "real_bytes": real["peak_bytes"],
        "memory_ratio": planned["peak_bytes"] / real["peak_bytes"],
        "planned": planned,
        "tokens_per_second": real["tokens_per_second"],
    }


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="planned and real")
    for column in ("", "planned s", "real s", "ratio", "planned MB", "real MB", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(
            row["recipe"],
            f"{row['planned_seconds']:.0f}",
            f"{row['real_seconds']:.0f}",
            f"{row['time_ratio']:.2f}",
            f"{row['planned_bytes'] / 1e6:,.0f}",
            f"{row['real_bytes'] / 1e6:,.0f}",
            f"{row['memory_ratio']:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
