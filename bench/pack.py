"""`oriole data pack` beside the path of a training stage, which tokenises in one process: tokens a second.

    python -m bench.pack data=DATA tokenizer=DIR docs=300 rounds=7
    python -m bench.pack data=DATA tokenizer=DIR workers=1,2,4

Every side packs the same files, the first `docs` documents of each pretrain_*.jsonl* in DATA, into an empty folder, in
a process of its own whose start is counted; the sides take turns. "stage" reads, normalises and writes on one core and
encodes on all; "pack" does all of it in each of its workers.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.record import ratio, save, settings
from oriole.text.files import values
from oriole.text.formats import expand
from oriole.text.shards import Shards

DEFAULTS = {"data": "", "tokenizer": "", "docs": 300, "workers": "", "rounds": 7, "json": ""}


def main() -> None:
    """Measure and print."""
    chosen = settings(DEFAULTS)
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
    for column in ("", "M tokens/s", "times as fast"):
        table.add_column(column, justify="right" if column else "left")
    for side, some in runs.items():
        rate = statistics.median(run["tokens"] / run["seconds"] for run in some) / 1e6
        told = "" if side == "stage" else "{median:.2f} ({low:.2f} to {high:.2f})".format(**faster[side])
        table.add_row(side, f"{rate:.2f}", told)
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


def _run(side: str, folder: Path, tokenizer: str) -> dict[str, float]:
    shutil.rmtree(folder / "out", ignore_errors=True)
    places = [str(folder / "in"), str(folder / "out")]
    command = [sys.executable, "-c", STAGE, *places, tokenizer]
    if side != "stage":
        settings = [f"tokenizer={tokenizer}", "heldout=0", f"workers={side.removeprefix('pack')}"]
        command = [sys.executable, "-m", "oriole.cli", "data", "pack", *places, *settings]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return {"seconds": time.perf_counter() - start, "tokens": Shards.open(folder / "out").num_tokens}


STAGE = """
import sys
from dataclasses import replace
from oriole.text.clean import normalise
from oriole.text.formats import expand, read_docs
from oriole.text.shards import encode_docs, write_shards
from oriole.text.tokenizer import Tokenizer

tok = Tokenizer.load(sys.argv[3])
docs = (replace(doc, text=normalise(doc.text)) for doc in read_docs(expand(sys.argv[1])))
write_shards(encode_docs(docs, tok), tok, sys.argv[2])
"""
"""What `train.prepare` does to the text of a pretraining stage."""


if __name__ == "__main__":
    main()
