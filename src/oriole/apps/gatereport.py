"""What the gate (apps.gate) found about a preference stage, as lines of a table and answers side by side."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["MANY", "percent", "rows", "side_by_side"]

NUM_EXAMPLES = 6

MANY = 400
"""Prompts below which a verdict is said to rest on few."""

Row = tuple[str, str, str, str, str]
"""What it is, of the parent, of the stage, difference or win rate, its interval."""


def rows(gate: Mapping[str, Any]) -> list[Row]:
    """A preference stage beside its parent: what each reaches, and the difference or win rate with its interval."""
    out: list[Row] = []
    for name, judge in gate["judges"].items():
        rate, mean = judge["win_rate"], judge["mean"]
        out.append((
            f"win rate, by {name}", f"{mean['parent']:.3f}", f"{mean['stage']:.3f}", percent(rate["value"]),
            f"{percent(rate['low'])} to {percent(rate['high'])}",
        ))  # fmt: skip
        out.append(("  won, tied, lost", "", "", f"{judge['wins']:,}, {judge['ties']:,}, {judge['losses']:,}", ""))
        if judge.get("longer_wins") is not None:
            out.append(("  the longer answer wins", "", "", percent(judge["longer_wins"]), ""))
        if length := judge.get("length_of_wins"):
            out.append(("  tokens where it won", f"{length['parent']:.1f}", f"{length['stage']:.1f}", "", ""))
    for key, name in (("exact_match", "exact match"), ("loop_rate", "loop rate")):
        if found := gate.get(key):
            off = found["difference"]
            signed = [f"{100 * off[k]:+.1f} points" for k in ("value", "low", "high")]
            both = percent(found["parent"]), percent(found["stage"])
            out.append((name, *both, signed[0], f"{signed[1]} to {signed[2]}"))
    if bits := gate.get("bpb"):
        out.append(("bits per byte, all parts", "", "", f"{100 * bits['rise']:+.1f} %", ""))
        out += [(f"  {part}", f"{x:.3f}", f"{bits['stage'][part]:.3f}", "", "") for part, x in bits["parent"].items()]
    length = gate["length"]
    out.append(("mean length, tokens", f"{length['parent']:.1f}", f"{length['stage']:.1f}", "", ""))
    return out


def percent(share: float | None) -> str:
    """56.3 %, or nothing for None."""
    return "" if share is None else f"{100 * share:.1f} %"


def side_by_side(stage: Path) -> list[dict[str, Any]]:
    """Answers of parent and stage to the same prompt: in turn one that the stage won, one that it lost, one tie.

    The first ones of each kind, not the most telling; of ties those where the answers differ.
    """
    path = stage / "gate.jsonl"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        every = [json.loads(line) for line in file]
    groups = [[r for r in every if r["parent"] != r["stage"] and _won(r) == n] for n in (1, -1, 0)]
    in_turn = [row for turn in itertools.zip_longest(*groups) for row in turn if row is not None]
    keys = ("kind", "lang", "messages", "answers", "parent", "stage", "outcome")
    return [{key: row[key] for key in keys if key in row} for row in in_turn[:NUM_EXAMPLES]]


def _won(row: Mapping[str, Any]) -> int:
    """What the last of the judges says, which is the reward model where there is one."""
    return int(list(row["outcome"].values())[-1])
