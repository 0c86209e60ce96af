"""Pictures of what goes on inside a model, as SVG that needs nothing else; the page and the tour share them.

Colours are CSS variables of the page (`--ink`, `--quiet`, `--line`, `--accent`) and the classes c0, c1, … of its
charts; `alone` gives a picture its own, light and dark, so that it can be a file.
"""

import itertools
import math
import unicodedata
from collections.abc import Mapping, Sequence
from statistics import fmean

from oriole.apps.charts import attribute, linear_ticks

__all__ = [
    "alone",
    "attention_cells",
    "attention_map",
    "expert_map",
    "grid",
    "layers_chart",
    "plane",
    "sign",
    "strip",
    "width",
]

LEVELS = 12
"""Shades of a weight."""
UNIT = 7.0
"""Pixels of half a Chinese character at 13 px."""

KINDS = {"zh": 0, "en": 1, "mark": 2, "other": 3, "bytes": 5}
"""The colour of each kind of token."""

SVG_STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif;
fill:var(--ink)}
.quiet{fill:var(--quiet);font-size:11px}.end{text-anchor:end}.mid{text-anchor:middle}
.w{shape-rendering:crispEdges}.w path{stroke:var(--c0);stroke-width:1;fill:none}
.frame{fill:none;stroke:var(--line)}.rule{stroke:var(--line);fill:none}
.curve{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}.dot{fill:var(--c)}
.box{fill:var(--c);fill-opacity:.14;stroke:var(--c);stroke-opacity:.55}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.chance{fill:var(--c0)}
.share{fill:var(--c1)}.even{stroke:var(--quiet);stroke-dasharray:2 2;fill:none}.pick{fill:none}
"""

_LIGHT = (
    "--card:#fff;--ink:#22252a;--quiet:#6d6a63;--line:#e4dfd3;--c0:#c2410c;--c1:#2563a8;--c2:#7c5cb8;--c3:#a16207;"
    "--c4:#2f855a;--c5:#be4b76"
)
_DARK = (
    "--card:#202226;--ink:#e6e3dc;--quiet:#9d9a92;--line:#34363b;--c0:#f08a54;--c1:#6fb0ee;--c2:#b39ae8;--c3:#dcb04a;"
    "--c4:#62c08c;--c5:#ea8bb0"
)


def alone(svg: str) -> str:
    """A picture as a file of its own, with its colours and a ground."""
    style = f"svg{{{_LIGHT}}}@media (prefers-color-scheme:dark){{svg{{{_DARK}}}}}{SVG_STYLE}"
    head, body = svg.split(">", 1)
    ground = '<rect width="100%" height="100%" rx="8" style="fill:var(--card)"/>'
    return f'{head} xmlns="http://www.w3.org/2000/svg">\n<style>{style}</style>\n{ground}{body}\n'


def sign(text: str) -> str:
    """A token's text with what cannot be seen made visible: ␣ for a blank, ⏎ for a line break."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def width(text: str) -> float:
    """About how wide a text is, in pixels at 13 px."""
    return sum(2 * UNIT - 1 if unicodedata.east_asian_width(c) in "WF" else UNIT + 0.4 for c in text)


def _cut(text: str, most: float) -> str:
    """The text, cut to about so many pixels."""
    text = sign(text)
    if width(text) <= most:
        return text
    while text and width(text) > most - UNIT:
        text = text[:-1]
    return text + "…"


def _svg(wide: float, high: float, body: str, said: str) -> str:
    return (
        f'<svg width="{wide:.0f}" height="{high:.0f}" viewBox="0 0 {wide:.0f} {high:.0f}" role="img" '
        f'aria-label="{attribute(said)}">{body}</svg>'
    )


# --- tokens ----------------------------------------------------------------------------------------------------------


