"""Whether a small model learns more from a larger one and the data than from the data alone, at equal tokens.

    python -m bench.distill teacher=runs/demo/sft/model out=/tmp/distill seeds=3
    python -m bench.distill teacher=runs/demo/sft/model out=/tmp/distill seeds=1 sides=sft,forward json=/tmp/d.json

The teacher is a chat model trained on the built-in corpus (`oriole demo`). The student is smaller and has the teacher's
tokenizer. For each seed it is pretrained once, as the recipe demo/pretrain says; from there every side fine-tunes it by
the recipe demo/sft, with the same data, order, steps and learning rate: `sft` on the data alone, the others with a
teacher (stage distill; keys of its table below). The table: bits per byte of held-out dialogues, exact match on the
held-out questions, KL of the last steps, seconds; mean over the seeds and their range. What is there already in `out`
is used again.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.record import save, settings
from oriole.apps.api import Oriole
from oriole.apps.evaluate import evaluate_questions, read_questions
from oriole.cli import RECIPES
from oriole.config import read_toml, validate
from oriole.demo.corpus import write_corpus
from oriole.log import console
from oriole.train.recipe import Recipe
from oriole.train.stage import run_stage

DEFAULTS = {
    "teacher": "", "out": "", "seeds": 3, "model": "d128", "pretrain_tokens": 1.75e6, "tokens": 1.25e6, "batch": 12,
    "sides": "", "device": "cpu", "json": "",
}  # fmt: skip

SIDES: dict[str, dict[str, Any] | None] = {
    "sft": None,
    "forward": {"lm_weight": 0.5},
    "teacher only": {"lm_weight": 0.0},
    "reverse": {"divergence": "reverse", "lm_weight": 0.5},
    "tau 2": {"temperature": 2.0, "lm_weight": 0.5},
    "top 32": {"top_k": 32, "lm_weight": 0.5},
}
"""By name: keys of the table [distill]; None: no teacher."""


def main() -> None:
    """Train, measure and print."""
    chosen = settings(DEFAULTS)
    if not chosen["teacher"] or not chosen["out"]:
        raise SystemExit("give teacher=FOLDER (a chat model of the built-in corpus) and out=FOLDER")
    names = [name for name in str(chosen["sides"]).split(",") if name] or list(SIDES)
    if unknown := set(names) - set(SIDES):
        raise SystemExit(f"no side {', '.join(sorted(unknown))}; known: {', '.join(SIDES)}")
    console.quiet = True  # the runs' own remarks
    out, teacher = Path(str(chosen["out"])), Path(str(chosen["teacher"]))
    data = out / "data"
    if not data.exists():
        write_corpus(data)
    results: dict[str, list[dict[str, float]]] = {"teacher": [_examined(teacher, data)]}
    for seed in range(int(chosen["seeds"])):
        start = out / f"seed-{seed}"
        run_stage(_recipe("pretrain", start, seed, data, teacher, chosen))
        for name in names:
            made = _tuned(name, start, seed, data, teacher, chosen)
            results.setdefault(name, []).append(made)
            print(f"seed {seed}, {name}: {made}", file=sys.stderr, flush=True)
    Console(width=150).print(_table(results))
    save("distill", chosen, {"runs": results}, str(chosen["json"]))


def _recipe(stage: str, run: Path, seed: int, data: Path, teacher: Path, chosen: dict[str, Any]) -> Recipe:
    """The demo's recipe of that stage for the student."""
    table = read_toml(RECIPES / "demo" / f"{stage}.toml")
    tokens = chosen["pretrain_tokens"] if stage == "pretrain" else chosen["tokens"]
    table["train"] |= {"seed": seed, "tokens": tokens, "batch_size": chosen["batch"], "device": chosen["device"]}
    table |= {"run": str(run), "data": str(data), "model": chosen["model"], "tokenizer": {"path": str(teacher)}}
    return validate(Recipe, table, f"demo/{stage}")


def _tuned(name: str, start: Path, seed: int, data: Path, teacher: Path, chosen: dict[str, Any]) -> dict[str, float]:
    """One side of one seed: its fine-tuning in a run of its own, from the seed's pretrained student."""
    recipe = _recipe("sft", start.with_name(f"{start.name}-{name.replace(' ', '-')}"), seed, data, teacher, chosen)
    change: dict[str, Any] = {"init": str(start / "pretrain" / "model")}
    if (table := SIDES[name]) is not None:
        change |= {"stage": "distill", "distill": {"teacher": str(teacher), **table}}
    recipe = validate(Recipe, recipe.model_dump(exclude_none=True) | change, name)
    done = run_stage(recipe)
    lines = (recipe.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [record for record in map(json.loads, lines) if record["event"] == "step"][-1]
    measured = {f"bpb {lang}": done["bpb"][lang] for lang in ("zh", "en")} | {"seconds": done["seconds"]}
    return measured | _examined(recipe.folder / "model", data) | ({"kl": last["kl"]} if "kl" in last else {})


def _examined(folder: Path, data: Path) -> dict[str, float]:
    """Exact match on the held-out questions, answered greedily, by language."""
    found = evaluate_questions(Oriole(folder), read_questions(data / "eval.jsonl"))["exact_match"]
    return {f"exact {lang}": found[lang] for lang in ("zh", "en")}


def _table(results: dict[str, list[dict[str, float]]]) -> Table:
    columns = ("bpb zh", "bpb en", "exact zh", "exact en", "kl", "seconds")
    table = Table("side", *columns, title="fine-tuning a small model, with and without a teacher")
    for name, runs in results.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs if column in run]
            shown = f"{statistics.mean(values):.4g}" if values else ""
            cells.append(shown + (f" ({min(values):.4g} … {max(values):.4g})" if len(values) > 1 else ""))
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    main()
