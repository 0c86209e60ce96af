"""Training a tokenizer beside Hugging Face `tokenizers`: seconds, peak memory, and characters per token held out.

    python -m bench.tokenizer data=DATA chars=60e6 vocab=16384
    python -m bench.tokenizer data=DATA chars=3e6 vocab=4096 peer=no lines=500

Both learn from the same JSON lines, `chars` characters of each language, in a process of their own; the peer counts all
of them, cut by the same Qwen2 regex, Oriole the sample that its command takes. Held-out documents come from the last
file of each language, which neither has seen. `peer=FILE` compares with a tokenizer.json trained before.
Then: characters a second of batch encoding on one and on all cores, and ids beside llama.cpp's on `lines` held-out
lines. `folder=` keeps the prepared text and the tokenizers.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.record import save, settings

DEFAULTS = {
    "data": "", "chars": 60e6, "vocab": 16_384, "heldout": 400, "lines": 10_000, "peer": "hf", "folder": "",
    "sample_mb": 0, "rounds": 1, "child": "", "json": "",
}  # fmt: skip

LANGUAGES = ("zh", "en")


def main() -> None:
    """Measure and print."""
    chosen = settings(DEFAULTS)
    if chosen["child"]:
        _train_hf(Path(str(chosen["folder"])), int(chosen["vocab"]))
        return
    if not chosen["data"]:
        raise SystemExit("name the text with data=DATA, a folder with pretrain_zh_*.jsonl* and pretrain_en_*.jsonl*")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(str(chosen["folder"]) or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        _measure(chosen, folder)


def _measure(chosen: dict[str, Any], folder: Path) -> None:
    _prepare(Path(str(chosen["data"])), int(chosen["chars"]), int(chosen["heldout"]), folder)
    vocab, peer = int(chosen["vocab"]), str(chosen["peer"])
    ours = [sys.executable, "-m", "oriole.cli", "tokenizer", "train", *(str(folder / f"{x}.jsonl") for x in LANGUAGES)]
    ours += [f"out={folder / 'oriole'}", f"vocab_size={vocab}"]
    if chosen["sample_mb"]:
        ours.append(f"sample_mb={chosen['sample_mb']}")
    theirs = [sys.executable, "-m", "bench.tokenizer", "child=hf", f"folder={folder}", f"vocab={vocab}"]
    commands = {"oriole": ours} | ({"hf": theirs} if peer == "hf" else {})
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(int(chosen["rounds"])):
        for name, command in commands.items():
            runs[name].append(_run(command))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    files = {"oriole": folder / "oriole" / "tokenizer.json"}
    if peer != "no":
        files["hf"] = folder / "hf" / "tokenizer.json" if peer == "hf" else Path(peer)
    quality = {name: _characters_per_token(path, folder) for name, path in files.items()}
    result: dict[str, Any] = {"runs": runs, "characters_per_token": quality}
    _print_training(runs, quality)
    save(
        "tokenizer",
        {k: v for k, v in chosen.items() if k not in ("data", "folder", "json")},
        result,
        str(chosen["json"]) or None,
    )


# --- the text --------------------------------------------------------------------------------------------------------


def _prepare(data: Path, chars: int, heldout: int, folder: Path) -> None:
    """`zh.jsonl`, `en.jsonl`: the first `chars` characters; `heldout-*.jsonl`: documents spread over the last file."""
    from oriole.text.formats import expand, read_docs

    mark = folder / "prepared.json"
    wanted = {"chars": chars, "heldout": heldout}
    if mark.exists() and json.loads(mark.read_text()) == wanted:
        return
    for lang in LANGUAGES:
        *train, last = expand([f"pretrain_{lang}_*.jsonl*"], data)
        left = chars
        with (folder / f"{lang}.jsonl").open("w", encoding="utf-8") as file:
            for doc in read_docs(train):
                text = doc.text[:left]
                left -= len(text)
                file.write(json.dumps({"text": text, "source": doc.source}, ensure_ascii=False) + "\n")
                if not left:
                    break
            else:
                raise SystemExit(f"only {chars - left:,} characters of {lang} before the last file; set chars lower")
        docs = list(read_docs([last]))
        with (folder / f"heldout-{lang}.jsonl").open("w", encoding="utf-8") as file:
            for doc in docs[:: max(1, len(docs) // heldout)][:heldout]:
                file.write(json.dumps({"text": doc.text, "source": doc.source}, ensure_ascii=False) + "\n")
    mark.write_text(json.dumps(wanted))


def _texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


# --- training --------------------------------------------------------------------------------------------------------


def _run(command: list[str]) -> dict[str, float]:
    """Seconds (wall and processor) and peak resident memory in GB of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed; run it by itself to see why")
    scale = 1 if sys.platform == "darwin" else 1024
    return {"seconds": wall, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_gb": usage.ru_maxrss * scale / 1e9}


def _train_hf(folder: Path, vocab: int) -> None:
    """What a user of `tokenizers` writes: the same regex, all of the text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from oriole.text.tokenizer import QWEN2_REGEX, RESERVED

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(RESERVED), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    model.train_from_iterator((text for lang in LANGUAGES for text in _texts(folder / f"{lang}.jsonl")), trainer)
    (folder / "hf").mkdir(exist_ok=True)
    model.save(str(folder / "hf" / "tokenizer.json"))


def _characters_per_token(path: Path, folder: Path) -> dict[str, float]:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    out = {}
    for lang in LANGUAGES:
        texts = list(_texts(folder / f"heldout-{lang}.jsonl"))
        tokens = sum(len(e.ids) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        out[lang] = sum(map(len, texts)) / tokens
    return out


def _print_training(runs: dict[str, list[dict[str, float]]], quality: dict[str, dict[str, float]]) -> None:
    table = Table(title="training a tokenizer")
    for column in ("", "seconds", "processor s", "peak GB", *(f"characters a token, {x}" for x in LANGUAGES)):
        table.add_column(column, justify="right" if column else "left")
    for name, figures in quality.items():
        cells = ["", "", ""]
        if runs.get(name):
            best = min(runs[name], key=lambda r: r["seconds"])
            cells = [f"{best['seconds']:.1f}", f"{best['cpu_seconds']:.1f}", f"{best['peak_gb']:.2f}"]
        table.add_row(name, *cells, *(f"{figures[x]:.4f}" for x in LANGUAGES))
    Console().print(table)


if __name__ == "__main__":
    main()
