"""What goes on inside a model (`apps.inside`) as short tables on the terminal."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from oriole.apps.insidedraw import sign

__all__ = ["figures", "show"]

ROWS = 40
"""Positions that are shown; of a longer text its beginning and its end."""
STYLES = {"zh": "", "en": "", "other": "", "mark": "magenta", "bytes": "yellow"}


def show(made: Mapping[str, Any], console: Console) -> None:
    """Print tokens, what comes after each, and what each depth would say at the end."""
    whose, losses, _ = figures(made)
    mean = f" · loss{whose} {fmean(losses):.2f} nats a token" if losses else ""
    head = f" · {len(made['tokens'])} tokens · {made['layers']} layers × {made['heads']} heads{mean}"
    console.print(Text.assemble((made["model"], "bold"), head))
    console.print(_positions(made))
    for shared in made["split"]:
        console.print(Text(f"{shared['text']} lies in tokens {shared['from'] + 1}–{shared['to'] + 1}", style="yellow"))
    console.print(_depths(made))


def figures(made: Mapping[str, Any]) -> tuple[str, list[float], list[float]]:
    """(whose they are, losses, entropies): of the answer where the model gives one, since no model is trained to guess
    its roles and questions; else of the whole text."""
    written = made["written"]
    answered = made["mode"] == "question" and written < len(made["tokens"])
    where = made["next"][written - 1 : -1] if answered else made["next"]
    whose = " of the answer" if answered else ""
    return whose, [n["loss"] for n in where if n["loss"] is not None], [n["entropy"] for n in where]


def _positions(made: Mapping[str, Any]) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bright_black")
    for name in ("#", "token", "id", "bytes", "loss of the next", "entropy", "likeliest next"):
        grid.add_column(name, justify="right" if name in ("#", "id", "loss of the next", "entropy") else "left")
    count = len(made["tokens"])
    shown = list(range(count)) if count <= ROWS else [*range(ROWS // 2), -1, *range(count - ROWS // 2, count)]
    for n in shown:
        if n < 0:
            grid.add_row("…")
            continue
        token, what = made["tokens"][n], made["next"][n]
        style = "green" if n >= made["written"] else STYLES[token["kind"]]
        grid.add_row(
            str(n + 1),
            Text(sign(token["text"]), style=style),
            str(token["id"]),
            Text(token["bytes"] or "—", style="bright_black", overflow="ellipsis", no_wrap=True),
            "" if what["loss"] is None else f"{what['loss']:.2f}",
            f"{what['entropy']:.2f}",
            Text("  ".join(f"{sign(word)} {100 * p:.0f}%" for word, p in what["top"][:3])),
        )
    return grid


def _depths(made: Mapping[str, Any]) -> Text:
    """What the last position would say at each depth."""
    out = Text("\nafter the last token, by depth:")
    for n, row in enumerate(made["lens"]):
        word, p = row[-1][0]
        out.append(f"\n  {'embedding' if n == 0 else f'layer {n}':>9}  ", style="bright_black")
        out.append(f"{sign(word)} ").append(f"{100 * p:.0f}%", style="bright_black")
    return out
