"""What each model preset costs, as tables in docs/presets.md and its Chinese twin.

    python -m bench.presets          writes them anew: sizes from the shapes, speeds from bench/results/*.jsonl

tests/test_presets.py holds the sizes to what this says, and each speed to a record that exists.
"""

import json
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.record import RESULTS
from oriole.log import duration, human
from oriole.model.config import PRESETS, ModelConfig
from oriole.model.costs import flops_per_token, kv_cache_bytes, training_memory

ROOT = Path(__file__).parents[1]
PAGES = {"en": ROOT / "docs" / "presets.md", "zh": ROOT / "docs" / "presets.zh.md"}
RECIPES = ROOT / "src" / "oriole" / "recipes"

BATCH, LENGTH = 8, 512
"""The batch that the table's training memory is for."""

START, END = "<!-- generated: python -m bench.presets -->", "<!-- end -->"

WORDS = {
    "en": {
        "preset": "preset", "parameters": "parameters", "context": "context", "flops": "GFLOP per token",
        "training": f"training memory, {BATCH} × {LENGTH}", "bf16": "weights bf16", "fp32": "weights fp32",
        "cache": "KV cache of a full context", "sizes": "Calculated", "speeds": "Measured", "device": "device",
        "rate": "training tokens/s", "batch": "batch", "mfu": "MFU", "memory": "peak memory",
        "recipe": "the recipe's pretraining", "one": "decoding tokens/s, one user", "many": "several in all (users)",
        "when": "date, commit", "loaded": "\\* other work ran on the machine.", "none": "Nothing was measured yet.",
    },
    "zh": {
        "preset": "预设", "parameters": "参数量", "context": "上下文", "flops": "每个词元 GFLOP",
        "training": f"训练内存，{BATCH} × {LENGTH}", "bf16": "权重 bf16", "fp32": "权重 fp32",
        "cache": "满上下文的 KV 缓存", "sizes": "计算值", "speeds": "实测值", "device": "设备",
        "rate": "训练 词元/秒", "batch": "批", "mfu": "MFU", "memory": "内存峰值",
        "recipe": "配方的预训练", "one": "解码 词元/秒，单用户", "many": "多用户合计（用户数）",
        "when": "日期、提交", "loaded": "\\* 当时机器上还有其他任务。", "none": "尚无实测数据。",
    },
}  # fmt: skip


def main() -> None:
    """Write the tables between the markers of both pages."""
    found = list(records())
    for language, page in PAGES.items():
        text = page.read_text(encoding="utf-8")
        before, after = text.partition(START)[0], text.partition(END)[2]
        page.write_text(before + generated(language, found) + after, encoding="utf-8")
        print(f"{page.relative_to(ROOT)} is written")


def generated(language: str, found: Sequence[Mapping[str, Any]]) -> str:
    """The text between the markers, markers included; `found` are the records."""
    words = WORDS[language]
    parts = [f"### {words['sizes']}", sizes(words), f"### {words['speeds']}", _speeds(words, found), END]
    return "\n".join([START, "\n\n".join(parts)])


def records() -> Iterator[dict[str, Any]]:
    """All records of training and decoding, with the device whose file they stand in."""
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record.get("case") in ("train", "decode") and record.get("settings", {}).get("preset") in PRESETS:
                yield record | {"machine": path.stem}


# --- calculated ------------------------------------------------------------------------------------------------------


def sizes(words: Mapping[str, str]) -> str:
    columns = ("preset", "parameters", "context", "flops", "training", "bf16", "fp32", "cache")
    return _table([words[c] for c in columns], [_size(name, shape) for name, shape in PRESETS.items()])


def _size(name: str, shape: ModelConfig) -> list[str]:
    parameters = shape.num_params()
    return [
        f"`{name}`",
        human(parameters),
        f"{shape.context:,}",
        f"{flops_per_token(shape, shape.context) / 1e9:.2g}",
        _bytes(sum(training_memory(shape, BATCH, LENGTH).values())),
        _bytes(2 * parameters),
        _bytes(4 * parameters),
        _bytes(kv_cache_bytes(shape, 1, shape.context)),
    ]


# --- measured --------------------------------------------------------------------------------------------------------


def _speeds(words: Mapping[str, str], found: Sequence[Mapping[str, Any]]) -> str:
    rows, loaded = [], False
    for name in PRESETS:
        for machine in sorted({record["machine"] for record in found}):
            training, decoding = (_newest(found, case, name, machine) for case in ("train", "decode"))
            if training or decoding:
                rows.append(_speed(name, machine, training, decoding))
                loaded |= _loaded(training) or _loaded(decoding)
    if not rows:
        return words["none"]
    columns = ("preset", "device", "rate", "batch", "mfu", "memory", "recipe", "one", "many", "when")
    table = _table([words[c] for c in columns], rows)
    return f"{table}\n\n{words['loaded']}" if loaded else table


def _newest(found: Sequence[Mapping[str, Any]], case: str, name: str, machine: str) -> dict[str, Any]:
    """The last record of that case, one of an idle machine before one of a loaded machine; {} when there is none."""
    mine = [r for r in found if (r["case"], r["settings"]["preset"], r["machine"]) == (case, name, machine)]
    return dict(max(mine, key=lambda r: (not _loaded(r), r["time"]), default={}))


def _loaded(record: Mapping[str, Any]) -> bool:
    """Whether more was running than the measurement itself, which makes a load of about its threads."""
    return (record.get("load") or 0) > record.get("threads", 0) + 0.5


def _star(record: Mapping[str, Any]) -> str:
    return " \\*" if _loaded(record) else ""


def _speed(name: str, machine: str, training: Mapping[str, Any], decoding: Mapping[str, Any]) -> list[str]:
    settings = training.get("settings", {})
    rate = training.get("tokens_per_second")
    decoded = decoding.get("tokens_per_second", {})
    tokens = _recipe_tokens(name)
    newest = max((r for r in (training, decoding) if r), key=lambda r: r["time"])
    return [
        f"`{name}`",
        machine,
        f"{rate:,.0f}{_star(training)}" if rate else "",
        f"{settings['batch']} × {settings['seq']}" if rate else "",
        f"{training['mfu']:.2f}" if training.get("mfu") else "",
        _bytes(training["peak_memory_bytes"]) if training.get("peak_memory_bytes") else "",
        f"{human(tokens)}: {_time(tokens / rate)}" if rate and tokens else "",
        _rate(decoded.get("one")),
        f"{_rate(decoded['many'])} ({decoding['settings']['users']}){_star(decoding)}" if decoded.get("many") else "",
        f"{newest['time'][:10]}, {newest['commit'][:7]}",
    ]


def _rate(samples: Sequence[float] | None) -> str:
    return f"{statistics.median(samples):,.0f}" if samples else ""


def _recipe_tokens(name: str) -> float:
    """Training tokens of the built-in pretraining recipe for that preset, 0 when there is none."""
    path = RECIPES / name / "pretrain.toml"
    if not path.exists():
        return 0
    recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    return float(recipe["train"].get("tokens", 0)) if recipe.get("model") == name else 0


# --- words -----------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _time(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours / 24:.1f} d" if hours >= 48 else f"{hours:.0f} h" if hours >= 10 else duration(seconds)


def _bytes(n: float) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
