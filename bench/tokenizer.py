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
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
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
            shutil.rmtree(folder / name, ignore_errors=True)
            runs[name].append(_run(command))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    files = {"oriole": folder / "oriole" / "tokenizer.json"}
    if peer != "no":
        files["hf"] = folder / "hf" / "tokenizer.json" if peer == "hf" else Path(peer)
    quality = {name: _characters_per_token(path, folder) for name, path in files.items()}
    speed = _encoding_speed(folder)
    compared, different = _beside_llama(folder, int(chosen["lines"]))
    result: dict[str, Any] = {
        "runs": runs, "characters_per_token": quality, "encoding": speed,
        "llama": {"lines": compared, "different": different},
    }  # fmt: skip
    _print_training(runs, quality)
    _print_encoding(speed)
    Console().print(f"llama.cpp: {compared:,} held-out lines, {different:,} with other ids")
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


# --- encoding --------------------------------------------------------------------------------------------------------


def _encoding_speed(folder: Path, rounds: int = 3) -> dict[str, dict[str, list[float]]]:
    """Seconds to encode the held-out documents, and one long string, in turn: on one core, on all, and the peer's way.

    The peer is `tokenizers` with the same file, called as its documentation does.
    """
    import tokenizers

    from oriole.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "oriole")
    library = tokenizers.Tokenizer.from_file(str(folder / "oriole" / "tokenizer.json"))
    out: dict[str, dict[str, list[float]]] = {}
    for lang in LANGUAGES:
        texts = list(_texts(folder / f"heldout-{lang}.jsonl"))
        for what, batch in ((f"{lang}, documents", texts), (f"{lang}, one string", ["".join(texts)[:2_000_000]])):
            ways: dict[str, Callable[[], object]] = {
                "one core": partial(_on_one_core, partial(tokenizer.encode_batch, batch)),
                "all cores": partial(tokenizer.encode_batch, batch),
                "tokenizers": partial(_ids, library, batch),
            }
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(rounds):
                for way, encode in ways.items():
                    start = time.perf_counter()
                    encode()
                    seconds[way].append(time.perf_counter() - start)
            seconds["characters"] = [float(sum(map(len, batch)))]
            out[what] = seconds
    return out


def _on_one_core(encode: Callable[[], object]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encode()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"


def _ids(library: Any, batch: list[str]) -> list[list[int]]:
    return [e.ids for e in library.encode_batch(batch, add_special_tokens=False)]


def _beside_llama(folder: Path, lines: int) -> tuple[int, int]:
    """How many held-out lines were compared, and on how many llama.cpp gives other ids."""
    if not lines:
        return 0, 0
    from bench.llama import serve, write_gguf
    from oriole.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "oriole")
    path = folder / "vocabulary.gguf"
    write_gguf(tokenizer, path)
    chosen = _lines(folder, lines)
    with serve(path) as llama:
        different = sum(
            llama.tokenize(text) != ids for text, ids in zip(chosen, tokenizer.encode_batch(chosen), strict=True)
        )
    return len(chosen), different


EMOJI = ("🎉", "👋🏽", "👩‍👩‍👧‍👦", "🇨🇳", "❤️‍🔥", " 😀", "😂😂", "1️⃣")
OLD = ("classical", "vernacular", "poetry")


def _lines(folder: Path, count: int) -> list[str]:
    """Held-out lines: a fifth each of old Chinese, code, and text with emoji put in; half of the others are three."""
    rng = random.Random(0)
    kinds: dict[str, list[str]] = {"old": [], "code": [], "emoji": [], "other": []}
    for lang in LANGUAGES:
        with (folder / f"heldout-{lang}.jsonl").open(encoding="utf-8") as file:
            docs = [json.loads(line) for line in file]
        for doc in docs:
            lines = doc["text"].splitlines(keepends=True)
            for n, line in enumerate(lines):
                line = line[:2000]
                if not line.strip():
                    continue
                if doc["source"] in OLD:
                    kinds["old"].append(line)
                elif sum(line.count(c) for c in "{}[]();=<>_|`") > 4:
                    kinds["code"].append(line)
                elif rng.random() < 0.3:
                    at = rng.randrange(len(line))
                    kinds["emoji"].append(line[:at] + rng.choice(EMOJI) + line[at:])
                else:
                    kinds["other"].append("".join([line, *lines[n + 1 : n + 1 + rng.choice((0, 2))]]))
    out: list[str] = []
    for kind, share in (("old", 0.2), ("code", 0.2), ("emoji", 0.2)):
        out += rng.sample(kinds[kind], min(len(kinds[kind]), int(count * share)))
    return out + rng.sample(kinds["other"], min(len(kinds["other"]), count - len(out)))


def _print_encoding(speed: dict[str, dict[str, list[float]]]) -> None:
    table = Table(title="encoding, million characters a second (median)")
    for column in ("", "one core", "all cores", "tokenizers"):
        table.add_column(column, justify="right" if column else "left")
    for what, seconds in speed.items():
        rates = (
            seconds["characters"][0] / statistics.median(seconds[w]) / 1e6
            for w in ("one core", "all cores", "tokenizers")
        )
        table.add_row(what, *(f"{rate:.2f}" for rate in rates))
    Console().print(table)


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
