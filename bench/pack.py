"""`oriole data pack` beside the path of a training stage, which tokenises in one process: tokens a second.

    python -m bench.pack data=DATA tokenizer=DIR docs=300 rounds=7
    python -m bench.pack data=DATA tokenizer=DIR workers=1,2,4

Every side packs the same files, the first `docs` documents of each pretrain_*.jsonl* in DATA, into an empty folder, in
a process of its own; the sides take turns. "stage" reads, normalises and writes on one core and encodes on all; "pack"
does all of it in each of its workers. Processor seconds are those of the process and its children.
"""

import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.record import ratio, save, settings
from oriole.text.clean import normalise
from oriole.text.files import values
from oriole.text.formats import expand, read_docs
from oriole.text.pack import PackConfig, pack
from oriole.text.shards import encode_docs, write_shards
from oriole.text.tokenizer import Tokenizer

DEFAULTS = {"data": "", "tokenizer": "", "docs": 300, "workers": "", "rounds": 7, "child": "", "json": ""}


def main() -> None:
    """Measure and print."""
    chosen = settings(DEFAULTS)
    if chosen["child"]:
        _child(str(chosen["child"]), Path(str(chosen["data"])), Path(str(chosen["tokenizer"])))
        return
    if not chosen["data"] or not chosen["tokenizer"]:
        raise SystemExit("name data=DATA, a folder with pretrain_*.jsonl*, and tokenizer=DIR")
    workers = str(chosen["workers"] or os.cpu_count()).split(",")
    sides = ["stage", *(f"pack{n}" for n in workers)]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        files = _slices(Path(str(chosen["data"])), int(chosen["docs"]), Path(folder) / "in")
        for _ in range(int(chosen["rounds"])):
            for side in sides:
                runs[side].append(_run(side, Path(folder), str(chosen["tokenizer"])))
                print(side, runs[side][-1], file=sys.stderr, flush=True)
    seconds = {side: [run["seconds"] for run in some] for side, some in runs.items()}
    faster = {side: ratio(some, seconds["stage"]) for side, some in seconds.items() if side != "stage"}
    table = Table(title=f"packing {files} files, median of {chosen['rounds']}")
    for column in ("", "M tokens/s", "M tokens a processor second", "times as fast"):
        table.add_column(column, justify="right" if column else "left")
    for side, some in runs.items():
        rates = (
            statistics.median(run["tokens"] / run[key] for run in some) / 1e6 for key in ("seconds", "cpu_seconds")
        )
        told = "" if side == "stage" else "{median:.2f} ({low:.2f} to {high:.2f})".format(**faster[side])
        table.add_row(side, *(f"{rate:.2f}" for rate in rates), told)
    Console().print(table)
    save("pack", chosen | {"data": "DATA", "tokenizer": "DIR"}, {"runs": runs, "faster": faster}, str(chosen["json"]))


def _slices(data: Path, docs: int, folder: Path) -> int:
    """The first `docs` documents of each file, unpacked; how many files."""
    folder.mkdir()
    files = expand("pretrain_*.jsonl*", data)
    for n, path in enumerate(files):
        with (folder / f"{n:02d}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(v, ensure_ascii=False) + "\n" for _, v in itertools.islice(values(path), docs))
    return len(files)


def _run(side: str, folder: Path, tokenizer: str) -> dict[str, Any]:
    shutil.rmtree(folder / "out", ignore_errors=True)
    words = [f"child={side}", f"data={folder}", f"tokenizer={tokenizer}"]
    done = subprocess.run([sys.executable, "-m", "bench.pack", *words], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _child(side: str, folder: Path, tokenizer: Path) -> None:
    start = time.perf_counter()
    if side == "stage":
        tok = Tokenizer.load(tokenizer)
        docs = (replace(doc, text=normalise(doc.text)) for doc in read_docs(expand(folder / "in")))
        tokens = write_shards(encode_docs(docs, tok), tok, folder / "out").num_tokens
    else:
        config = PackConfig(tokenizer=tokenizer, heldout=0, workers=int(side.removeprefix("pack")))
        tokens = pack([folder / "in"], folder / "out", config)["tokens"]
    seconds = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(u.ru_utime + u.ru_stime for u in used)
    print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu}))


if __name__ == "__main__":
    main()
