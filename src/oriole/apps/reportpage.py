"""The report of a run as one page of HTML that needs nothing else: no script, no font, no network; light, dark, paper.

Whatever a model, a file or a recipe has said is escaped, and what cannot be seen in it (controls, direction marks) is
shown as a sign. A policy in the page forbids scripts and loading, in case something were overlooked.
"""

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from oriole import text
from oriole.apps import pairfigures
from oriole.apps.charts import Band, Chart, Line, draw, merged_marks, shares, visible
from oriole.apps.curves import Mark, StageLog, number
from oriole.apps.gatereport import MANY, rows
from oriole.log import duration, human

__all__ = ["frame", "page"]

MOST_SAMPLES = 7
"""So many continuations of one prompt are shown, the first and the last among them."""

MOST_EVENTS = 40

_CHINESE = re.compile("[\u2e80-\u9fff\uf900-\ufaff]")


def page(run: str, report: Mapping[str, Any], stages: Sequence[StageLog]) -> str:
    """The whole page of the run named `run`; `report` is what report.json holds, `stages` what was recorded."""
    sections: list[tuple[str, str, str]] = [("overview", "Overview", _overview(report, stages))]
    for stage in stages:
        if asked := stage.last("questions"):
            sections.append((f"exam-{len(sections)}", "Examination", _exam(asked) + _answers(report)))
    for stage in stages:
        if gate := report["stages"][stage.name].get("gate"):
            title = f"{stage.name} against {gate.get('parent') or 'its parent'}"
            sections.append((f"gate-{len(sections)}", title, _gate(gate)))
    sections += [(f"stage-{n}", stage.name, _stage(stage)) for n, stage in enumerate(stages)]
    sections.append(("settings", "Settings", "".join(map(_settings, stages))))
    commit = f"commit {visible(report['commit'])} · " if report["commit"] else ""
    files = "the figures are in <code>report.json</code>, the curves in each stage's <code>metrics.jsonl</code>"
    return frame(run, _lead(report), sections, f"Oriole · {commit}{visible(report['device'])} · {files}")


def frame(
    title: str,
    lead: Sequence[tuple[str, str]],
    sections: Sequence[tuple[str, str, str]],
    footer: str = "Oriole",
    *,
    style: str = "",
    script: str = "",
) -> str:
    """A page: `lead` are (figure, what it is), `sections` (id, title, HTML); those without HTML are left out.

    A `script` is the only one that the page's policy lets run, known by its hash.
    """
    css = Path(text.__file__).with_name("cleanpage.css").read_text(encoding="utf-8")
    css += Path(__file__).with_name("reportpage.css").read_text(encoding="utf-8") + style
    digest = b64encode(sha256(script.encode()).digest()).decode()
    shown = [(name, words, body) for name, words, body in sections if body]
    return _PAGE.format(
        title=visible(title),
        css=css,
        lead="".join(f"<div><b>{figure}</b><span>{visible(words)}</span></div>" for figure, words in lead),
        nav="".join(f'<a href="#{name}">{visible(words)}</a>' for name, words, _ in shown),
        sections="".join(
            f'<section id="{name}"><h2>{visible(words)}</h2>{body}</section>' for name, words, body in shown
        ),
        footer=footer,
        policy=f"; script-src 'sha256-{digest}'" if script else "",
        script=f"<script>{script}</script>\n" if script else "",
    )


