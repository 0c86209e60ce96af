"""How many tokens an optimizer needs for what AdamW reaches: validation bits per byte over real runs of the trainer.

    oriole data pack DATA out=shards …
    python -m bench.optim data=shards tokens=4.5e6 seeds=3 optimizers=adamw,muon,normuon
    python -m bench.optim data=shards tokens=4.5e6 optimizers=adamw,muon budgets=1,0.8

`data` is a folder that `oriole data pack` has made, with held-out documents and the tokenizer in it. Every optimizer
runs its learning rates (`lrs` for adamw and adafactor, `muon_lrs` for the matrices of muon and normuon, whose other
parameters take `rest_lr`) with the first seed, and the best of them with the other seeds. "muon-ns" is muon with
Newton–Schulz, "-cautious" adds cautious weight decay. A finished run is a line of `out` and is not run again.

The ratio is tokens over AdamW's tokens, seed by seed. With more than one budget (shares of `tokens`, for all but adamw)
it is where the final bits per byte of these runs, each with its whole schedule, cross AdamW's final ones. With one it
is where the curve crosses them: too high, for the learning rate has not come down there yet.

The warmup is long for the sake of AdamW: with 2 of 98 steps and 4e-3 it stayed at 4.48 bits per byte, with 20 of 98 and
2e-3 it came to 3.67 (Muon, 2 of 98: 2.07), and a comparison with a crippled AdamW is none.
"""

import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.blocks import student
from bench.record import RESULTS, device_name, settings
from oriole.config import validate
from oriole.errors import OrioleError
from oriole.model.config import preset
from oriole.text.shards import Shards
from oriole.train.recipe import Recipe
from oriole.train.stage import commit, run_stage

DEFAULTS = {
    "data": "", "tokens": 4.5e6, "seeds": 3, "optimizers": "adamw,muon,normuon", "lrs": "2e-3,4e-3,8e-3",
    "muon_lrs": "0.01,0.02,0.04", "rest_lr": 4e-3, "budgets": "1", "preset": "demo", "batch": 16, "seq": 256,
    "weight_decay": 0.1, "schedule": "cosine", "min_lr": 0.05, "warmup": 0.1, "evals": 30, "eval_tokens": 50_000,
    "device": "auto", "compile": "auto", "work": "", "out": "",
}  # fmt: skip

Run = dict[str, Any]


def main() -> None:
    """Run what is not there yet and print what came out."""
    chosen = settings(DEFAULTS)
    if not chosen["data"]:
        raise SystemExit("python -m bench.optim data=FOLDER (made by `oriole data pack`)")
    out = Path(str(chosen["out"])) if chosen["out"] else RESULTS / f"optim-{device_name()}.jsonl"
    try:
        runs = _all_runs(chosen, out)
    except OrioleError as error:
        raise SystemExit(f"bench.optim: {error}") from error
    _show(runs, chosen)


def _all_runs(chosen: dict[str, Any], out: Path) -> dict[str, list[Run]]:
    """By optimizer: its runs at the best learning rate, all seeds and budgets."""
    runs: dict[str, list[Run]] = {}
    for name in _words(chosen["optimizers"]):
        muon = name.partition("-")[0] in ("muon", "normuon")
        rates = [float(word) for word in _words(chosen["muon_lrs"] if muon else chosen["lrs"])]
        budgets = [1.0] if name == "adamw" else [float(word) for word in _words(chosen["budgets"])]
        grid = [_one(chosen, out, name, rate, 1, max(budgets)) for rate in rates]
        rate = min(zip(grid, rates, strict=True), key=lambda pair: pair[0]["final"])[1]
        seeds = range(1, int(chosen["seeds"]) + 1)
        runs[name] = [_one(chosen, out, name, rate, seed, budget) for budget in budgets for seed in seeds]
    return runs


