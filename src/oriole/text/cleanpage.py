"""The report of a cleaning run as one page of HTML that needs nothing else: no script, no font, no network.

Everything that comes from a document is escaped, and what cannot be seen in it (controls, direction marks) is shown as
a sign. A policy in the page forbids scripts and loading, in case something were overlooked.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["page"]

LANGUAGES = {"zh": "Chinese", "en": "English", "other": "other"}
STEPS = {
    "kept": "kept",
    "heldout": "held out",
    "rules": "dropped by rules",
    "decontaminate": "in an evaluation file",
    "exact": "exact duplicates",
    "near": "near duplicates",
    "lines": "boilerplate only",
}
_TOKEN = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9]")
_SIGNS = {" ": "·", "\t": "⇥", "\n": "⏎\n", "\u3000": "□", "\xa0": "⍽"}
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2028\u2029\u2060-\u2069\ufeff\ufff9-\ufffb]"
)


def page(report: Mapping[str, Any], recipe: str) -> str:
    """The whole page; `recipe` is the settings as TOML."""
    sections: list[tuple[str, str, str]] = [
        ("overview", "Overview", _overview(report)),
        ("rules", "Rules", _rules(report)),
        ("duplicates", "Duplicates", _duplicates(report)),
        ("chats", "Conversations", _chats(report.get("chats"))),
        ("bad", "Bad records", _bad(report.get("bad"))),
        ("inputs", "Inputs", _inputs(report["inputs"])),
        ("sources", "Sources", _sources(report["sources"])),
        ("settings", "Settings", _settings(recipe)),
    ]
    shown = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in shown)
    langs = list(report["totals"])
    choice = "".join(
        f'<input type="radio" name="lang" id="only-{lang}"{" checked" if lang == "all" else ""}>'
        f'<label for="only-{lang}">{_language(lang)}</label>'
        for lang in ["all", *langs]
    )
    return _PAGE.format(
        style=_style(langs),
        links=links,
        choice=f'<fieldset class="choice"><legend>Language</legend>{choice}</fieldset>' if len(langs) > 1 else "",
        lead=_lead(report),
        sections="".join(f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in shown),
        version=_text(report["oriole"]),
    )


def _style(langs: Sequence[str]) -> str:
    """The style sheet, with what hides the other languages when one is chosen: the page has no script for it."""
    hide = (
        f"body:has(#only-{chosen}:checked) [data-lang={other}]{{display:none}}\n"
        for chosen in langs
        for other in langs
        if other != chosen
    )
    return Path(__file__).with_name("cleanpage.css").read_text(encoding="utf-8") + "".join(hide)


# --- sections --------------------------------------------------------------------------------------------------------


def _lead(report: Mapping[str, Any]) -> str:
    read = sum(steps["read"]["documents"] for steps in report["totals"].values())
    kept = sum(steps["kept"]["documents"] for steps in report["totals"].values())
    held = sum(steps["heldout"]["documents"] for steps in report["totals"].values())
    chars = sum(steps["kept"]["characters"] for steps in report["totals"].values())
    what = {"text": "documents", "chat": "conversations", "preference": "preference pairs"}[report["kind"]]
    figures = [
        (f"{read:,}", f"{what} read"),
        (f"{kept:,}", f"kept, {_percent(kept, read)}"),
        (_human(chars), "characters kept"),
        (f"{held:,}", "held out"),
    ]
    return "".join(f"<div><b>{number}</b><span>{words}</span></div>" for number, words in figures)


def _overview(report: Mapping[str, Any]) -> str:
    totals = report["totals"]
    used = [step for step in STEPS if any(steps[step]["documents"] for steps in totals.values())]
    bars = "".join(_flow(lang, steps) for lang, steps in totals.items())
    heads = "".join(f'<th colspan="3" data-lang="{lang}">{_language(lang)}</th>' for lang in totals)
    units = "".join(
        f'<td data-lang="{lang}">{unit}</td>' for lang in totals for unit in ("documents", "share", "characters")
    )
    rows = "".join(
        f"<tr><th>{_key(step)}</th>{''.join(_step(lang, steps, step) for lang, steps in totals.items())}</tr>"
        for step in ["read", *used]
    )
    return (
        f'{bars}<div class="wide"><table class="numbers"><thead><tr><th></th>{heads}</tr>'
        f'<tr class="quiet"><td></td>{units}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _flow(lang: str, steps: Mapping[str, Mapping[str, int]]) -> str:
    """One bar with a part for each thing that became of the documents."""
    read = steps["read"]["documents"]
    parts = "".join(
        f'<i class="s-{step}" style="width:{100 * steps[step]["documents"] / read:.3f}%" '
        f'title="{name}: {steps[step]["documents"]:,}"></i>'
        for step, name in STEPS.items()
        if steps[step]["documents"]
    )
    kept = _percent(steps["kept"]["documents"], read)
    return (
        f'<div class="flow" data-lang="{lang}"><span>{_language(lang)}</span><div class="bar">{parts}</div>'
        f"<b>{kept} kept</b></div>"
    )


def _key(step: str) -> str:
    return f'<i class="key s-{step}"></i>{STEPS[step]}' if step in STEPS else step


def _step(lang: str, steps: Mapping[str, Mapping[str, int]], step: str) -> str:
    documents, characters = steps[step]["documents"], steps[step]["characters"]
    share = _percent(documents, steps["read"]["documents"])
    quiet = f'<td data-lang="{lang}" class="quiet">'
    return f'<td data-lang="{lang}">{documents:,}</td>{quiet}{share}</td>{quiet}{_human(characters)}</td>'


def _rules(report: Mapping[str, Any]) -> str:
    langs = list(report["totals"])
    heads = "".join(f'<span data-lang="{_text(lang)}">{_language(lang)} dropped</span>' for lang in langs)
    most = max(
        (_share(row) for rule in report["rules"] for row in rule["languages"].values()), default=0.0
    )  # fmt: skip
    rows, idle = [], []
    for rule in report["rules"]:
        if any(row["dropped"] or row["changed"] for row in rule["languages"].values()):
            rows.append(_rule(rule, report["samples"], langs, most))
        else:
            idle.append(f'<code title="{_text(rule["about"])}">{_text(rule["rule"])}</code>')
    nothing = f'<p class="quiet">No effect on this corpus: {" ".join(idle)}</p>' if idle else ""
    body = "".join(rows) or '<p class="quiet">No rule dropped or changed anything.</p>'
    return (
        '<p class="quiet">In the order in which they run; shares are of the documents that reached the rule. Open a '
        "rule to see a random sample of what it did.</p>"
        f'<div class="rules" style="--langs:{len(langs)}"><div class="row head"><span>Rule</span>{heads}'
        f"<span>Changed</span></div>{body}</div>{nothing}"
    )


def _share(row: Mapping[str, int]) -> float:
    return row["dropped"] / max(1, row["seen"])


def _rule(rule: Mapping[str, Any], samples: Mapping[str, Any], langs: Sequence[str], most: float) -> str:
    name, about = rule["rule"], rule["about"]
    cells = []
    for lang in langs:
        row = rule["languages"][lang]
        width = 100 * _share(row) / most if most else 0
        drop = f"{row['dropped']:,} <em>{_percent(row['dropped'], row['seen'])}</em>" if row["dropped"] else "–"
        cells.append(f'<span data-lang="{_text(lang)}"><i class="meter" style="width:{width:.2f}%"></i>{drop}</span>')
    changed = sum(row["changed"] for row in rule["languages"].values())
    added = sum(row["characters_added"] for row in rule["languages"].values())
    change = f"{changed:,} <em>{added:+,} chars</em>" if changed else "–"
    first = _words(about.partition(". ")[0].rstrip("."))
    value = f" = {_text(rule['value'])}" if rule["value"] else ""
    dropped = "".join(_dropped(sample) for sample in samples["dropped"].get(name, ()))
    edited = "".join(_changed(sample) for sample in samples["changed"].get(name, ()))
    body = f'<p class="about">{_words(about)}</p>' if about else ""
    body += f'<h3>Dropped</h3><div class="cards">{dropped}</div>' if dropped else ""
    body += f'<h3>Changed</h3><div class="cards">{edited}</div>' if edited else ""
    return (
        f'<details><summary class="row"><span><code>{_text(name)}</code>'
        f'<code class="quiet">{value}</code><small>{first}</small></span>'
        f'{"".join(cells)}<span>{change}</span></summary><div class="inside">{body}</div></details>'
    )


def _dropped(sample: Mapping[str, Any]) -> str:
    why = f"<strong>{_text(sample['detail'])}</strong>" if sample["detail"] else ""
    return _card(sample, why, f'<div class="text">{_text(sample["text"])}</div>')


def _changed(sample: Mapping[str, Any]) -> str:
    pieces = _compared(sample["before"], sample["after"])
    text = "".join(_either(old, new) for old, new in pieces)
    return _card(sample, "", f'<div class="text">{text}</div>')


def _either(old: str, new: str) -> str:
    """One piece of a text and of its changed form, in one."""
    return old + new if old.startswith("<del>") or new.startswith("<ins>") else new


def _card(sample: Mapping[str, Any], why: str, body: str) -> str:
    lang = _text(sample["lang"])
    return (
        f'<article data-lang="{lang}" {_lang_attribute(sample["lang"])}><header><span class="tag">{lang or "?"}</span>'
        f"<span>{_text(sample['source'])}</span>{why}</header>{body}</article>"
    )


def _duplicates(report: Mapping[str, Any]) -> str:
    pairs = "".join(_twins(pair) for pair in report["duplicates"]["pairs"])
    counts = {
        step: sum(steps[step]["documents"] for steps in report["totals"].values())
        for step in ("exact", "near", "lines")
    }
    if not any(counts.values()) and not report["duplicates"]["lines"]:
        return ""
    words = [f"<b>{counts['exact']:,}</b> exact", f"<b>{counts['near']:,}</b> near duplicates dropped"]
    if report["duplicates"]["lines"]:
        words.append(f"<b>{report['duplicates']['lines']:,}</b> boilerplate lines taken out")
    if counts["lines"]:
        words.append(f"<b>{counts['lines']:,}</b> documents of nothing else dropped")
    shown = '<p class="quiet">A random sample of near duplicates: what stayed, and what went for being like it.</p>'
    return f"<p>{', '.join(words)}.</p>" + (f"{shown}{pairs}" if pairs else "")


def _twins(pair: Mapping[str, Any]) -> str:
    pieces = _compared(pair["kept"]["text"], pair["dropped"]["text"])
    left, right = ("".join(piece[side] for piece in pieces) for side in (0, 1))
    sides = "".join(
        f'<div {_lang_attribute(side["lang"])}><header><span class="tag">{name}</span>'
        f"<span>{_text(side['source'])}</span>"
        f'<span class="quiet">{_text(side["input"])}, {side["characters"]:,} characters</span></header>'
        f'<div class="text">{text}</div></div>'
        for name, side, text in (("kept", pair["kept"], left), ("dropped", pair["dropped"], right))
    )
    lang = _text(pair["dropped"]["lang"])
    return (
        f'<article class="twins" data-lang="{lang}"><p><b>{pair["similarity"]:.2f}</b> similarity</p>'
        f'<div class="sides">{sides}</div></article>'
    )


_CHAT_WORDS = {
    "rows": "rows read", "messages": "messages", "tokens": "tokens", "several_rounds": "with several questions",
    "with_system": "with a system message", "with_tools": "with tools", "with_reasoning": "with reasoning",
    "longer": "longer than the training length", "not_alternating": "roles do not alternate",
    "empty_turn": "with an empty turn", "repeated_turn": "with a repeated turn",
    "begins_without_user": "begin without a user's turn", "ends_without_answer": "end without an answer",
    "open_call": "end with a call that gets no result",
}  # fmt: skip


def _chats(chats: Mapping[str, Any] | None) -> str:
    if not chats or not chats.get("rows"):
        return ""
    rows = []
    for name, words in _CHAT_WORDS.items():
        value = chats.get(name, 0)
        if name in ("rows", "messages", "tokens"):
            share = f"{value / chats['rows']:,.1f} per row" if name != "rows" else ""
        else:
            share = _percent(value, chats["rows"])
        if name == "tokens" and chats["estimated"]:
            words = "tokens (estimated; name a tokenizer to count them)"
        if name == "longer":
            words = f"longer than {chats['length']:,} tokens, would be cut"
        rows.append(f'<tr><th>{words}</th><td>{value:,}</td><td class="quiet">{share}</td></tr>')
    return f'<p class="quiet">As they were read, before any rule.</p><table class="numbers">{"".join(rows)}</table>'


def _bad(bad: Mapping[str, Any] | None) -> str:
    if bad is None:
        return ""
    other = "".join(f"<li>{_text(name)}: {_text(was)}</li>" for name, was in bad["converted"].items())
    converted = f'<p>Not UTF-8, and read as what they are:</p><ul class="bad">{other}</ul>' if other else ""
    if not bad["total"]:
        return f"<p>Every record could be read.</p>{converted}"
    files = "".join(f"<tr><th>{_text(name)}</th><td>{count:,}</td></tr>" for name, count in bad["files"].items())
    why = "".join(f"<li>{_text(reason)}</li>" for reason in bad["examples"])
    return (
        f"<p><b>{bad['total']:,}</b> records could not be read and were left out.</p>"
        f'<table class="numbers"><tbody>{files}</tbody></table><ul class="bad">{why}</ul>{converted}'
    )


def _inputs(inputs: Sequence[Mapping[str, Any]]) -> str:
    columns = ("read", "dropped", "duplicates", "heldout", "kept")
    heads = "".join(f"<td>{'held out' if name == 'heldout' else name}</td>" for name in columns)
    rows = "".join(
        f'<tr><th title="{_text(" ".join(each["files"]))}">{_text(each["name"])}</th>'
        + "".join(f"<td>{each[name]:,}</td>" for name in columns)
        + f'<td class="quiet">{_percent(each["kept"], each["read"])}</td>'
        f'<td class="quiet">{_human(each["kept_characters"])}</td></tr>'
        for each in inputs
    )
    head = f'<thead><tr class="quiet"><td></td>{heads}<td>share</td><td>characters kept</td></tr></thead>'
    return f'<div class="wide"><table class="numbers">{head}<tbody>{rows}</tbody></table></div>'


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    most = max((each["read_characters"] for each in sources), default=0) or 1
    rows = "".join(
        f"<tr><th>{_text(each['source']) or '<i>none</i>'}</th><td>{each['read']:,}</td><td>{each['kept']:,}</td>"
        f'<td class="quiet">{_percent(each["kept"], each["read"])}</td><td>{_human(each["kept_characters"])}</td>'
        f'<td class="pair"><i style="width:{100 * each["read_characters"] / most:.2f}%"></i>'
        f'<i class="s-kept" style="width:{100 * each["kept_characters"] / most:.2f}%"></i></td></tr>'
        for each in sources
    )
    head = '<tr class="quiet"><td></td><td>read</td><td>kept</td><td>share</td><td>characters kept</td><td></td></tr>'
    return f'<div class="wide"><table class="numbers"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _settings(recipe: str) -> str:
    return (
        '<p class="quiet">Keep this as a file, change it, and run <code>oriole data clean IN... OUT config=FILE</code> '
        f"again: only what a change touches is done anew.</p><pre>{_text(recipe.strip())}</pre>"
    )


# --- words and signs -------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """Text of a document, or of anything else that is not ours, as HTML."""
    return _UNSEEN.sub(_sign, escape(str(value)))


def _words(text: str) -> str:
    """A docstring as HTML: what stands in backquotes is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", _text(text))


