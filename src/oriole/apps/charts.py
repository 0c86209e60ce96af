"""Line charts as HTML with inline SVG: no script, no font, no network; sharp at any width, on paper and on a phone.

The drawing is an SVG stretched over its box, with strokes that keep their width; everything that is text is HTML beside
it, so that it keeps its size however narrow the page is. Colours are the page's (classes c0, c1, … and CSS variables).
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import fmean, median
from typing import Any, Literal

from oriole.apps.curves import Mark, Points
from oriole.log import human

__all__ = [
    "Band",
    "Chart",
    "Line",
    "attribute",
    "draw",
    "linear_ticks",
    "log_ticks",
    "merged_marks",
    "shares",
    "visible",
]

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2028\u2029\u2060-\u2069\ufeff]")

SIZE = 1000.0
"""Width and height of a drawing in its own units."""

MOST_POINTS = 400
"""More points than this are joined into so many buckets."""

SMOOTH_FROM = 40
"""A noisy line with fewer points than this is drawn as it is."""


def visible(value: Any) -> str:
    """Text that is not ours as HTML: escaped, with a sign for each character that cannot be seen."""
    return _UNSEEN.sub(lambda found: f'<span class="sign">{ord(found[0]):04X}</span>', escape(str(value)))


def attribute(value: str) -> str:
    """The same in an attribute, where no sign can stand."""
    return escape(_UNSEEN.sub("", value))


@dataclass(frozen=True)
class Line:
    """One curve: "noisy" ones are drawn faintly under a smooth one, "dots" have a dot at each point."""

    name: str
    points: Points
    colour: int = 0
    style: Literal["plain", "noisy", "dots"] = "plain"
    undone: Points = field(default_factory=list)
    """Values of steps that were later done anew, drawn faintly."""


@dataclass(frozen=True)
class Band:
    """What is expected: (tokens, mean, spread), drawn as mean ± 3 spreads behind the curve."""

    points: Sequence[tuple[float, float, float]]
    colour: int = 0


@dataclass(frozen=True)
class Chart:
    """A picture: its title, the unit of its values, its lines, and how the values are drawn."""

    title: str
    unit: str
    lines: Sequence[Line]
    bands: Sequence[Band] = ()
    marks: Sequence[Mark] = ()
    log: bool | None = False
    """Logarithmic; None: when the values span more than a factor of five."""
    zero: bool = False
    """The axis begins at zero."""
    percent: bool = False
    """Values are shares."""
    about: str = ""
    """What is to be read in it, in a sentence."""


def draw(chart: Chart, width: float) -> str:
    """The chart as a <figure>; `width` are the tokens at its right edge. "" without a finite value."""
    values = [y for line in chart.lines for _, y in line.points if math.isfinite(y)]
    if not values or width <= 0:
        return ""
    log = min(values) > 0 and (max(values) > 5 * min(values) if chart.log is None else chart.log)
    scale = _Scale(_limits(chart, values, log), log, width)
    ticks = log_ticks(scale.low, scale.high) if log else linear_ticks(scale.low, scale.high)
    rows = [(scale.y(t), _tick(t, ticks, chart.percent)) for t in ticks]
    columns = [(scale.x(t), human(t)) for t in linear_ticks(0, width, 5)]
    grid = "".join(f'<path class="grid" d="M0 {y:.0f}H{SIZE:.0f}"/>' for y, _ in rows)
    drawn = [_band(band, scale) for band in chart.bands]
    drawn += [f'<path class="mark k-{_kind(m.what)}" d="M{scale.x(m.tokens):.1f} 0V{SIZE:.0f}"/>' for m in chart.marks]
    drawn += [_line(line, scale, chart) for line in chart.lines]
    flags = "".join(
        f'<i class="flag k-{_kind(m.what)}" style="left:{_percent(scale.x(m.tokens))}" '
        f'title="{attribute(f"{m.what}, step {m.step:,}: {m.why}")}"></i>'
        for m in chart.marks
    )
    unit = f"{chart.unit}, log scale" if log else chart.unit
    about = f"<p>{visible(chart.about)}</p>" if chart.about else ""
    legend = "".join(_legend(line, chart) for line in chart.lines)
    box = f"0 0 {SIZE:.0f} {SIZE:.0f}"
    said = f"{chart.title} in {unit} over the trained tokens; " + "; ".join(
        f"{line.name or 'last'} {_value(_last(line.points), chart.percent)}" for line in chart.lines
    )
    return (
        f'<figure class="chart"><figcaption><b>{visible(chart.title)}</b><span class="legend">{legend}</span>'
        f"<small>{visible(unit)}</small></figcaption>"
        f'<div class="plot"><div class="ys">{_labels(rows, "top")}</div><div class="area">'
        f'<svg viewBox="{box}" preserveAspectRatio="none" role="img" aria-label="{attribute(said)}">'
        f"{grid}{''.join(drawn)}</svg>{flags}</div>"
        f'<span class="xname">tokens</span><div class="xs">{_labels(columns, "left")}</div></div>{about}</figure>'
    )


# --- scales and ticks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """From tokens and values to the drawing's units."""

    limits: tuple[float, float]
    log: bool
    width: float

    @property
    def low(self) -> float:
        return self.limits[0]

    @property
    def high(self) -> float:
        return self.limits[1]

    def x(self, tokens: float) -> float:
        return SIZE * tokens / self.width

    def y(self, value: float) -> float:
        low, high = self.limits
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return SIZE * (1 - min(max((value - low) / (high - low), 0.0), 1.0))