def _one(chosen: dict[str, Any], out: Path, name: str, rate: float, seed: int, budget: float) -> Run:
    """One run, from `out` or made now and appended to it."""
    shards = Shards.open(Path(str(chosen["data"])))
    same = ("preset", "batch", "seq", "weight_decay", "schedule", "min_lr", "warmup", "eval_tokens")
    identity = {
        "optimizer": name, "rate": rate, "rest_lr": chosen["rest_lr"], "seed": seed,
        "tokens": int(budget * float(chosen["tokens"])), "data": shards.fingerprint,
        **{key: chosen[key] for key in same},
    }  # fmt: skip
    for line in out.read_text(encoding="utf-8").splitlines() if out.exists() else ():
        found: Run = json.loads(line)
        if found["identity"] == identity:
            return found | {"budget": budget}
    work = Path(str(chosen["work"]) or Path(tempfile.gettempdir()) / "oriole-bench-optim")
    folder = work / f"{name}-{rate:g}-{seed}-{identity['tokens']}"
    recipe = _recipe(chosen, identity, shards, folder)
    start = time.monotonic()
    done = run_stage(recipe)
    lines = (recipe.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evals = [record for record in map(json.loads, lines) if record["event"] == "eval"]
    step = recipe.train.batch_size * recipe.train.length
    curve = [[e["step"] * step, round(statistics.fmean(e["bpb"].values()), 5), e["bpb"]] for e in evals]
    run: Run = {
        "identity": identity,
        "final": curve[-1][1],
        "curve": curve,
        "seconds": done["seconds"],
        "tokens_per_second": done["tokens_per_second"],
        "device": done["device"],
        "wall_seconds": round(time.monotonic() - start, 1),
        "commit": commit(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")
    shutil.rmtree(folder)
    return run | {"budget": budget}


def _recipe(chosen: dict[str, Any], identity: Run, shards: Shards, folder: Path) -> Recipe:
    base, *flags = str(identity["optimizer"]).split("-")
    if unknown := set(flags) - {"ns", "cautious"}:
        raise SystemExit(f"{identity['optimizer']}: unknown {', '.join(sorted(unknown))}; known: -ns, -cautious")
    muon = base in ("muon", "normuon")
    packed = str(chosen["data"])
    langs = [lang for lang in shards.langs if lang in ("zh", "en")]
    batch, length = int(chosen["batch"]), int(chosen["seq"])
    shape = preset(str(chosen["preset"]), context=max(length, preset(str(chosen["preset"])).context))
    steps = math.ceil(identity["tokens"] / (batch * length))
    table = {
        "stage": "pretrain",
        "run": str(folder),
        "model": shape.model_dump(),
        "parts": {lang: {"shards": packed, "lang": lang} for lang in langs} or {"text": {"shards": packed}},
        "train": {
            "tokens": identity["tokens"],
            "batch_size": batch,
            "length": length,
            "optimizer": base,
            "orthogonalise": "newton-schulz" if "ns" in flags else "polar-express",
            "cautious": "cautious" in flags,
            "lr": identity["rest_lr"] if muon else identity["rate"],
            "seed": identity["seed"],
            "device": chosen["device"],
            "compile": chosen["compile"],
            **({"muon_lr": identity["rate"]} if muon else {}),
            **{key: chosen[key] for key in ("weight_decay", "schedule", "min_lr", "warmup")},
        },
        "eval": {"every": max(1, steps // int(chosen["evals"])), "tokens": int(chosen["eval_tokens"]), "prompts": []},
        "checkpoint": {"every": max(1, steps // 4), "keep": 1},
    }
    return validate(Recipe, table, "bench.optim")


def _words(value: Any) -> list[str]:
    """ "a,b" -> ["a", "b"]; one number or a list is taken as it is."""
    return [str(word).strip() for word in (value if isinstance(value, list) else str(value).split(","))]


# --- reading ---------------------------------------------------------------------------------------------------------


def _show(runs: dict[str, list[Run]], chosen: dict[str, Any]) -> None:
    table = Table(title=f"{chosen['preset']}, {float(chosen['tokens']):.3g} tokens, {chosen['seeds']} seeds")
    for column in ("optimizer", "best rate", "bits per byte", "tokens/s", "tokens of AdamW's (95 % interval)"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    goals = {run["identity"]["seed"]: run["final"] for run in runs.get("adamw", [])}
    for name, own in runs.items():
        whole = [run for run in own if run["budget"] == max(r["budget"] for r in own)]
        finals = [run["final"] for run in whole]
        spread = f" ± {statistics.stdev(finals):.3f}" if len(finals) > 1 else ""
        ratios = [_ratio([r for r in own if r["identity"]["seed"] == seed], goal) for seed, goal in goals.items()]
        # Reached by the smallest budget already: who knows how much smaller it could have been.
        bound = "at most " if min(r["budget"] for r in own) in ratios else ""
        table.add_row(
            name,
            f"{whole[0]['identity']['rate']:g}",
            f"{statistics.fmean(finals):.3f}{spread}",
            f"{statistics.fmean(run['tokens_per_second'] for run in whole):,.0f}",
            "1" if name == "adamw" else bound + interval(ratios),
        )
    Console().print(table)


def _ratio(own: Sequence[Run], goal: float) -> float:
    """Share of AdamW's tokens at which the runs of one seed reach `goal`; infinite where they do not."""
    if len(own) == 1:
        whole = own[0]["curve"][-1][0]
        points = [(own[0]["budget"] * tokens / whole, bpb) for tokens, bpb, _ in own[0]["curve"] if tokens]
    else:
        points = sorted((run["budget"], run["final"]) for run in own)
    return crossing(points, goal)


def crossing(points: Sequence[tuple[float, float]], goal: float) -> float:
    """Where a falling curve first is at or below `goal`, straight in log x between its points (x, y)."""
    for i, (x, y) in enumerate(points):
        if y <= goal:
            if i == 0:
                return x
            before, high = points[i - 1]
            share = (high - goal) / (high - y)
            return math.exp(math.log(before) + share * (math.log(x) - math.log(before)))
    return math.inf


def interval(ratios: Sequence[float]) -> str:
    """Geometric mean with the 95 % interval of Student's t, of the logarithms."""
    if not ratios:
        return "no adamw to compare with"
    if math.inf in ratios:
        return f"not reached with {ratios.count(math.inf)} of {len(ratios)} seeds"
    logs = [math.log(ratio) for ratio in ratios]
    mean = math.exp(statistics.fmean(logs))
    if len(logs) == 1:
        return f"{mean:.2f} (one seed)"
    factor = math.exp(student(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs)))
    return f"{mean:.2f} ({mean / factor:.2f} … {mean * factor:.2f})"


if __name__ == "__main__":
    main()
