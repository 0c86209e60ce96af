"""Near deduplication: documents per second and core beside datasketch, recall and precision on planted duplicates.

    python -m bench.dedup data=DATA
    python -m bench.dedup data=DATA docs=20000 peer_docs=1000 runs=3 json=/tmp/bench.json

DATA is a folder of pretrain_zh*.jsonl* and pretrain_en*.jsonl*; the documents are pieces of 500 characters of it. Time
is CPU time of one process on one core, from the file to the list of duplicates, exact and near. The peer does what its
documentation shows for the same sketch (18 bands of 7): sets of 5-grams in Python, MinHash, MinHashLSH, insert and
query; it reads no file and verifies nothing. Both run in turn, pair by pair. `pip install datasketch` for the peer.

Planted, each in a fifth of the documents: exact copies, copies with one character changed, with paragraphs in another
order, with 5 % of the tokens changed in one run, and with 5 % changed all over. Similarity is true Jaccard, from Python
sets of tuples. Recall: of planted pairs at 0.85 or more, those of which one was dropped. Precision: of the dropped,
those with a relative at 0.8 or more. Bytes per document: the growth of the peak of resident memory from N to 4 N.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.record import ratio, save, settings
from oriole.text.dedup import DedupConfig, find_duplicates
from oriole.text.files import expand
from oriole.text.formats import read_docs
from oriole.text.shingles import tokens

DEFAULTS = {
    "data": "", "docs": 20_000, "length": 500, "peer_docs": 1000, "planted": 5000, "runs": 3, "memory_docs": 25_000,
    "json": "",
}  # fmt: skip
CONFIG = DedupConfig()
KINDS = ("exact", "one character", "paragraphs", "5 % in a run", "5 % all over")


def main() -> None:
    """Measure and print."""
    chosen = settings(DEFAULTS)
    if not chosen["data"]:
        raise SystemExit("give a folder of pretrain_zh*.jsonl* and pretrain_en*.jsonl* as data=DATA")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for lang in ("zh", "en"):
            result[lang] = _language(lang, chosen, Path(folder) / lang)
    os.sched_setaffinity(0, cores)
    save("dedup", chosen | {"data": "DATA"}, result, str(chosen["json"]) or None)

    table = Table(title=f"near deduplication, documents of {chosen['length']} characters, one core")
    for column in ("", "documents/s", "datasketch", "ratio", "recall", "precision", "bytes a document"):
        table.add_column(column, justify="right" if column else "left")
    for lang, r in result.items():
        table.add_row(
            lang, f"{r['docs_per_second']:,.0f}", f"{r['peer_docs_per_second']:,.0f}", f"{r['ratio']['median']:.1f}",
            f"{r['recall']:.4f}", f"{r['precision']:.4f}", f"{r['bytes_per_doc']:.0f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    planted = Table(title="planted: found / pairs, by true similarity")
    for column in ("", *KINDS):
        planted.add_column(column, justify="right" if column else "left")
    for lang, r in result.items():
        for name, row in r["planted"].items():
            planted.add_row(f"{lang} {name}", *(f"{found}/{total}" if total else "" for found, total in row))
    console.print(planted)


def _language(lang: str, chosen: dict[str, Any], folder: Path) -> dict[str, Any]:
    folder.mkdir()
    most = max(int(chosen["docs"]), 4 * int(chosen["memory_docs"]), int(chosen["planted"]))
    texts = _pieces(Path(str(chosen["data"])), lang, int(chosen["length"]), most)
    ours, theirs = [], []
    some = texts[: int(chosen["docs"])]
    for run in range(int(chosen["runs"])):
        file = _write(folder / f"speed{run}.jsonl", some)
        start = time.process_time()
        find_duplicates([file], CONFIG, folder / f"speed{run}", workers=1)
        ours.append((time.process_time() - start) / len(some))
        start = time.process_time()
        if _peer(lang, texts[: int(chosen["peer_docs"])]):
            theirs.append((time.process_time() - start) / int(chosen["peer_docs"]))
    theirs = theirs or [float("nan")] * len(ours)
    return {
        "seconds_per_doc": ours,
        "peer_seconds_per_doc": theirs,
        "docs_per_second": 1 / statistics.median(ours),
        "peer_docs_per_second": 1 / statistics.median(theirs),
        "ratio": ratio(ours, theirs),
        "bytes_per_doc": _memory(texts, int(chosen["memory_docs"]), folder),
        **_quality(texts[: int(chosen["planted"])], folder),
    }


def _pieces(data: Path, lang: str, length: int, most: int) -> list[str]:
    texts = []
    for doc in read_docs(expand(data / f"pretrain_{lang}*.jsonl*")):
        for at in range(0, min(len(doc.text), 40 * length) - length + 1, length):
            texts.append(doc.text[at : at + length])
        if len(texts) >= 2 * most:
            break
    random.Random(0).shuffle(texts)
    return texts[:most]


def _write(path: Path, texts: Sequence[str]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text, "lang": "", "source": ""}, ensure_ascii=False) + "\n")
    return path


def _peer(lang: str, texts: Sequence[str]) -> bool:
    try:
        from datasketch import MinHash, MinHashLSH  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return False
    lsh = MinHashLSH(params=(CONFIG.bands, CONFIG.rows), num_perm=CONFIG.bands * CONFIG.rows)
    sketches = []
    for n, text in enumerate(texts):
        parts = text.split() if lang == "en" else text
        blank = " " if lang == "en" else ""
        shingles = {blank.join(parts[i : i + 5]) for i in range(max(len(parts) - 4, 1))}
        sketch = MinHash(num_perm=CONFIG.bands * CONFIG.rows)
        sketch.update_batch([s.encode() for s in shingles])
        lsh.insert(n, sketch)
        sketches.append(sketch)
    return all(lsh.query(sketch) for sketch in sketches)


MEASURE = """
import sys
from pathlib import Path
from oriole.text.dedup import DedupConfig, find_duplicates
find_duplicates([Path(sys.argv[1])], DedupConfig(), Path(sys.argv[2]), workers=1)
status = Path("/proc/self/status").read_text()  # not getrusage, which begins with the parent's peak
print(1024 * int(status.split("VmHWM:")[1].split()[0]))
"""


def _memory(texts: Sequence[str], docs: int, folder: Path) -> float:
    """Growth of the peak in bytes a document; a tenth of the documents have near duplicates."""
    rng = random.Random(1)
    peaks = []
    for count in (docs, 4 * docs):
        some = list(texts[: count - count // 10])
        some += [_edited(text, "one character", rng) for text in rng.sample(some, count // 10)]
        file = _write(folder / f"memory{count}.jsonl", some)
        words = [sys.executable, "-c", MEASURE, str(file), str(folder / f"memory{count}")]
        peaks.append(int(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
    return (peaks[1] - peaks[0]) / (3 * docs)


# --- planted duplicates ----------------------------------------------------------------------------------------------


def _quality(texts: Sequence[str], folder: Path) -> dict[str, Any]:
    """Recall, precision and (found, pairs) for each kind and similarity; no document has a twin before the planting."""
    rng = random.Random(2)
    file = _write(folder / "before.jsonl", texts)
    twins = find_duplicates([file], CONFIG, folder / "before", workers=1)[file]
    singles = [text for n, text in enumerate(texts) if n not in twins and len(tokens(text)) >= 5]
    rows = [(n, "", text) for n, text in enumerate(singles)]
    rows += [(n, kind, _edited(text, kind, rng)) for n, text in enumerate(singles) if (kind := KINDS[n % len(KINDS)])]
    rng.shuffle(rows)
    file = _write(folder / "planted.jsonl", [text for _, _, text in rows])
    dropped = find_duplicates([file], CONFIG, folder / "planted", workers=1)[file]

    members: dict[int, list[int]] = {}
    for place, (n, _, _) in enumerate(rows):
        members.setdefault(n, []).append(place)
    table = {name: [[0, 0] for _ in KINDS] for name in (">= 0.85", "0.80-0.85", "0.70-0.80", "< 0.70")}
    right = 0
    for a, b in members.values():
        similarity = _jaccard(rows[a][2], rows[b][2])
        found = a in dropped or b in dropped
        right += (a in dropped) + (b in dropped) if similarity >= CONFIG.threshold else 0
        limits = zip((0.85, 0.8, 0.7, 0.0), table, strict=True)
        cell = table[next(name for least, name in limits if similarity >= least)][KINDS.index(rows[a][1] or rows[b][1])]
        cell[0] += found
        cell[1] += 1
    high = table[">= 0.85"]
    return {
        "recall": sum(found for found, _ in high) / sum(total for _, total in high),
        "precision": right / len(dropped),
        "dropped": len(dropped),
        "planted": table,
    }


def _edited(text: str, kind: str, rng: random.Random) -> str:
    match kind:
        case "exact":
            return text
        case "one character":
            at = rng.randrange(len(text))
            return text[:at] + rng.choice("的一是不eato") + text[at + 1 :]
        case "paragraphs":
            parts = (
                text.split("\n")
                if text.count("\n") > 1
                else text.replace("。", "。\n").replace(". ", ".\n").split("\n")
            )
            rng.shuffle(parts)
            return "\n".join(parts)
    words = tokens(text)
    count = max(1, len(words) // 20)
    start = rng.randrange(len(words) - count + 1)
    places = range(start, start + count) if kind == "5 % in a run" else rng.sample(range(len(words)), count)
    for place in sorted(places, reverse=True):
        _, begin, end = words[place]
        text = text[:begin] + rng.choice(words)[0] + text[end:]
    return text


def _jaccard(a: str, b: str) -> float:
    left, right = (_grams([word for word, _, _ in tokens(text)]) for text in (a, b))
    return len(left & right) / len(left | right)


def _grams(words: list[str]) -> set[tuple[str, ...]]:
    n = CONFIG.size
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))}


if __name__ == "__main__":
    main()
