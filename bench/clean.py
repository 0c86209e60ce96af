"""Cleaning in MB/s on one core: the light and the full set of rules, and datatrove's filters on the same documents.

    python -m bench.clean zh=DATA/pretrain_zh_00.jsonl.xz en=DATA/pretrain_en_00.jsonl.xz
    python -m bench.clean zh=… en=… megabytes=1 peer=datatrove json=/tmp/clean.json

`full` is every rule, also those that are off by default. The peer's filters are GopherRepetition, GopherQuality,
C4Quality and FineWebQuality for English, and for Chinese the first two and the last with FineWeb-2's thresholds, with
FineWeb's settings; Oriole runs the same set at the published thresholds. Both get whole documents, in turn, batch by
batch, in one process; the rate is that of processor time, since a pipeline runs one process per core. datatrove must
be importable: install `datatrove[processing] spacy jieba` into an environment of its own and name its site-packages in
PYTHONPATH.
"""

import glob
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.record import ratio, save, settings
from oriole.text.formats import read_docs
from oriole.text.records import Doc
from oriole.text.rules import Drop, RulesConfig, apply_rules, build_rules

DEFAULTS = {"zh": "", "en": "", "megabytes": 4.0, "batches": 7, "peer": "", "json": ""}

# Everything on, and what FineWeb and FineWeb-2 publish where our defaults are milder.
EVERY = RulesConfig(c4_terminal=True, c4_line_words=3, c4_curly=True)
PUBLISHED = RulesConfig(c4_line_words=3, c4_curly=True, fineweb_dup_characters=0.01, ngram_votes=1)
_STOP_WORDS = list("的年在月是和日了於·為有被人中为他與後也而由")


def main() -> None:
    """Measure and print."""
    chosen = settings(DEFAULTS)
    table = Table(title="Cleaning, one core")
    for column in ("", "language", "MB/s", "documents", "kept", "ratio"):
        table.add_column(column, justify="right" if column not in ("", "language") else "left")
    result: dict[str, Any] = {}
    for lang in ("zh", "en"):
        if not chosen[lang]:
            continue
        batches = _batches(str(chosen[lang]), lang, float(chosen["megabytes"]), int(chosen["batches"]))
        size = [sum(len(d.text.encode()) for d in batch) / 1e6 for batch in batches]
        runs: dict[str, Callable[[Doc], bool]] = {
            "light": _ours(RulesConfig(preset="light")),
            "full": _ours(EVERY),
        }
        if chosen["peer"] == "datatrove":
            runs["quality rules"] = _ours(PUBLISHED, ("gopher", "c4", "fineweb"))
            runs["datatrove"] = _datatrove(lang)
        for run in runs.values():
            run(batches[0][0])  # dictionaries, models
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        kept: dict[str, list[bool]] = {name: [] for name in runs}
        for batch in batches:
            for name, run in runs.items():
                start = time.process_time()
                kept[name] += [run(doc) for doc in batch]
                seconds[name].append(time.process_time() - start)
        result[lang] = {"megabytes": size, "seconds": seconds, "kept": {n: sum(k) for n, k in kept.items()}}
        result[lang]["documents"] = len(kept["full"])
        peer = "-"
        if "datatrove" in runs:
            r = ratio(seconds["quality rules"], seconds["datatrove"])
            same = statistics.mean(a == b for a, b in zip(kept["quality rules"], kept["datatrove"], strict=True))
            result[lang] |= {"ratio": r, "agreement": same}
            peer = f"{r['median']:.1f} ({r['low']:.1f} … {r['high']:.1f})"
        for name in runs:
            rate = statistics.median(m / s for m, s in zip(size, seconds[name], strict=True))
            result[lang][f"rate_{name.replace(' ', '_')}"] = rate
            table.add_row(
                name, lang, f"{rate:.1f}", f"{len(kept[name]):,}", f"{sum(kept[name]):,}",
                peer if name == "quality rules" else "",
            )  # fmt: skip
    if not result:
        raise SystemExit("name documents: zh=GLOB or en=GLOB, files of any format that `oriole data clean` reads")
    save("clean", {**chosen, "zh": bool(chosen["zh"]), "en": bool(chosen["en"])}, result, str(chosen["json"]) or None)
    console = Console()
    console.print(table)
    for lang, values in result.items():
        if "agreement" in values:
            console.print(f"{lang}: keep or drop agrees with datatrove for {values['agreement']:.1%} of the documents")


def _batches(pattern: str, lang: str, megabytes: float, count: int) -> list[list[Doc]]:
    """`count` batches of whole documents of about `megabytes` / `count` each."""
    paths = [Path(p) for p in sorted(glob.glob(pattern))]
    if not paths:
        raise SystemExit(f"no file matches {pattern}")
    batches: list[list[Doc]] = [[]]
    size = 0
    for doc in read_docs(paths):
        if size >= megabytes * 1e6 / count:
            if len(batches) == count:
                break
            batches.append([])
            size = 0
        batches[-1].append(Doc(doc.text, lang, doc.source))
        size += len(doc.text.encode())
    return batches


def _ours(config: RulesConfig, prefixes: tuple[str, ...] = ("",)) -> Callable[[Doc], bool]:
    rules = [rule for rule in build_rules(config) if rule.name.startswith(prefixes)]
    return lambda doc: not isinstance(apply_rules(doc, rules), Drop)


def _datatrove(lang: str) -> Callable[[Doc], bool]:
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")
    try:
        from datatrove.data import Document
        from datatrove.pipeline.filters import (
            C4QualityFilter,
            FineWebQualityFilter,
            GopherQualityFilter,
            GopherRepetitionFilter,
        )
    except ImportError as error:
        raise SystemExit("peer=datatrove needs `datatrove[processing] spacy jieba` on PYTHONPATH") from error
    if lang == "en":
        filters = [
            GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False),
            FineWebQualityFilter(),
        ]  # fmt: skip
    else:
        c = RulesConfig()
        language = "cmn_Hani"
        filters = [
            GopherRepetitionFilter(
                language=language, dup_para_frac=0, dup_line_char_frac=0, dup_para_char_frac=0,
                dup_line_frac=c.fineweb2_dup_lines, top_n_grams=tuple(enumerate(c.fineweb2_top_ngrams, 2)),
                dup_n_grams=tuple(enumerate(c.fineweb2_dup_ngrams, 5)),
            ),
            FineWebQualityFilter(
                language=language, short_line_thr=999, char_duplicates_ratio=c.fineweb2_dup_characters,
                line_punct_thr=c.fineweb2_line_ends, new_line_ratio=c.fineweb2_new_lines,
            ),
            GopherQualityFilter(
                language=language, min_avg_word_length=1, max_avg_word_length=5, stop_words=_STOP_WORDS,
                max_non_alpha_words_ratio=c.fineweb2_alpha,
            ),
        ]  # fmt: skip

    def keep(doc: Doc) -> bool:
        document = Document(text=doc.text, id="")
        return all(f.filter(document) is True for f in filters)

    return keep


if __name__ == "__main__":
    main()
