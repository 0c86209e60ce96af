"""A description of data (`apps.inspect`) as a page of HTML that needs nothing else: no script, no font, no network."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from oriole import text
from oriole.apps.inspecttext import MESSAGE_KEYS, percent, truncation_said
from oriole.errors import raise_for_os_error
from oriole.log import human
from oriole.text.work import new_file

__all__ = ["page", "write_page"]

_CLASSES = {"trained": "t", "context": "c", "mark": "m", "trained mark": "m t"}


def write_page(made: Mapping[str, Any], path: Path) -> None:
    """Write the page to a file; `ResourceError` when that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise_for_os_error(error, "making the folder of", path)
    with new_file(path) as file:
        file.write(page(made).encode("utf-8", "replace"))


def page(made: Mapping[str, Any]) -> str:
    """The whole page; whatever comes from the data is escaped."""
    tok = made["tokenizer"]
    documents = sum(part["total"].get("documents", 0) for part in made["parts"])
    lead = [(human(documents), "documents")]
    if tok:
        lead.insert(0, (human(sum(part["total"].get("tokens", 0) for part in made["parts"])), "tokens"))
        lead.append((f"{tok['vocab_size']:,}", "ids in the vocabulary"))
    if batch := made["batch"]:
        lead.append((percent(1 - batch["fill"]), "padding"))
        lead.append((percent(batch["trained"]), "of the places trained"))
    unread = "".join(f"<li>{escape(reason)}</li>" for reason in made.get("unread", ()))
    unread = f"<p>These files could not be read:</p><ul>{unread}</ul>" if unread else ""
    sections = [("counts", "Sources", "".join(map(_part, made["parts"])) + unread)]
    if batch:
        sections.append(("batch", "What a batch contains", _batch(batch)))
    if samples := "".join(map(_samples, made["parts"])):
        sections.append(("samples", "Samples", samples))
    css = Path(text.__file__).with_name("cleanpage.css").read_text(encoding="utf-8") + _CSS
    nav = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{inner}</section>' for name, title, inner in sections)
    figures = "".join(f"<div><b>{escape(value)}</b><span>{what}</span></div>" for value, what in lead)
    name = escape(made["path"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{name}</title><style>{css}</style></head><body>"
        f'<header class="top"><h1>{name} <small>{escape(made["what"])}</small></h1>'
        f'<div class="lead">{figures}</div></header>'
        f"<nav>{nav}</nav><main>{body}</main></body></html>\n"
    )


def _part(part: Mapping[str, Any]) -> str:
    head = f"<h3>{escape(part['name'])}</h3>" if part["name"] else ""
    if "share" in part:
        head = f"<h3>{escape(part['name'])} · {percent(part['share'])} of the training tokens</h3>"
    if not part["total"]:
        return head + "<p>Nothing could be read.</p>"
    out = [head, _counts(part)]
    if "lengths" in part:
        out.append(_lengths(part))
    if validation := part.get("validation"):
        rows = "".join(f"<tr><th>{escape(p)}</th><td>{n:,}</td></tr>" for p, n in validation["problems"].items())
        out.append(f"<p>{validation['sound']:,} of {validation['chats']:,} chats are sound.</p>")
        out.append(f'<table class="numbers">{rows}</table>' if rows else "")
    if skipped := part.get("skipped", {}).get("total"):
        lines = "".join(f"<li>{escape(example)}</li>" for example in part["skipped"]["examples"])
        out.append(f"<p>{skipped:,} records could not be read:</p><ul>{lines}</ul>")
    return "".join(out)


def _counts(part: Mapping[str, Any]) -> str:
    tokens = "tokens" in part["total"]
    main = "tokens" if tokens else "characters"
    names = ["source", "language", "documents", *(["tokens", "trained"] if tokens else []), "characters", "bytes"]
    names += ["bytes per token", "characters per token"] if tokens else []
    whole = max(1, part["total"][main])
    rows = [*part["sources"], *([{"source": "all", "lang": "", **part["total"]}] if len(part["sources"]) > 1 else [])]
    body = []
    for row in rows:
        cells = [f"{row['documents']:,}"]
        cells += [human(row["tokens"]), percent(row["trained_tokens"] / max(1, row["tokens"]))] if tokens else []
        cells += [human(row["characters"]), human(row["bytes"])]
        cells += [f"{row[key] / max(1, row['tokens']):.2f}" for key in ("bytes", "characters")] if tokens else []
        share = row[main] / whole
        body.append(
            f"<tr><th>{escape(row['source'] or '—')}</th><th>{escape(row['lang'])}</th>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + f'<td class="share"><i style="width:{100 * share:.1f}%"></i><span>{percent(share)}</span></td></tr>'
        )
    head = "".join(f"<th>{name}</th>" for name in [*names, f"share of the {main}"])
    return f'<table class="numbers sources"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _lengths(part: Mapping[str, Any]) -> str:
    steps = part["lengths"]["histogram"]
    most, tokens = max(s["documents"] for s in steps), part["total"]["tokens"]
    limit = part["truncation"]["length"]
    rows = "".join(
        f'<div class="step{" over" if s["from"] > limit else ""}"><span>{s["from"]:,}–{s["to"]:,}</span>'
        f'<div class="bar"><i style="width:{100 * s["documents"] / most:.1f}%"></i></div>'
        f"<span>{s['documents']:,}</span><small>{percent(s['tokens'] / tokens)} of the tokens</small></div>"
        for s in steps
    )
    said = escape(truncation_said(part["lengths"], part["truncation"]))
    return f"<h3>Length in tokens</h3>{rows}<p>{said[0].upper()}{said[1:]}.</p>"


# --- text with its mask ----------------------------------------------------------------------------------------------


def _batch(batch: Mapping[str, Any]) -> str:
    out = [
        f"<p>{escape(batch['title'])}: {batch['batch_size']} rows of {batch['length']:,} tokens, "
        f"{batch['documents_per_row']:.1f} documents in a row (over {batch['batches']} batches).</p>",
        '<p class="legend"><span class="t">trained</span> <span class="c">context, not trained</span> '
        '<span class="m">role token</span> <span class="m t">trained role token</span></p>',
    ]
    for row in batch["rows"]:
        pieces = [*row["documents"], *([{"tokens": row["padding"], "pad": True}] if row["padding"] else [])]
        strip = "".join(
            f'<i class="{"pad" if "pad" in p else f"d{n % 4}"}" style="flex:{p["tokens"]}" title="{p["tokens"]:,}"></i>'
            for n, p in enumerate(pieces)
        )
        out.append(f'<h3>Row {row["row"] + 1}</h3><div class="strip">{strip}</div>')
        for n, document in enumerate(row["documents"]):
            head = (
                f"document {n + 1} · positions {document['from']:,}–{document['to']:,} · "
                f"{document['trained_tokens']:,} of {document['tokens']:,} tokens trained"
            )
            out.append(f'<div class="doc e{n % 4}"><small>{head}</small>{_spans(document["spans"])}</div>')
        if row["padding"]:
            out.append(f'<div class="doc pad"><small>{row["padding"]:,} places of padding</small></div>')
    return "".join(out)


def _spans(spans: Any) -> str:
    runs = (f'<span class="{_CLASSES.get(kind, "")}">{_visible(run)}</span>' for kind, run in spans)
    return f"<p class=mask>{''.join(runs)}</p>"


def _visible(run: str) -> str:
    return escape(run).replace("\n", '<i class="nl">⏎</i>\n').replace("\t", '<i class="nl">⇥</i>\t')


def _samples(part: Mapping[str, Any]) -> str:
    out = [f"<h3>{escape(part['name'])}</h3>" if part["name"] and part["samples"] else ""]
    for sample in part["samples"]:
        head = " · ".join(escape(str(x)) for x in (sample["source"], sample["lang"]) if x)
        if "spans" in sample:
            head = f"document {sample['document']:,} · {head} · {sample['tokens']:,} tokens"
            body = _spans(sample["spans"])
        elif "text" in sample:
            body = f'<p class="mask">{_visible(sample["text"])}</p>'
        else:
            body = "".join(_messages(key, sample[key]) for key in MESSAGE_KEYS if key in sample)
            head += (" · good" if sample["label"] else " · bad") if "label" in sample else ""
        out.append(f'<div class="doc e0"><small>{head}</small>{body}</div>')
    return "".join(out)


def _messages(key: str, messages: Any) -> str:
    before = "" if key == "messages" else f"{key} · "
    out = []
    for message in messages:
        learnt = "t" if message["role"] == "assistant" and key != "rejected" else ""
        said = f'<span class="{learnt}">{_visible(message["content"])}</span>'
        out.append(f'<p class="mask"><span class="m">{before}{escape(message["role"])}</span>\n{said}</p>')
    return "".join(out)


_CSS = """
h1 small{font-weight:400;font-size:15px;margin-left:10px}
:root{--t:#14683a;--tb:#dff3e5;--c:#77736a;--m:#8b3fb0}
@media (prefers-color-scheme:dark){:root{--t:#9fe0b4;--tb:#1d3a29;--c:#8f8b83;--m:#cf9be8}}
.t{color:var(--t);background:var(--tb)}.c{color:var(--c)}.m{color:var(--m)}.m.t{font-weight:700}
.legend span{padding:1px 8px;border-radius:4px;border:1px solid var(--line);margin-right:8px}
.nl{opacity:.4;font-style:normal}
.mask{margin:4px 0 0;white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,"SF Mono",Menlo,Consolas,
"DejaVu Sans Mono","Noto Sans Mono CJK SC",monospace;font-size:13px;line-height:1.65;max-height:420px;overflow:auto}
.doc{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--line);border-radius:8px;
padding:8px 14px 10px;margin:8px 0}
.strip{display:flex;height:16px;gap:2px;border-radius:5px;overflow:hidden;margin:6px 0 10px}
.d0{background:var(--kept)}.d1{background:var(--heldout)}.d2{background:var(--rules)}.d3{background:var(--decontaminate)}
.e0{border-left-color:var(--kept)}.e1{border-left-color:var(--heldout)}.e2{border-left-color:var(--rules)}
.e3{border-left-color:var(--decontaminate)}
.pad,.strip .pad{background:repeating-linear-gradient(45deg,transparent 0 4px,var(--line) 4px 8px)}
.step{display:grid;grid-template-columns:130px minmax(120px,420px) 90px 1fr;gap:12px;align-items:center;margin:3px 0;
font-variant-numeric:tabular-nums}
.step>span{text-align:right}.step .bar{height:14px}.step .bar i{background:var(--kept)}
.step.over .bar i{background:var(--rules)}
.sources td{text-align:right;padding:4px 18px 4px 0}.sources thead th{color:var(--quiet);font-size:13px}
.sources td.share{position:relative;min-width:150px;text-align:left}
.share i{position:absolute;left:0;top:6px;bottom:6px;background:var(--kept);opacity:.35;border-radius:3px}
.share span{position:relative;padding-left:6px}
.sources tbody tr:last-child:not(:first-child){font-weight:650}
@media (max-width:800px){.sources{display:block;overflow-x:auto}.step{grid-template-columns:100px 1fr 60px}
.step small{display:none}}
"""
