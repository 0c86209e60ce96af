"""What a stage's evaluations say of held-out preference pairs, in words and as tables for the report."""

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

from rich.table import Table

from oriole.apps.charts import Chart, Line, visible
from oriole.apps.curves import StageLog, number

__all__ = ["charts", "figures", "html", "table"]

Kind = Literal["count", "share", "number"]

FIGURES: Final[dict[str, tuple[str, Kind]]] = {
    "pairs": ("held-out pairs", "count"),
    "accuracy": ("in the right order", "share"),
    "auc": ("AUC: any chosen answer above any rejected one", "number"),
    "ece": ("calibration error (ECE)", "number"),
    "margin": ("chosen above rejected by", "number"),
    "min_reward": ("least reward", "number"),
    "mean_reward": ("mean reward", "number"),
    "max_reward": ("greatest reward", "number"),
    "length_correlation": ("correlation of reward and length", "number"),
    "eval_logps/accuracies": ("chosen likelier than rejected", "share"),
    "eval_rewards/accuracies": ("chosen gained more than rejected", "share"),
    "eval_rewards/margins": ("reward of chosen above rejected", "number"),
    "eval_loss": ("loss", "number"),
    "longer_chosen": ("pairs whose chosen answer is the longer one", "share"),
}
"""Figures of an evaluation (train.rewardfigures, train.dpo), in the order in which they are shown."""
JUDGES: Final = ("auc", "eval_logps/accuracies")
"""A record with one of these is of held-out pairs: a reward model's, or a language model's."""


def figures(stage: StageLog) -> dict[str, Any]:
    """{"before", "after"}: the first and the last evaluation's figures; {} for a stage without held-out pairs."""
    found = _held_out(stage)
    if not found:
        return {}
    before, after = ({k: record[k] for k in FIGURES if k in record} for record in (found[0], found[-1]))
    more = found[-1].get("accuracy_by_source")
    return {"before": before, "after": after | ({"accuracy_by_source": more} if more else {})}


def _held_out(stage: StageLog) -> list[Mapping[str, Any]]:
    return [record for record in stage.all("eval") if any(name in record for name in JUDGES)]


def _rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, before, after) of each figure."""
    rows = [
        (words, _shown(found["before"].get(name), kind), _shown(found["after"].get(name), kind))
        for name, (words, kind) in FIGURES.items()
        if name in found["after"]
    ]
    by_source = found["after"].get("accuracy_by_source") or {}
    return rows + [(f"in the right order: {name}", "", _shown(value, "share")) for name, value in by_source.items()]


def _shown(value: Any, kind: Kind) -> str:
    given = number(value)
    if math.isnan(given):
        return ""
    match kind:
        case "count":
            return f"{given:,.0f}"
        case "share":
            return f"{100 * given:.1f} %"
        case "number":
            return f"{given:.3f}"


def table(found: Mapping[str, Any]) -> Table:
    """For the terminal."""
    made = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("", "before", "after"):
        made.add_column(column, justify="right" if column else "left")
    for row in _rows(found):
        made.add_row(*row)
    return made


def html(found: Mapping[str, Any]) -> str:
    """For the page; "" without figures."""
    if not found:
        return ""
    rows = "".join(
        f'<tr><th>{visible(what)}</th><td class="quiet">{before}</td><td>{after}</td></tr>'
        for what, before, after in _rows(found)
    )
    return (
        '<h3>Held-out preference pairs</h3><div class="wide"><table class="numbers">'
        f"<thead><tr><th></th><th>before</th><th>after</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def charts(stage: StageLog) -> list[Chart]:
    """Accuracy and rewards while training, and on the held-out pairs (dots)."""
    held_out = _held_out(stage)
    if not held_out:
        return []

    def dots(name: str) -> list[tuple[float, float]]:
        return [(stage.tokens_at(int(record["step"])), number(record.get(name))) for record in held_out]

    if "auc" not in held_out[0]:
        accuracy = [
            Line("trained, reward", stage.points("rewards/accuracies"), 0),
            Line("held out, reward", dots("eval_rewards/accuracies"), 1, "dots"),
            Line("held out, log-prob", dots("eval_logps/accuracies"), 2, "dots"),
        ]
        sides = [Line(what, stage.points(f"rewards/{what}"), n) for n, what in enumerate(("chosen", "rejected"))]
        return [
            Chart("Accuracy", "share of the pairs in the right order", accuracy, percent=True),
            Chart("Rewards", "beta times the log-ratio to the reference", sides),
            Chart("Margin", "chosen above rejected", [Line("", stage.points("rewards/margins"), 2)]),
        ]
    accuracy = [Line("trained", stage.points("accuracy"), 0), Line("held out", dots("accuracy"), 1, "dots")]
    rewards = [Line(what, stage.points(f"{what}_reward"), n) for n, what in enumerate(("min", "mean", "max"))]
    return [
        Chart("Accuracy", "share of the pairs in the right order", accuracy, percent=True),
        Chart("Rewards", "least, mean, greatest of a micro-batch", rewards),
        Chart("Margin", "chosen above rejected", [Line("", stage.points("margin"), 2)]),
    ]
