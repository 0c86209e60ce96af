"""What goes on inside a model (`apps.inside`) as short tables on the terminal."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from oriole.apps.insidedraw import sign

__all__ = ["figures", "show", "size"]

ROWS = 40
"""Positions that are shown; of a longer text its beginning and its end."""
LAYERS, MOST = 6, 4
"""Layers with experts that are shown, and of a layer the experts with the largest shares."""
STYLES = {"zh": "", "en": "", "other": "", "mark": "magenta", "bytes": "yellow"}


def show(made: Mapping[str, Any], console: Console) -> None:
    """Print tokens, what comes after each, where experts are chosen, and what each depth would say."""
    whose, losses, _ = figures(made)
    mean = f" · loss{whose} {fmean(losses):.2f} nats a token" if losses else ""
    tokens, layers = size(made)
    head = f" · {tokens} tokens · {layers} layers × {made['heads']} heads{mean}"
    console.print(Text.assemble((made["model"], "bold"), head))
    if source := made["source"]:
        console.print(_line(source["tokens"]))
        _say_split(source, console)
        console.print()
    console.print(_positions(made))
    _say_split(made, console)
    if made["experts"]:
        console.print(Text("\nexperts by token, with their weights in per cent:"))
        console.print(_experts(made))
    console.print(_depths(made))


def size(made: Mapping[str, Any]) -> tuple[str, str]:
    """How many tokens there are, and how many layers: of an encoder-decoder those of the source and of the answer."""
    source = made["source"]
    tokens, layers = f"{len(made['tokens']):,}", str(made["layers"])
    if source is None:
        return tokens, layers
    return f"{len(source['tokens']):,} + {tokens}", f"{source['layers']} + {layers}"


def figures(made: Mapping[str, Any]) -> tuple[str, list[float], list[float]]:
    """(whose they are, losses, entropies): of the answer where the model gives one, since no model is trained to guess
    its roles and questions; else of the whole text."""
    written, answered = made["written"], _answered(made)
    where = made["next"][written - 1 : -1] if answered else made["next"]
    whose = " of the answer" if answered else ""
    return whose, [n["loss"] for n in where if n["loss"] is not None], [n["entropy"] for n in where]


def _answered(made: Mapping[str, Any]) -> bool:
    """Whether the text is one thing, and what the model writes another."""
    return (made["mode"] == "question" or made["source"] is not None) and made["written"] < len(made["tokens"])


def _table(*names: str) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bright_black")
    for name in names:
        grid.add_column(name, justify="right" if name in ("#", "id", "loss of the next", "entropy") else "left")
    return grid


def _shown(count: int) -> list[int]:
    """The places of a text that are shown; -1 stands for those left out."""
    return list(range(count)) if count <= ROWS else [*range(ROWS // 2), -1, *range(count - ROWS // 2, count)]


def _word(made: Mapping[str, Any], n: int) -> Text:
    token = made["tokens"][n]
    return Text(sign(token["text"]), style="green" if n >= made["written"] else STYLES[token["kind"]])


def _line(tokens: Sequence[Mapping[str, Any]]) -> Text:
    """The source in one line."""
    out = Text("source: ", style="bright_black")
    for n, token in enumerate(tokens):
        out.append("│" if n else "", style="bright_black").append(
            sign(token["text"]), style=STYLES[token["kind"]] or "none"
        )
    return out


def _say_split(side: Mapping[str, Any], console: Console) -> None:
    for shared in side["split"]:
        console.print(Text(f"{shared['text']} lies in tokens {shared['from'] + 1}–{shared['to'] + 1}", style="yellow"))


def _positions(made: Mapping[str, Any]) -> Table:
    source = made["source"]
    grid = _table(
        "#", "token", "id", "looks most at" if source else "bytes", "loss of the next", "entropy", "likeliest next"
    )
    for n in _shown(len(made["tokens"])):
        if n < 0:
            grid.add_row("…")
            continue
        token, what = made["tokens"][n], made["next"][n]
        spelt = Text(token["bytes"] or "—", style="bright_black", overflow="ellipsis", no_wrap=True)
        grid.add_row(
            str(n + 1),
            _word(made, n),
            str(token["id"]),
            _looked_at(made, n) if source else spelt,
            "" if what["loss"] is None else f"{what['loss']:.2f}",
            f"{what['entropy']:.2f}",
            Text("  ".join(f"{sign(word)} {100 * p:.0f}%" for word, p in what["top"][:3])),
        )
    return grid


def _looked_at(made: Mapping[str, Any], n: int) -> Text:
    """The token of the source that the heads of the last layer take most from, as a mean."""
    mean = [fmean(weights) for weights in zip(*(head[n] for head in made["cross"][-1]), strict=True)]
    best = max(range(len(mean)), key=mean.__getitem__)
    return Text.assemble(sign(made["source"]["tokens"][best]["text"]), (f" {100 * mean[best]:.0f}%", "bright_black"))


def _experts(made: Mapping[str, Any]) -> Table:
    """Of each token the experts in each layer that has any, at last their shares; of many layers the outer ones."""
    layers = made["experts"]
    left = LAYERS // 2 if len(layers) > LAYERS else len(layers)
    shown = [*layers[:left], *([None, *layers[-left:]] if left < len(layers) else [])]
    grid = _table("#", "token", *("…" if layer is None else f"layer {layer['layer'] + 1}" for layer in shown))

    def row(first: str, word: Text, pairs: Sequence[Sequence[tuple[int, float]] | None]) -> None:
        grid.add_row(first, word, *(Text("…") if each is None else _pairs(each) for each in pairs))

    for n in _shown(len(made["tokens"])):
        if n < 0:
            grid.add_row("…")
        else:
            row(str(n + 1), _word(made, n), [layer and layer["chosen"][n] for layer in shown])
    shares = [layer and sorted(enumerate(layer["share"]), key=lambda pair: -pair[1])[:MOST] for layer in shown]
    row("", Text("share of the tokens", style="bright_black"), shares)
    return grid


def _pairs(pairs: Sequence[tuple[int, float]]) -> Text:
    out = Text()
    for n, (expert, share) in enumerate(pairs):
        out.append("  " if n else "").append(f"{expert + 1}").append(f" {100 * share:.0f}", style="bright_black")
    return out


def _depths(made: Mapping[str, Any]) -> Text:
    """What each depth would say: before an answer, or at the end of a text."""
    place = made["written"] - 1 if _answered(made) else -1
    out = Text("\nthe answer's first token, by depth:" if _answered(made) else "\nafter the last token, by depth:")
    for n, row in enumerate(made["lens"]):
        word, p = row[place][0]
        out.append(f"\n  {'embedding' if n == 0 else f'layer {n}':>9}  ", style="bright_black")
        out.append(f"{sign(word)} ").append(f"{100 * p:.0f}%", style="bright_black")
    return out