def strip(tokens: Sequence[Mapping[str, str | int]], split: Sequence[Mapping[str, str | int]]) -> str:
    """Tokens side by side with their ids below; a character that several of them share stands above these."""
    x, places, body = 8.0, [], []
    for token in tokens:
        text = sign(str(token["text"]))
        wide = max(width(text) + 14, width(str(token["id"])) * 0.85 + 8)
        places.append((x, x + wide))
        body.append(
            f'<rect class="box c{KINDS[str(token["kind"])]}" x="{x:.1f}" y="26" width="{wide:.1f}" height="26" rx="5"/>'
            f'<text class="mid" x="{x + wide / 2:.1f}" y="44">{attribute(text)}</text>'
            f'<text class="quiet mid" x="{x + wide / 2:.1f}" y="68">{token["id"]}</text>'
        )
        x += wide + 4
    for shared in split:
        left, right = places[int(shared["from"])][0], places[int(shared["to"])][1]
        body.append(
            f'<path class="rule" d="M{left:.1f} 24v-4H{right:.1f}v4"/>'
            f'<text class="mid" x="{(left + right) / 2:.1f}" y="15">{attribute(str(shared["text"]))}</text>'
        )
    return _svg(x + 4, 76, "".join(body), "tokens: " + " | ".join(sign(str(t["text"])) for t in tokens))


# --- attention -------------------------------------------------------------------------------------------------------


def attention_cells(rows: Sequence[Sequence[float]]) -> str:
    """Weights as strokes of one unit, a path for each shade: row t, column s is what query t takes from key s.

    A shade is the weight to the power 0.7, so that weak ones are seen beside strong ones."""
    shades: dict[int, list[str]] = {}
    for t, row in enumerate(rows):
        s = 0
        for level, run in itertools.groupby(round(LEVELS * min(w, 1.0) ** 0.7) for w in row):
            n = len(list(run))
            if level:
                shades.setdefault(level, []).append(f"M{s} {t}.5h{n}")
            s += n
    paths = (f'<path opacity="{level / LEVELS:.2f}" d="{"".join(d)}"/>' for level, d in sorted(shades.items()))
    return f'<g class="w">{"".join(paths)}</g>'


