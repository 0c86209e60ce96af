"""The sections of the page in which one chooses: a head and a token of each attention, an expert of each layer.

All that can be chosen is in the page: a head is drawn small and copied by the script, weights lie beside as JSON.
"""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from oriole.apps import insidedraw as draw
from oriole.apps.charts import visible

__all__ = ["about", "chip", "labels", "sections"]

_ROWS = "Rows ask, columns are looked at. Weights are computed in fp32 from the layer's queries and keys."


def sections(made: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(id, title, HTML) of each attention that the model has, and of its experts; without HTML where it has none."""
    source = made["source"]
    own = (
        "Each token asks, and takes from itself and the tokens before it in proportion to these weights, which sum "
        "to 1 in a row. The stronger the colour, the more. A full first column is where a head rests that finds "
        "nothing. Choose a head, then a token."
    )
    if source is None:
        maps = [("attention", "Attention", _attention(made["attention"], made, made, own, causal=True))]
    else:
        back = own.replace("Each token asks", "The decoder looks back at what it has written: each token asks")
        both_ways = (
            "The encoder reads the source: each token asks and takes from all of them, those after it as well, in "
            "proportion to these weights, which sum to 1 in a row. The stronger the colour, the more. Choose a head, "
            "then a token."
        )
        across = (
            "Where the answer looks into the source: each token of the answer asks, and takes from the encoder's "
            "states in proportion to these weights, which sum to 1 in a row. What a token finds there helps to say the "
            "one after it. Choose a head, then a token of the answer."
        )
        maps = [
            ("encoder", "Encoder attention", _attention(source["attention"], source, source, both_ways, causal=False)),
            ("attention", "Decoder attention", _attention(made["attention"], made, made, back, causal=True)),
            ("cross", "Cross-attention", _attention(made["cross"], made, source, across, causal=False)),
        ]
    return [*maps, ("experts", "Experts", _experts(made))]


def about(words: str) -> str:
    """A paragraph that says what a picture shows."""
    return f'<p class="about">{words}</p>'


def chip(token: Mapping[str, Any], own: bool = False, inner: str = "", more: str = "") -> str:
    """A token as a small box; `own`: the model has written it."""
    style = f"tok c{draw.KINDS[token['kind']]}{' own' * own}"
    return f'<span class="{style}"{more}>{visible(draw.sign(token["text"]))}{inner}</span>'


def labels(side: Mapping[str, Any]) -> list[str]:
    """The texts of the tokens of a side."""
    return [token["text"] for token in side["tokens"]]


def _chips(side: Mapping[str, Any], names: str, button: bool = True) -> str:
    more, written = ' role="button" tabindex="0"' * button, side.get("written", len(side["tokens"]))
    boxes = "".join(chip(token, n >= written, "", more) for n, token in enumerate(side["tokens"]))
    return f'<div class="chips {names}">{boxes}</div>'


def _data(value: Any) -> str:
    """What the script reads; nothing in it comes from a text."""
    return f'<script type="application/json">{json.dumps(value, separators=(",", ":"))}</script>'


# --- attention -------------------------------------------------------------------------------------------------------


def _attention(
    layers: Sequence[Sequence[Sequence[Sequence[float]]]],
    asks: Mapping[str, Any],
    keys: Mapping[str, Any],
    words: str,
    *,
    causal: bool,
) -> str:
    """All heads small, the chosen one large, the chosen token's weights on the tokens that it looks at."""
    rows, columns = labels(asks), labels(keys)
    lines = []
    for n, layer in enumerate(layers):
        buttons = "".join(
            f'<button aria-label="layer {n + 1}, head {h + 1}" aria-pressed="{"true" if n == h == 0 else "false"}">'
            f'<svg viewBox="0 0 {len(columns)} {len(rows)}" preserveAspectRatio="none">'
            f"{draw.attention_cells(head)}</svg></button>"
            for h, head in enumerate(layer)
        )
        lines.append(f'<div class="line"><span>layer {n + 1}</span>{buttons}</div>')
    maps = [
        b64encode(bytes(round(255 * w) for row in head for w in row)).decode() for layer in layers for head in layer
    ]
    if asks is keys:
        chips = _chips(asks, "asks keys")
    else:
        chips = (
            f'<p class="side">of the answer</p>{_chips(asks, "asks")}'
            f'<p class="side">looks into the source</p>{_chips(keys, "keys", button=False)}'
        )
    large = draw.attention_map(layers[0][0], rows, "attention weights of the chosen head", columns)
    return (
        about(words)
        + f'<div class="look heads-of"><div class="heads" style="--heads:{len(layers[0])}">{"".join(lines)}</div>'
        f'<div><h3>layer 1, head 1</h3>{chips}<p class="said"></p><div class="pic">{large}</div></div>'
        f"{_data({'causal': causal, 'maps': maps})}</div>" + about(_ROWS)
    )


# --- experts ---------------------------------------------------------------------------------------------------------


def _experts(made: Mapping[str, Any]) -> str:
    """A line of experts for each layer, the text lit by the chosen one, and the map of its layer."""
    layers, tokens = made["experts"], labels(made)
    if not layers:
        return ""
    lines, maps = [], []
    for n, layer in enumerate(layers):
        name, most = f"layer {layer['layer'] + 1}", max(layer["share"])
        first = layer["share"].index(most) if n == 0 else -1
        buttons = "".join(
            f'<button data-layer="{n}" data-expert="{e}" aria-label="{name}, expert {e + 1}" '
            f'aria-pressed="{"true" if e == first else "false"}" title="{100 * share:.0f} % of the tokens" '
            f'style="--w:{share / most:.2f}">{e + 1}</button>'
            for e, share in enumerate(layer["share"])
        )
        lines.append(f'<div class="line"><span>{name}</span><div>{buttons}</div></div>')
        drawn = draw.expert_map(layer["chosen"], layer["share"], tokens, f"experts of {name}, by token")
        maps.append(f'<div class="pic hug"{" hidden" * (n > 0)}>{drawn}</div>')
    active, count = len(layers[0]["chosen"][0]), layers[0]["count"]
    goes = "one of them" if active == 1 else f"{active} of them, whose results are added by the weights shown here"
    also = " A shared expert adds to every token beside these." if layers[0]["shared"] else ""
    chosen = [[dict(pairs) for pairs in layer["chosen"]] for layer in layers]
    return (
        about(
            f"In place of one MLP these layers have {count} small ones, the experts. A router sends each token through "
            f"{goes}.{also} The bar under an expert is its share of the tokens; if all were used alike, each would get "
            f"{100 * active / count:.0f} %. Choose an expert to see its tokens, or a token to see where it goes."
        )
        + f'<div class="look routes"><div class="picks">{"".join(lines)}</div><div><h3></h3>'
        f'{_chips(made, "keys")}<p class="said"></p>{"".join(maps)}</div>{_data(chosen)}</div>'
        + about("Rows are experts with their share of the tokens (the mark: equal shares), columns the tokens.")
    )