def _limits(chart: Chart, values: Sequence[float], log: bool) -> tuple[float, float]:
    """The axis: a little more than the values, whole ticks where it begins at zero."""
    low, high = min(values), max(values)
    if log:
        room = max(1.06, (high / low) ** 0.05)
        return low / room, high * room
    if chart.zero and low >= 0:
        return 0.0, high * 1.06 or 1.0
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - room, high + room


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in [low, high], steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The decades when there are many; else 1, 2, 5 of each, or more of them; round numbers when even those are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [d * 10.0**n for n in decades for d in digits if low <= d * 10.0**n <= high]
        if len(ticks) >= 3:
            return [round(t, 12) for t in ticks[:: math.ceil(len(ticks) / 8)]]
    return linear_ticks(low, high)


def _tick(value: float, ticks: Sequence[float], percent: bool) -> str:
    """A tick as short as it can be told from its neighbours: 0.25, 20k, 4e-05."""
    gap = min((abs(b - a) for a, b in itertools.pairwise(ticks)), default=abs(value)) or 1.0
    if not value:
        return "0"
    if percent:
        return f"{100 * value:.{max(0, -math.floor(math.log10(100 * gap) + 1e-9))}f} %"
    if abs(value) >= 1000:
        return human(value)
    if max(abs(t) for t in ticks) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{value:.{min(6, max(0, -math.floor(math.log10(gap) + 1e-9)))}f}"


def _labels(places: Iterable[tuple[float, str]], side: str) -> str:
    return "".join(f'<span style="{side}:{_percent(at)}">{visible(text)}</span>' for at, text in places)


def _percent(at: float) -> str:
    return f"{100 * at / SIZE:.2f}%"


# --- lines -----------------------------------------------------------------------------------------------------------


def _line(line: Line, scale: _Scale, chart: Chart) -> str:
    colour = f"c{line.colour % 6}"
    out = [_path(line.undone, scale, f"raw undone {colour}")] if line.undone else []
    noisy = line.style == "noisy" and len(line.points) >= SMOOTH_FROM
    out.append(_path(line.points, scale, f"raw {colour}" if noisy else colour))
    if noisy:
        out.append(_path(_smooth(line.points, scale.log), scale, colour))
    if line.style == "dots" or len(line.points) == 1:
        out += [
            f'<path class="dot {colour}" d="M{scale.x(x):.1f} {scale.y(y):.1f}h0">'
            f"<title>{attribute(line.name)} {_value(y, chart.percent)} at {human(x)} tokens</title></path>"
            for x, y in line.points
            if math.isfinite(y)
        ]
    return "".join(out)