def _sign(match: re.Match[str]) -> str:
    return f'<span class="sign">{ord(match[0]):04X}</span>'


def _compared(before: str, after: str) -> list[tuple[str, str]]:
    """Both texts as HTML, piece by piece, with what is not in the other one marked.

    Where both are cut short, nothing says what follows, so what stands behind the last common piece is not marked.
    """
    cut = before.endswith("…") and after.endswith("…")
    a, b = (_TOKEN.findall(text.removesuffix("…") if cut else text) for text in (before, after))
    pieces = []
    codes = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    for n, (kind, a0, a1, b0, b1) in enumerate(codes, 1):
        old, new = "".join(a[a0:a1]), "".join(b[b0:b1])
        if kind == "equal" or (cut and n == len(codes) > 1):
            pieces.append((_text(old), _text(new)))
        else:
            pieces.append((_marked("del", old), _marked("ins", new)))
    return [*pieces, ("…", "…")] if cut else pieces


def _marked(tag: str, text: str) -> str:
    """The text in a tag, and visible even when it is white space only."""
    if text.isspace():
        text = "".join(_SIGNS.get(c, c) for c in text)
    return f"<{tag}>{_text(text)}</{tag}>" if text else ""


def _language(lang: str) -> str:
    return "All" if lang == "all" else LANGUAGES.get(lang, _text(lang) or "unknown")


def _lang_attribute(lang: str) -> str:
    return 'lang="zh-Hans"' if lang == "zh" else f'lang="{_text(lang)}"' if lang else ""


def _percent(part: int, whole: int) -> str:
    if not whole:
        return ""
    share = 100 * part / whole
    return "0 %" if not part else f"{share:.2f} %" if share < 1 else f"{share:.1f} %"


def _human(n: int) -> str:
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= limit:
            return f"{n / limit:.3g} {unit}"
    return str(n)


# --- the page --------------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Oriole: cleaning report</title>
<style>{style}</style>
</head>
<body>
<header class="top"><h1>Cleaning report</h1><div class="lead">{lead}</div></header>
<nav>{links}{choice}</nav>
<main>{sections}</main>
<footer>Oriole {version} · <code>report.json</code> beside this page holds the same figures.</footer>
</body>
</html>
"""