def _lead(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few figures that say what this run is."""
    stages = list(report["stages"].values())
    out: list[tuple[str, str]] = []
    asked = next((s for s in reversed(stages) if "exact_match" in s), None)
    if asked is not None:
        shown = {lang: share for lang, share in asked["exact_match"].items() if lang != "by_kind"}
        out += [(_share(share), f"exact match {lang}".strip()) for lang, share in _ordered(shown).items()]
        out.append((_share(asked.get("loop_rate")), "loop rate"))
    else:
        bpb = stages[-1].get("bpb") or {}
        out += [(_bits(value), f"bits per byte {part}") for part, value in list(_ordered(bpb).items())[:3]]
    if size := max(s.get("parameters") or 0 for s in stages):
        out.append((human(size), "parameters"))
    out.append((human(sum(s["tokens"] for s in stages)), "tokens trained"))
    out.append((duration(sum(s["seconds"] for s in stages)), "training time"))
    return [(figure, words) for figure, words in out if figure != "–"]


def _overview(report: Mapping[str, Any], stages: Sequence[StageLog]) -> str:
    parts = list(dict.fromkeys(part for s in report["stages"].values() for part in s.get("bpb") or {}))
    parts = [part for part in ("zh", "en") if part in parts] or parts[:2]
    mfu = ["MFU"] if any(s.get("mfu") for s in report["stages"].values()) else []
    head = ["", "tokens", "steps", "time", "tokens/s", *mfu, "loss", *(f"bits per byte {part}" for part in parts)]
    rows = []
    for stage, made in zip(stages, report["stages"].values(), strict=True):
        steps = made.get("step")
        cells = [
            human(made["tokens"]), f"{steps:,}" if steps is not None else "", duration(made["seconds"]),
            f"{made['tokens_per_second']:,.0f}" if made.get("tokens_per_second") else "",
            *([_share(made.get("mfu"))] if mfu else []), _bits(made.get("loss")),
        ]  # fmt: skip
        for part in parts:
            before, after = ((made.get(key) or {}).get(part) for key in ("bpb_before", "bpb"))
            cells.append(f'<span class="quiet">{_bits(before)} →</span> <b>{_bits(after)}</b>' if after else "")
        rows.append(f"<tr><th>{visible(stage.name)}{_state(made)}</th>{_cells(cells)}</tr>")
    heads = "".join(f"<th>{visible(name)}</th>" for name in head)
    return (
        f'<div class="wide"><table class="numbers stages"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cells(cells: Sequence[str]) -> str:
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _state(made: Mapping[str, Any]) -> str:
    worse = made.get("gate", {}).get("verdict") == "worse"
    chips = {"not finished": not made["finished"], "worse than its parent, passed over": worse}
    return "".join(f' <em class="chip">{words}</em>' for words, shown in chips.items() if shown)


# --- one stage -------------------------------------------------------------------------------------------------------


def _stage(stage: StageLog) -> str:
    charts = _charts(stage)
    mfu = stage.last("start").get("mfu_is")
    times = stage.times()
    times = {name: seconds for name, seconds in times.items() if seconds >= 1e-3 * sum(times.values())}
    words = {name: duration(seconds) if seconds >= 10 else f"{seconds:.1f} s" for name, seconds in times.items()}
    return "".join(
        [
            f'<p class="quiet">{_facts(stage)}</p>',
            charts or "<p>Nothing has been recorded yet.</p>",
            pairfigures.html(pairfigures.figures(stage)),
            f'<p class="quiet note">MFU = {visible(mfu)}</p>' if mfu else "",
            f"<h3>Where the time went</h3>{shares(times, words)}" if times else "",
            _events(stage),
            _samples(stage),
        ]
    )


def _facts(stage: StageLog) -> str:
    start, done = stage.last("start"), stage.last("done")
    compiled = {True: "compiled", False: "not compiled"}.get(start.get("compile", ""), "")
    threads = (
        f"{start['threads']} thread{'s' * (start['threads'] != 1)}"
        if start.get("threads") and start.get("device") == "cpu"
        else ""
    )
    size = f"{human(number(done['parameters']))} parameters" if "parameters" in done else ""
    facts = [size, start.get("device", ""), start.get("dtype", ""), compiled, threads]
    return " · ".join(visible(fact) for fact in facts if fact)


def _charts(stage: StageLog) -> str:
    loss = stage.points("loss")
    bpb = _ordered(stage.bpb())
    width = max((x for points in (loss, *bpb.values()) for x, _ in points), default=0.0)
    marks = merged_marks([m for m in stage.marks() if m.tokens <= width], width)
    colours = {part: n for n, part in enumerate(bpb)}
    bands = [Band(curve, colours[part]) for part in bpb if (curve := stage.expected("bpb", part))]
    expected = stage.expected("loss")
    about = _about_reference(stage) if expected or bands else ""

    def one(name: str, colour: int = 0, style: Literal["plain", "noisy"] = "noisy") -> list[Line]:
        return [Line("", stage.points(name), colour, style, stage.points(name, undone=True))]

    parts = [Line(part, points, colours[part], "dots") for part, points in bpb.items()]
    unit = "per pair" if stage.name == "reward" else "nats per trained token"
    large = [
        Chart("Loss", unit, one("loss"), [Band(expected)] if expected else (), marks, log=None,
              about=about),
        Chart("Bits per byte", "held-out text, by part", parts, bands, marks, log=None),
    ]  # fmt: skip
    small = [
        Chart("Learning rate", "of AdamW", one("lr", 2, "plain"), marks=marks, zero=True),
        Chart("Gradient norm", "before clipping", one("grad_norm", 3), marks=marks, log=None),
        Chart("Speed", "tokens per second", one("tokens_per_second", 1), marks=marks, zero=True),
        Chart("MFU", "share of the peak FLOP/s", one("mfu", 4), marks=marks, zero=True, percent=True),
        Chart("Data wait", "share of the time", one("data_wait", 5), marks=marks, zero=True, percent=True),
    ]
    drawn = (("large", large), ("small", [*pairfigures.charts(stage), *small]))
    rows = {name: "".join(draw(chart, width) for chart in row) for name, row in drawn}
    return "".join(f'<div class="charts {name}">{row}</div>' for name, row in rows.items() if row)


def _about_reference(stage: StageLog) -> str:
    seeds = stage.reference.get("seeds") or []
    where = stage.reference.get("device", "")
    return (
        f"Shaded: what this recipe is expected to do (mean ± 3 standard deviations, {len(seeds)} "
        f"{'seed' if len(seeds) == 1 else 'seeds'}{f', {where}' if where else ''})."
    )


def _events(stage: StageLog) -> str:
    marks = stage.marks()
    if not marks:
        return ""
    rows = "".join(_event(mark) for mark in marks[:MOST_EVENTS])
    more = f'<p class="quiet">… and {len(marks) - MOST_EVENTS:,} more.</p>' if len(marks) > MOST_EVENTS else ""
    return f'<h3>Events</h3><table class="events">{rows}</table>{more}'


def _event(mark: Mark) -> str:
    known = mark.what if mark.what in ("resumed", "skipped", "rollback", "cool", "lower_lr") else "other"
    return (
        f'<tr><td class="quiet">step {mark.step:,}</td><td class="quiet">{human(mark.tokens)} tokens</td>'
        f'<td><i class="flag k-{known}"></i>{visible(mark.what)}</td><td>{visible(mark.why)}</td></tr>'
    )


def _samples(stage: StageLog) -> str:
    cards = []
    for prompt, said in stage.samples().items():
        rows = "".join(
            f"<tr><td>{human(at) if at else 'before'}</td>"
            f"<td {_lang(prompt + words)}><div>{visible(words.lstrip(' '))}</div></td></tr>"
            for at, words in _spread(said)
        )
        cards.append(f"<article><header {_lang(prompt)}>{visible(prompt)}</header><table>{rows}</table></article>")
    title = "<h3>How it went on, after so many tokens</h3>"
    return f'{title}<div class="cards evolution">{"".join(cards)}</div>' if cards else ""


def _spread(items: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """At most MOST_SAMPLES of them, evenly, first and last included."""
    if len(items) <= MOST_SAMPLES:
        return list(items)
    return [items[round(n * (len(items) - 1) / (MOST_SAMPLES - 1))] for n in range(MOST_SAMPLES)]


# --- examination, answers, settings ----------------------------------------------------------------------------------


def _exam(asked: Mapping[str, Any]) -> str:
    match = asked.get("exact_match") or {}
    langs = list(_ordered({key: 0 for key in match if key != "by_kind"}))
    heads = "".join(f"<th>{visible(lang or 'all')}</th>" for lang in langs)
    rows = [(kind, shares, "") for kind, shares in (match.get("by_kind") or {}).items()]
    rows.append(("mean over kinds", match, ' class="sum"'))
    body = "".join(
        f"<tr{style}><th>{visible(kind)}</th>{''.join(_meter(found.get(lang)) for lang in langs)}</tr>"
        for kind, found, style in rows
    )
    loop = f"<p>Loop rate {_share(asked['loop_rate'])}.</p>" if "loop_rate" in asked else ""
    return (
        '<p class="quiet">Held-out questions, answered greedily; the share that equals an accepted answer.</p>'
        f'<div class="wide"><table class="numbers exam"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{loop}"
    )


def _meter(share: Any) -> str:
    value = number(share)
    if value != value:
        return "<td></td>"
    width = f"width:{100 * min(max(value, 0), 1):.1f}%"
    return f'<td><div class="share"><i style="{width}"></i><span>{_share(value)}</span></div></td>'


def _answers(report: Mapping[str, Any]) -> str:
    cards = []
    for sample in report["samples"]:
        turns = "".join(map(_turn, sample["messages"]))
        right = sample["correct"]
        expected = "" if right else f"<small>expected: {visible(sample['answers'][0])}</small>"
        said = _turn({"role": "assistant", "content": sample["answer"]})
        cards.append(
            f'<article class="chat"><header><span>{visible(sample["kind"])}</span>'
            f'<strong class="{"right" if right else "wrong"}">{"✓ right" if right else "✗ wrong"}</strong></header>'
            f"{turns}{said}{expected}</article>"
        )
    title = "<h3>Answers: the first of each kind, not the best</h3>"
    return f'{title}<div class="cards">{"".join(cards)}</div>' if cards else ""


def _gate(gate: Mapping[str, Any]) -> str:
    """Whether a preference stage helped: the verdict, its figures, the rule, and answers side by side."""
    heads = "".join(f"<th>{word}</th>" for word in ("", "parent", "stage", "", "95 % interval"))
    body = "".join(
        f"<tr><th>{visible(name)}</th>{_cells([visible(cell) for cell in cells])}</tr>" for name, *cells in rows(gate)
    )
    cards = "".join(map(_two_answers, gate.get("examples") or ()))
    few = "" if gate["prompts"] >= MANY else f" Only {gate['prompts']:,} prompts: a small difference would not be seen."
    return (
        f'<p class="verdict"><strong class="{_verdict_class(gate)}">{visible(gate["verdict"])}</strong> '
        f"{visible(gate['why'])}.{few}</p>"
        f'<div class="wide"><table class="numbers stages"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
        f'</div><p class="quiet note">{visible(gate["rule"])} A win rate counts ties half; beside it stand the '
        "judge's mean scores.</p>" + (f'<h3>Answers side by side</h3><div class="cards">{cards}</div>' if cards else "")
    )


def _two_answers(row: Mapping[str, Any]) -> str:
    asked = "".join(_turn(turn) for turn in row["messages"])
    won = {name: ("parent", "neither", "stage")[int(n) + 1] for name, n in row["outcome"].items()}
    said = "".join(
        f"<small>{who}</small>{_turn({'role': 'assistant', 'content': row[who]})}" for who in ("parent", "stage")
    )
    better = " · ".join(f"{visible(name)}: {who}" for name, who in won.items())
    return f'<article class="chat"><header><span>better by {better}</span></header>{asked}{said}</article>'


def _verdict_class(gate: Mapping[str, Any]) -> str:
    return {"better": "right", "worse": "wrong"}.get(gate["verdict"], "quiet")


def _turn(turn: Mapping[str, Any]) -> str:
    return f'<p class="turn {_role(turn)}" {_lang(turn.get("content", ""))}>{visible(turn.get("content", ""))}</p>'


def _role(turn: Mapping[str, Any]) -> str:
    """The class of a turn: a name of ours, whatever the file says."""
    return next((role for role in ("system", "assistant", "tool") if turn.get("role") == role), "user")


def _settings(stage: StageLog) -> str:
    rows = {key: value for key, value in stage.env.items() if key != "schema"}
    env = "".join(f"<tr><th>{visible(key)}</th><td>{_env(value)}</td></tr>" for key, value in rows.items())
    table = f'<div class="wide"><table class="numbers env">{env}</table></div>' if env else ""
    recipe = f"<pre>{visible(stage.recipe.strip())}</pre>" if stage.recipe else ""
    return f"<h3>{visible(stage.name)}</h3>{table}{recipe}" if table or recipe else ""


def _env(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{visible(key)} <code>{visible(each)}</code>" for key, each in value.items())
    return visible(value)


# --- words -----------------------------------------------------------------------------------------------------------


def _ordered(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Chinese first, then English, then the others as they come."""
    first = {part: parts[part] for part in ("zh", "en") if part in parts}
    return first | {part: value for part, value in parts.items() if part not in first}


def _lang(words: str) -> str:
    return 'lang="zh-Hans"' if _CHINESE.search(str(words)) else ""


def _bits(value: Any) -> str:
    found = number(value)
    return "–" if found != found else f"{found:.2f}" if found >= 0.1 else f"{found:.3f}"


def _share(value: Any) -> str:
    found = number(value)
    return "–" if found != found else f"{100 * found:.1f} %"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'{policy}">
<title>{title} · Oriole</title>
<style>{css}</style>
</head>
<body>
<header class="top"><h1>{title}</h1><div class="lead">{lead}</div></header>
<nav>{nav}</nav>
<main>{sections}</main>
<footer>{footer}</footer>
{script}</body>
</html>
"""