def _path(points: Points, scale: _Scale, style: str) -> str:
    """A polyline with gaps where a value is not finite."""
    words, pen = [], "M"
    for x, y in _joined(points):
        if math.isfinite(y):
            words.append(f"{pen}{scale.x(x):.1f} {scale.y(y):.1f}")
            pen = "L"
        else:
            pen = "M"
    return f'<path class="{style}" d="{"".join(words)}"/>' if words else ""


def _joined(points: Points) -> Points:
    """At most about MOST_POINTS points: of each bucket its lowest and its highest, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    out: Points = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        finite = [p for p in bucket if math.isfinite(p[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else {bucket[0]}
        out += sorted(ends)
    return out


def _smooth(points: Points, log: bool) -> Points:
    """A window of a thirtieth of the points around each: its geometric mean on a log scale, else its median."""
    good = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
    size = math.ceil(len(good) / MOST_POINTS)
    buckets = [good[n : n + size] for n in range(0, len(good), max(1, size))]
    xs = [fmean(x for x, _ in bucket) for bucket in buckets]
    ys = [fmean(math.log(y) if log else y for _, y in bucket) for bucket in buckets]
    reach = max(2, len(ys) // 60)
    out: Points = []
    for n, x in enumerate(xs):
        near = min(reach, n, len(ys) - 1 - n)  # smaller at the ends, so that it begins and ends where they do
        window = ys[n - near : n + near + 1]
        out.append((x, math.exp(fmean(window)) if log else median(window)))
    return out


def _band(band: Band, scale: _Scale) -> str:
    """Mean ± 3 spreads as a filled shape."""
    inside = [(x, mean, spread) for x, mean, spread in band.points if 0 <= x <= scale.width * 1.0001]
    if len(inside) < 2:
        return ""
    upper = [f"{scale.x(x):.1f} {scale.y(mean + 3 * spread):.1f}" for x, mean, spread in inside]
    lower = [f"{scale.x(x):.1f} {scale.y(mean - 3 * spread):.1f}" for x, mean, spread in inside]
    return f'<path class="band c{band.colour % 6}" d="M{"L".join(upper)}L{"L".join(reversed(lower))}Z"/>'


def _last(points: Points) -> float:
    return next((y for _, y in reversed(points) if math.isfinite(y)), math.nan)


def _legend(line: Line, chart: Chart) -> str:
    key = f'<i class="c{line.colour % 6}"></i>{visible(line.name)} ' if line.name else ""
    return f"<span>{key}<b>{_value(_last(line.points), chart.percent)}</b></span>"


def _value(value: float, percent: bool) -> str:
    if not math.isfinite(value):
        return "–"
    if percent:
        return f"{100 * value:.2g} %" if abs(value) < 0.1 else f"{100 * value:.1f} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


# --- marks and shares ------------------------------------------------------------------------------------------------


def _kind(what: str) -> str:
    """The class of a mark: what has a colour of its own, else other."""
    return what if what in ("resumed", "skipped", "rollback", "cool", "lower_lr") else "other"


def merged_marks(marks: Sequence[Mark], width: float, most: int = 60) -> list[Mark]:
    """Marks of one kind that would lie on each other (closer than 1/`most` of the width) as one."""
    out: list[Mark] = []
    for mark in marks:
        near = next((m for m in reversed(out) if m.what == mark.what), None)
        if near is None or mark.tokens - near.tokens > width / most:
            out.append(mark)
    return out


def shares(parts: Mapping[str, float], words: Mapping[str, str]) -> str:
    """A bar of parts of a whole with its legend; `words` says each part's amount."""
    whole = sum(parts.values())
    if whole <= 0:
        return ""
    colours = dict(zip(parts, itertools.cycle((1, 0, 2, 3, 5, 4)), strict=False))
    bar = "".join(
        f'<i class="c{colours[name]}" style="width:{100 * value / whole:.2f}%" title="{attribute(name)}"></i>'
        for name, value in parts.items()
    )
    legend = "".join(
        f'<span><i class="c{colours[name]}"></i>{visible(name)} <b>{100 * value / whole:.1f} %</b> '
        f"{visible(words[name])}</span>"
        for name, value in parts.items()
    )
    return f'<div class="shares"><div class="bar">{bar}</div><p class="legend">{legend}</p></div>'