def attention_map(
    rows: Sequence[Sequence[float]], labels: Sequence[str], said: str, columns: Sequence[str] = ()
) -> str:
    """One head: queries below one another, the keys they look at beside one another, both with their tokens."""
    columns = columns or labels
    cell = min(22, max(10, 600 // len(columns)))
    size = min(13.0, 0.78 * cell)
    left, top = (max(width(_cut(label, 90)) for label in side) * size / 13 + 14 for side in (labels, columns))
    wide, high = cell * len(columns), cell * len(rows)
    body = [
        f'<rect class="frame" x="{left:.0f}" y="{top:.0f}" width="{wide}" height="{high}"/>'
        f'<g class="cells" transform="translate({left:.0f} {top:.0f}) scale({cell})">{attention_cells(rows)}</g>'
    ]
    for n, label in enumerate(labels):
        y = top + cell * (n + 0.5) + 0.35 * size
        body.append(
            f'<text class="end" style="font-size:{size:.1f}px" x="{left - 6:.0f}" y="{y:.1f}">'
            f"{attribute(_cut(label, 90))}</text>"
        )
    body += _upright(columns, left, top, cell, size)
    return _svg(left + wide + 8, top + high + 8, "".join(body), said)


def _upright(columns: Sequence[str], left: float, top: float, cell: float, size: float) -> list[str]:
    """Names of columns, read from below."""
    return [
        f'<text style="font-size:{size:.1f}px" transform="translate({left + cell * (n + 0.5) + 0.35 * size:.1f} '
        f'{top - 6:.0f}) rotate(-90)">{attribute(_cut(label, 90))}</text>'
        for n, label in enumerate(columns)
    ]


# --- experts ---------------------------------------------------------------------------------------------------------


def expert_map(
    chosen: Sequence[Sequence[tuple[int, float]]], shares: Sequence[float], columns: Sequence[str], said: str
) -> str:
    """Experts below one another, each with its share of the tokens, and the tokens beside one another: a cell is the
    weight that an expert has for a token. The mark on a bar is where it would end if all were used alike."""
    cell = min(22, max(10, 900 // len(columns)))
    size, line = min(13.0, 0.78 * cell), 20 if len(shares) <= 16 else 14
    bars, long, left = 32.0, 64.0, 142.0
    top = max(width(_cut(label, 90)) for label in columns) * size / 13 + 14
    wide, high = cell * len(columns), line * len(shares)
    weights = [[0.0] * len(columns) for _ in shares]
    for t, pairs in enumerate(chosen):
        for expert, weight in pairs:
            weights[expert][t] = weight
    most = max(shares)
    even = bars + long * len(chosen[0]) / len(shares) / most
    body = [f'<rect class="frame" x="{left:.0f}" y="{top:.0f}" width="{wide}" height="{high}"/>']
    body += [f'<path class="rule" d="M{left:.0f} {top + line * n:.1f}h{wide}"/>' for n in range(1, len(shares))]
    body.append(
        f'<g transform="translate({left:.0f} {top:.0f}) scale({cell} {line})">{attention_cells(weights)}</g>'
        f'<rect class="pick" x="{left:.0f}" y="{top:.1f}" width="{wide}" height="{line}" data-top="{top:.1f}" '
        f'data-row="{line}"/>'
    )
    for n, share in enumerate(shares):
        y = top + line * (n + 0.5)
        body.append(
            f'<text class="end" x="{bars - 9:.0f}" y="{y + 4.5:.1f}">{n + 1}</text>'
            f'<rect class="share" x="{bars:.0f}" y="{y - 4:.1f}" width="{long * share / most:.1f}" height="8" rx="2"/>'
            f'<text class="quiet end" x="{left - 8:.0f}" y="{y + 4:.1f}">{100 * share:.0f} %</text>'
        )
    body.append(f'<path class="even" d="M{even:.1f} {top - 2:.1f}v{high + 4}"/>')
    body += _upright(columns, left, top, cell, size)
    return _svg(left + wide + 8, top + high + 8, "".join(body), said)


# --- grids -----------------------------------------------------------------------------------------------------------


def grid(
    cells: Sequence[Sequence[tuple[str, float, str]]],
    rows: Sequence[str],
    columns: Sequence[str],
    said: str,
    most: float = 84,
) -> str:
    """Cells of (word, share, what a pointer is told), shaded by their share of 1; rows from the top."""
    left = max(map(width, rows)) + 16
    wides = [
        max(34.0, *(width(_cut(row[n][0], most)) + 12 for row in cells), width(_cut(columns[n], most)) + 12)
        for n in range(len(columns))
    ]
    xs = [left + sum(wides[:n]) for n in range(len(wides))]
    body = []
    for n, column in enumerate(columns):
        body.append(f'<text class="mid" x="{xs[n] + wides[n] / 2:.1f}" y="16">{attribute(_cut(column, most))}</text>')
    for r, (name, row) in enumerate(zip(rows, cells, strict=True)):
        y = 26 + 25 * r
        body.append(f'<text class="quiet end" x="{left - 9:.0f}" y="{y + 16}">{attribute(name)}</text>')
        for n, (word, share, told) in enumerate(row):
            title = f"<title>{attribute(told)}</title>" if told else ""
            middle = xs[n] + wides[n] / 2
            body.append(
                f'<g>{title}<rect class="chance" x="{xs[n] + 1:.1f}" y="{y}" width="{wides[n] - 2:.1f}" height="23" '
                f'rx="4" fill-opacity="{0.04 + 0.5 * min(share, 1.0):.2f}"/>'
                f'<text class="mid" x="{middle:.1f}" y="{y + 16}">{attribute(_cut(word, most))}</text></g>'
            )
    return _svg(left + sum(wides) + 8, 32 + 25 * len(rows), "".join(body), said)


# --- a plane of points -----------------------------------------------------------------------------------------------


def plane(points: Sequence[Sequence[float]], labels: Sequence[str], kinds: Sequence[str], said: str) -> str:
    """Points with their names; a name that has no room is left to the pointer."""
    wide, high, rim = 640.0, 400.0, 34.0
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    scale_x = (wide - 2 * rim) / ((max(xs) - min(xs)) or 1.0)
    scale_y = (high - 2 * rim) / ((max(ys) - min(ys)) or 1.0)
    taken: list[tuple[float, float, float, float]] = []
    dots = [(rim + (x - min(xs)) * scale_x, high - rim - (y - min(ys)) * scale_y) for x, y in points]
    taken += [(x - 4, y - 4, x + 4, y + 4) for x, y in dots]
    body = []
    for (x, y), label, kind in zip(dots, labels, kinds, strict=True):
        text = _cut(label, 110)
        w = width(text)
        body.append(
            f'<g class="c{KINDS[kind]}"><title>{attribute(sign(label))}</title>'
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
        )
        for dx, dy in ((7, 4.5), (-7 - w, 4.5), (-w / 2, -8), (-w / 2, 17)):
            box = (x + dx, y + dy - 11, x + dx + w, y + dy + 3)
            inside = box[0] >= 2 and box[2] <= wide - 2 and box[1] >= 2 and box[3] <= high - 2
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                body.append(f'<text x="{x + dx:.1f}" y="{y + dy:.1f}">{attribute(text)}</text>')
                break
        body.append("</g>")
    return _svg(wide, high, f'<rect class="frame" x=".5" y=".5" width="{wide - 1:.0f}" height="{high - 1:.0f}" rx="6"/>'
                + "".join(body), said)  # fmt: skip


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# --- over the layers -------------------------------------------------------------------------------------------------


def layers_chart(curves: Mapping[str, Sequence[tuple[float, float]]], unit: str, across: str = "layer") -> str:
    """Curves of (layer, value) from zero, each with its name at its end."""
    wide, high, left, right, rim = 640.0, 260.0, 46.0, 160.0, 24.0
    most = max((y for curve in curves.values() for _, y in curve), default=1.0) * 1.05 or 1.0
    last = max(x for curve in curves.values() for x, _ in curve) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (wide - left - right) * x / last, high - rim - (high - 2 * rim) * y / most

    body = []
    for tick in linear_ticks(0, most, 4):
        y = place(0, tick)[1]
        body.append(f'<path class="rule" d="M{left:.0f} {y:.1f}H{wide - right:.0f}"/>')
        body.append(f'<text class="quiet end" x="{left - 7:.0f}" y="{y + 4:.1f}">{tick:g}</text>')
    for tick in range(0, int(last) + 1, max(1, math.ceil(last / 12))):
        x = place(tick, 0)[0]
        body.append(f'<text class="quiet mid" x="{x:.1f}" y="{high - 6:.0f}">{tick}</text>')
    body.append(f'<text class="quiet" x="{wide - right + 10:.0f}" y="{high - 6:.0f}">{attribute(across)}</text>')
    body.append(f'<text class="quiet" x="{left:.0f}" y="13">{attribute(unit)}</text>')
    ends = _apart([place(*curve[-1])[1] for curve in curves.values()], 20)
    for n, ((name, curve), end) in enumerate(zip(curves.items(), ends, strict=True)):
        d = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*p) for p in curve))
        body.append(f'<g class="c{n % 6}"><path class="curve" d="M{d}"/>')
        body += [f'<circle class="dot" r="3" cx="{x:.1f}" cy="{y:.1f}"/>' for x, y in (place(*p) for p in curve)]
        body.append(f'<text x="{wide - right + 10:.0f}" y="{end + 4:.1f}">{attribute(name)}</text></g>')
    means = "; ".join(f"{name} {fmean(y for _, y in curve):.3g} on average" for name, curve in curves.items())
    return _svg(wide, high, "".join(body), f"{unit} over the {across}s: {means}")


def _apart(places: Sequence[float], least: float) -> list[float]:
    """The places, moved down where two names would lie on each other."""
    order = sorted(range(len(places)), key=lambda n: places[n])
    out = list(places)
    for before, after in itertools.pairwise(order):
        out[after] = max(out[after], out[before] + least)
    return out
