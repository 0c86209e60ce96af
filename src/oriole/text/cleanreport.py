"""What cleaning did to a corpus, added up from the counts of its pieces: `report.json`, `report.html`, a page of text.

Nothing in a report depends on when or where it was made, or on how often the work was interrupted.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from oriole import __version__
from oriole.log import human
from oriole.text import cleanpage
from oriole.text.cleansteps import DECONTAMINATE
from oriole.text.tally import OTHER, add, merge_samples
from oriole.text.work import new_file

if TYPE_CHECKING:
    from oriole.text.pipeline import CleanConfig, Input

__all__ = ["SCHEMA", "build", "nothing_left", "summary", "text", "write"]

SCHEMA = 1
MAX_LISTED = 200
"""Inputs, sources and bad files that a report lists by name."""
WIDTH = 110


def build(
    inputs: Sequence["Input"],
    config: "CleanConfig",
    rules: Sequence[tuple[str, str, str]],
    cleaned: Sequence[Mapping[str, Any]],
    finished: Mapping[str, Mapping[str, Mapping[str, Any]]],
    samples: Iterable[Path],
    pairs: Sequence[Mapping[str, Any]],
    not_found: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The report.

    `rules`: (name, its setting, what it does) in the order in which they run. `cleaned`: the counts of each input from
    the rules; `finished`: those of its two files ("cleaned", "heldout") from the end. `samples`: where each input's
    samples lie. `not_found`: what could not even be opened, where bad records are skipped.
    """
    total: dict[str, Any] = {}
    end: dict[str, Any] = {"cleaned": {}, "heldout": {}}
    for counts in cleaned:
        add(total, {k: v for k, v in counts.items() if k != "bad"})
    for parts in finished.values():
        for part, counts in parts.items():
            add(end[part], counts)
    report = {
        "schema": SCHEMA,
        "oriole": __version__,
        "kind": config.kind,
        "settings": config.model_dump(mode="json", exclude={"engine", "workers"}),
        "totals": _totals(total, end),
        "rules": _rules(rules, total),
        "inputs": [
            _input(each, counts, finished[each.name]) for each, counts in zip(inputs, cleaned, strict=True)
        ],
        "sources": _sources(total, end),
        "duplicates": {"lines": sum(end[part].get("lines", 0) for part in end), "pairs": list(pairs)},
        "samples": _samples(samples, config.samples, [name for name, _, _ in rules]),
    }  # fmt: skip
    if not_found is not None:
        report["bad"] = _bad([not_found, *(counts["bad"] for counts in cleaned)])
    if config.kind != "text":
        report["chats"] = {**total.get("chats", {}), "length": config.length, "estimated": not config.tokenizer}
    return report


def _totals(total: Mapping[str, Any], end: Mapping[str, Any]) -> dict[str, Any]:
    """{language: {step: {documents, characters}}}; every document read is in exactly one of the other steps."""
    out: dict[str, Any] = {}
    for lang in sorted(total.get("read", {})):
        by_rules = [0, 0]
        contaminated = [0, 0]
        for rule, langs in total["rules"].items():
            dropped, chars = langs.get(lang, [0, 0])[:2]
            into = contaminated if rule == DECONTAMINATE else by_rules
            into[0] += dropped
            into[1] += chars
        steps = {"read": total["read"][lang], "rules": by_rules, DECONTAMINATE: contaminated}
        for reason in ("exact", "near", "lines"):
            steps[reason] = _sum(end[part].get("duplicates", {}).get(reason, {}).get(lang) for part in end)
        steps["heldout"] = _sum([end["heldout"].get("kept", {}).get(lang)])
        steps["kept"] = _sum([end["cleaned"].get("kept", {}).get(lang)])
        out[lang] = {step: {"documents": n, "characters": chars} for step, (n, chars) in steps.items()}
    return out


def _sum(pairs: Iterable[Sequence[int] | None]) -> list[int]:
    return [sum(column) for column in zip([0, 0], *(pair for pair in pairs if pair is not None), strict=True)]


def _rules(rules: Sequence[tuple[str, str, str]], total: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each rule and language, what it saw, dropped, and changed."""
    left = {lang: count[0] for lang, count in total.get("read", {}).items()}
    out = []
    for name, value, about in rules:
        langs = {}
        for lang in sorted(left):
            dropped, chars, changed, longer = total["rules"].get(name, {}).get(lang, [0, 0, 0, 0])
            langs[lang] = {
                "seen": left[lang],
                "kept": left[lang] - dropped,
                "dropped": dropped,
                "dropped_characters": chars,
                "changed": changed,
                "characters_added": longer,
            }
            left[lang] -= dropped
        out.append({"rule": name, "value": value, "about": about, "languages": langs})
    return out


def _input(each: "Input", counts: Mapping[str, Any], finished: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    read = _sum(counts["read"].values())
    kept, heldout = (_sum(finished[part]["kept"].values()) for part in ("cleaned", "heldout"))
    twins = sum(n for part in finished.values() for langs in part["duplicates"].values() for n, _ in langs.values())
    return {
        "name": each.name,
        "files": [str(path) for path in each.paths[:20]],
        "more_files": max(0, len(each.paths) - 20),
        "read": read[0],
        "read_characters": read[1],
        "dropped": read[0] - kept[0] - heldout[0] - twins,
        "duplicates": twins,
        "heldout": heldout[0],
        "kept": kept[0],
        "kept_characters": kept[1],
        "bad": counts.get("bad", {}).get("total", 0),
    }


def _sources(total: Mapping[str, Any], end: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was read and kept of each source, the largest first."""
    rows: dict[str, list[int]] = {}
    by_size = sorted(total.get("sources", {}).items(), key=lambda item: (-item[1][1], item[0]))
    listed = {name for name, _ in by_size[:MAX_LISTED]}
    for table, column in ((total.get("sources", {}), 0), (end["cleaned"].get("sources", {}), 2)):
        for source, (documents, characters) in table.items():
            row = rows.setdefault(source if source in listed else OTHER, [0, 0, 0, 0])
            row[column] += documents
            row[column + 1] += characters
    names = ("read", "read_characters", "kept", "kept_characters")
    return [
        {"source": source, **dict(zip(names, row, strict=True))}
        for source, row in sorted(rows.items(), key=lambda item: (item[0] == OTHER, -item[1][1], item[0]))
    ]


def _bad(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {"total": 0, "files": {}, "examples": [], "converted": {}}
    for part in parts:
        total["total"] += part["total"]
        add(total["files"], part["files"])
        total["converted"] |= part["converted"]
        total["examples"] = [*total["examples"], *part["examples"]][:MAX_LISTED]
    worst = sorted(total["files"].items(), key=lambda item: (-item[1], item[0]))
    return total | {"files": dict(worst[:MAX_LISTED])}


def _samples(files: Iterable[Path], size: int, order: Sequence[str]) -> dict[str, Any]:
    """{"dropped" | "changed": {rule: [{"lang", …}]}}, in the order of the rules."""
    merged = merge_samples((json.loads(path.read_text(encoding="utf-8")) for path in files), size)
    out: dict[str, dict[str, list[dict[str, Any]]]] = {"dropped": {}, "changed": {}}
    place = {name: n for n, name in enumerate(order)}
    for group in sorted(merged, key=lambda g: (place.get(g.split("\t")[1], len(place)), g)):
        what, rule, lang = group.split("\t")
        out[what].setdefault(rule, []).extend({"lang": lang, **sample} for sample in merged[group])
    return out


def write(report: Mapping[str, Any], recipe: str, folder: Path) -> None:
    """Keep the report in `folder` for programs and for people; `recipe` is the settings as TOML."""
    for name, content in (
        ("report.json", json.dumps(report, ensure_ascii=False, indent=1) + "\n"),
        ("report.html", cleanpage.page(report, recipe)),
    ):
        with new_file(folder / name) as file:
            file.write(content.encode("utf-8", "replace"))


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without what its samples say: for programs."""
    out = {key: value for key, value in report.items() if key != "samples"}
    return out | {"duplicates": {k: v for k, v in report["duplicates"].items() if k != "pairs"}}


# --- for the terminal ------------------------------------------------------------------------------------------------


def text(report: Mapping[str, Any]) -> str:
    """The totals and the rules that did something, as a page of plain text."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=WIDTH, color_system=None, legacy_windows=False)
    console.print(_totals_table(report["totals"]))
    console.print()
    console.print(_rules_table(report["rules"], list(report["totals"])))
    if bad := report.get("bad", {}).get("total"):
        console.print(Text(f"\n{bad:,} records could not be read; the report names them"))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def nothing_left(report: Mapping[str, Any], folder: Path) -> str:
    """Why no document is left to train on and what to do, in one sentence; "" where some are."""
    totals = report["totals"].values()
    steps = {step: sum(langs[step]["documents"] for langs in totals) for step in ("read", *cleanpage.STEPS)}
    if steps["kept"]:
        return ""
    if not steps["read"]:
        return f"no record of the inputs could be read; {folder}/report.html names the faults"
    dropped = {rule["rule"]: sum(c["dropped"] for c in rule["languages"].values()) for rule in report["rules"]}
    rule = max(dropped, key=dropped.__getitem__, default="")
    if not rule or dropped[rule] <= steps["heldout"]:
        return (
            f"all that is left of {steps['read']:,} documents, {steps['heldout']:,}, was set aside in {folder}/heldout "
            "for validation; give more text, or heldout=0"
        )
    most = (
        f"nothing is left of {steps['read']:,} documents: the rule {rule} dropped most of them, {dropped[rule]:,}; see"
    )
    if rule == DECONTAMINATE:
        return f"{most} {folder}/report.html for the passages they share with decontaminate=, and give other text"
    (about,) = (each["about"] for each in report["rules"] if each["rule"] == rule)
    mild = " or begin with rules=light" if report["kind"] == "text" else ""
    switch = (about.rpartition("Set by ")[2] or f"`{rule}`").rstrip(".").replace("`", "")
    return f"{most} {folder}/report.html for examples, then loosen or switch it off ({switch}){mild}"


def _table(heads: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for n, head in enumerate(heads):
        table.add_column(head, justify="right" if n else "left", no_wrap=not n)
    return table


def _totals_table(totals: Mapping[str, Any]) -> Table:
    table = _table(["", *(f"{lang} {unit}" for lang in totals for unit in ("documents", "characters"))])
    for step, words in {"read": "read", **cleanpage.STEPS}.items():
        counts = [steps[step] for steps in totals.values()]
        if any(count["documents"] for count in counts) or step == "kept":
            cells = (cell for c in counts for cell in (f"{c['documents']:,}", human(c["characters"])))
            table.add_row(words, *cells, style="bold" if step in ("read", "kept") else "")
    return table


def _rules_table(rules: Sequence[Mapping[str, Any]], langs: Sequence[str]) -> Table:
    table = _table(["rule", *(f"{lang} {what}" for lang in langs for what in ("dropped", "changed"))])
    for rule in rules:
        counts = [rule["languages"][lang] for lang in langs]
        if any(count["dropped"] or count["changed"] for count in counts):
            table.add_row(rule["rule"], *(f"{c[w]:,}" if c[w] else "" for c in counts for w in ("dropped", "changed")))
    return table
