"""What each option of the architecture is worth: against the plain model, at equal training FLOPs, seed by seed.

    oriole data pack DATA out=shards …
    python -m bench.ablate data=shards              all that is not there yet; may be broken off and called again
    python -m bench.ablate data=shards options=LLLG,Gg seeds=5 corpora=real
    python -m bench.ablate data=shards seeds=1 everywhere=train.muon_lr=0.01     plain and options alike with these keys
    python -m bench.ablate table=true               the Markdown of docs/results.md, from the lines alone

Two corpora. `builtin`: a short pretraining and a short fine-tuning on the built-in world, by the demo's recipes; bits
per byte of held-out running text after the first, exact match of the held-out questions after the second (mean over
kinds, then over languages). `real`: pretraining on the folder `data`, which `oriole data pack` has made with held-out
documents in it; bits per byte of those.

An option takes as many steps as the FLOPs of the plain model's steps pay for (6 N + attention, and what is trained
beside the model): a dearer one sees fewer tokens. Everything else is the plain model's, its learning rates among it,
and the schedule always ends. Two runs with one seed read the same documents in the same order. A run is a process of
its own, so that its highest memory is its own, and one line of the file `json`; a line that is there is not run again.

The seeds are blocks: the intervals of the differences are those of a two-way layout without interaction, whose one
variance is estimated from all options together, (options - 1) (seeds - 1) degrees of freedom. With three seeds an
interval of each option's own three differences would be 2.1 times as wide; the price is the assumption that seeds
scatter alike whatever the option. 95 % each: of twenty options that are worth nothing, one will look as if it were.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.blocks import Difference, differences
from bench.record import RESULTS, device_name, settings, stamped
from oriole.apps.api import Oriole
from oriole.apps.evaluate import evaluate_questions, read_questions
from oriole.cli import RECIPES
from oriole.config import apply_overrides, parse_overrides, read_toml, validate
from oriole.demo.corpus import write_corpus
from oriole.errors import OrioleError
from oriole.log import console
from oriole.model.config import ModelConfig
from oriole.model.costs import flops_per_token, kv_cache_bytes, num_params
from oriole.text.pack import PackConfig, pack
from oriole.text.shards import Shards
from oriole.text.tokenizer import Tokenizer
from oriole.train.prepare import make_tokenizer
from oriole.train.probe import peak_rss
from oriole.train.recipe import Recipe
from oriole.train.stage import run_stage

DEFAULTS = {
    "data": "", "corpora": "", "options": "", "first_seed": 0, "seeds": 3, "preset": "demo", "tokens": 1.0e6,
    "batch": 16, "seq": 256, "pretrain_tokens": 6.0e5, "sft_tokens": 5.0e5, "sft_batch": 12, "sft_seq": 128,
    "eval_tokens": 20_000, "questions": 720, "vocab_size": 4096, "device": "auto", "compile": "auto", "work": "",
    "everywhere": "", "json": "", "table": False, "one": False,
}  # fmt: skip

SAME = {
    "builtin": ("preset", "pretrain_tokens", "sft_tokens", "sft_batch", "sft_seq", "eval_tokens", "questions",
                "vocab_size", "compile"),
    "real": ("preset", "tokens", "batch", "seq", "eval_tokens", "compile"),
}  # fmt: skip
"""Settings that two runs must share to be compared, by corpus."""

Line = dict[str, Any]


class Option(NamedTuple):
    """One row of the table."""

    what: str
    changes: Mapping[str, Any]
    """Keys of the recipe."""


def options(length: int) -> dict[str, Option]:
    """All rows, for rows of `length` tokens: a window is a quarter of that, as it would do nothing otherwise."""
    window = {"model.window": length // 4}
    return {
        "plain": Option("Qwen3", {}),
        "L": Option("windows of a quarter of a row", {"model.pattern": "L", **window}),
        "LLLG": Option("three windows, then all", {"model.pattern": "LLLG", **window}),
        "Gg": Option("gate per head", {"model.pattern": "Gg"}),
        "Gc": Option("gate per channel", {"model.pattern": "Gc"}),
        "Gt": Option("temperature from the query", {"model.pattern": "Gt"}),
        "Gs": Option("temperature from the length", {"model.pattern": "Gs"}),
        "Gr": Option("residual scale", {"model.pattern": "Gr"}),
        "Gz": Option("residual scale from zero", {"model.pattern": "Gz"}),
        "GGe": Option("experts in every third block", {"model.pattern": "GGe"}),
        "theta": Option("rotary base 10,000", {"model.rope_theta": 1e4}),
        "depths": Option("supervised after blocks 2 and 4", {"deep.depths": [2, 4]}),
        "ahead": Option("the token after the next one, too", {"deep.tokens_ahead": 2}),
        "think": Option("latent block, four iterations", {"model.reasoning.steps": 4}),
        "dropout": Option("residual dropout 0.1", {"train.dropout": 0.1}),
        "heads": Option("dropout of whole heads 0.1", {"train.head_dropout": 0.1}),
    }


# --- the arithmetic --------------------------------------------------------------------------------------------------


def equal_steps(plain_steps: int, plain_flops: float, flops: float) -> int:
    """Steps whose FLOPs are those of the plain model's steps, to half a step; at least one."""
    return max(1, round(plain_steps * plain_flops / flops))


# --- running ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run what is not there yet, and print the table."""
    chosen = settings(DEFAULTS)
    if chosen["one"]:
        print(json.dumps(_one(**json.load(sys.stdin))))
        return
    out = Path(str(chosen["json"])) if chosen["json"] else RESULTS / f"ablate-{device_name()}.jsonl"
    failed = [] if chosen["table"] else _all(chosen, out)
    print(markdown(_lines(out)))
    if failed:
        raise SystemExit(f"bench.ablate: {len(failed)} runs failed: {'; '.join(failed)}")


def _all(chosen: dict[str, Any], out: Path) -> list[str]:
    """Every run that has no line yet, seed by seed, so that whatever is there can be compared; those that failed."""
    work = Path(str(chosen["work"]) or Path(tempfile.gettempdir()) / "oriole-bench-ablate")
    todo = _todo(chosen, {json.dumps(line["identity"], sort_keys=True) for line in _lines(out)})
    if any(identity["corpus"] == "builtin" for identity in todo):
        _prepare(work, chosen)
    failed = []
    for number, identity in enumerate(todo, start=1):
        name = f"{identity['corpus']}, seed {identity['seed']}, {identity['option']}"
        start = time.monotonic()
        task = {"identity": identity, "chosen": chosen, "work": str(work)}
        done = subprocess.run(
            [sys.executable, "-m", "bench.ablate", "one=true"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            failed.append(f"{name} ({(done.stderr.strip().splitlines() or ['it said nothing'])[-1]})")
            print(f"{number} of {len(todo)}, {failed[-1]}", file=sys.stderr, flush=True)
            continue
        result = json.loads(done.stdout.splitlines()[-1]) | {"wall_seconds": round(time.monotonic() - start, 1)}
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        exact = f", exact match {_exact(result, ''):.3f}" if "exact_match" in result else ""
        said = f"bits per byte {result['bpb']}{exact}, {result['wall_seconds']} s"
        print(f"{number} of {len(todo)}, {name}: {said}", file=sys.stderr, flush=True)
    return failed


def _todo(chosen: dict[str, Any], there: set[str]) -> list[Line]:
    """What identifies each run that is asked for and not there."""
    corpora = _words(chosen["corpora"]) or ["builtin", *(["real"] if chosen["data"] else [])]
    if unknown := set(corpora) - SAME.keys():
        raise SystemExit(f"no corpus {', '.join(sorted(unknown))}; known: {', '.join(SAME)}")
    if "real" in corpora and not chosen["data"]:
        raise SystemExit("the corpus real is a folder that `oriole data pack` has made: data=FOLDER")
    todo = []
    first = int(chosen["first_seed"])
    for seed in range(first, first + int(chosen["seeds"])):
        for corpus in corpora:
            known = options(int(chosen["sft_seq" if corpus == "builtin" else "seq"]))
            names = _words(chosen["options"]) or list(known)
            if unknown := set(names) - known.keys():
                raise SystemExit(f"no option {', '.join(sorted(unknown))}; known: {', '.join(known)}")
            same = {key: chosen[key] for key in SAME[corpus]}
            if chosen["everywhere"]:
                same["everywhere"] = chosen["everywhere"]
            if corpus == "real":
                same["data"] = Shards.open(Path(str(chosen["data"]))).fingerprint
            for name in dict.fromkeys(["plain", *names]):
                changes = dict(known[name].changes)
                identity = {"corpus": corpus, "option": name, "changes": changes, "seed": seed, "settings": same}
                if json.dumps(identity, sort_keys=True) not in there:
                    todo.append(identity)
    return todo


def _words(value: Any) -> list[str]:
    """ "a,b" -> ["a", "b"]; a list is taken as it is."""
    words = value if isinstance(value, list) else str(value).split(",")
    return [str(word).strip() for word in words if str(word).strip()]


def _prepare(work: Path, chosen: dict[str, Any]) -> None:
    """The built-in corpus, its tokenizer and its shards, the same for all runs."""
    data = work / "data"
    if not data.exists():
        write_corpus(data)
    run = work / f"tokenizer-{chosen['vocab_size']}"
    table = read_toml(RECIPES / "demo" / "pretrain.toml") | {"run": str(run), "data": str(data)}
    table["tokenizer"] |= {"vocab_size": chosen["vocab_size"]}
    make_tokenizer(validate(Recipe, table, "demo/pretrain"), None)
    for stage in ("pretrain", "sft"):
        for lang in ("zh", "en"):
            name = f"{stage}_{lang}"
            kind = "text" if stage == "pretrain" else "chat"
            how = {"tokenizer": run / "tokenizer", "kind": kind, "heldout": 0.0, "workers": 1}
            pack([data / f"{name}.jsonl"], run / name, validate(PackConfig, how, "pack"))


# --- one run, in a process of its own --------------------------------------------------------------------------------


def _one(identity: Line, chosen: dict[str, Any], work: str) -> Line:
    """Train as `identity` says, measure, and give the line."""
    console.quiet = True
    try:
        with tempfile.TemporaryDirectory(prefix="run-", dir=_made(Path(work))) as run:
            result = _measured(identity, chosen, Path(work), Path(run))
    except OrioleError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    return stamped("ablate", {}, {"identity": identity, "device": device_name(), **result})


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _measured(identity: Line, chosen: dict[str, Any], work: Path, run: Path) -> Line:
    builtin = identity["corpus"] == "builtin"
    made = work / f"tokenizer-{chosen['vocab_size']}"
    tokenizer = Tokenizer.load((made if builtin else Path(str(chosen["data"]))) / "tokenizer")
    stages = {}
    for stage in ("pretrain", "sft") if builtin else ("pretrain",):
        parts = _builtin_parts(stage, made) if builtin else _real_parts(Path(str(chosen["data"])))
        plain = _recipe(stage, {}, parts, identity, chosen, work, run)
        recipe = _recipe(stage, identity["changes"], parts, identity, chosen, work, run)
        shape, length = _shape(recipe, tokenizer), recipe.train.length
        flops = flops_per_token(shape, length, recipe.deep)
        steps = equal_steps(_steps(stage, builtin, chosen), flops_per_token(_shape(plain, tokenizer), length), flops)
        step = recipe.train.batch_size * length
        table = recipe.model_dump(exclude_none=True)
        table["train"] |= {"tokens": steps * step}
        table["eval"] |= {"every": steps}
        table["checkpoint"] |= {"every": steps}
        done = run_stage(validate(Recipe, table, f"{identity['option']}, {stage}"))
        stages[stage] = {
            "steps": steps, "tokens": steps * step, "flops_per_token": flops, "flops": flops * steps * step,
            "bpb": done["bpb"], "loss": done["loss"], "seconds": done["seconds"],
            **_records(run / stage / "metrics.jsonl"),
        }  # fmt: skip
    memory = peak_rss()
    first = stages["pretrain"]
    result = {
        "bpb": first["bpb"],
        "tokens_per_second": first["tokens_per_second"],
        "parameters": shape.num_params(),
        "trained_parameters": num_params(shape, recipe.deep),
        "peak_memory_bytes": memory,
        "cache_bytes": kv_cache_bytes(shape, 1, shape.context),
        "stages": stages,
    }
    if "acceptance" in first:
        result["acceptance"] = first["acceptance"]
    return result | (_examined(run, work / "data" / "eval.jsonl", int(chosen["questions"])) if builtin else {})


def _steps(stage: str, builtin: bool, chosen: dict[str, Any]) -> int:
    """Steps of the plain model."""
    tokens = chosen[f"{stage}_tokens"] if builtin else chosen["tokens"]
    rows, length = ("sft_batch", "sft_seq") if builtin else ("batch", "seq")
    return max(1, round(float(tokens) / (int(chosen[rows]) * int(chosen[length]))))


def _recipe(
    stage: str,
    changes: Mapping[str, Any],
    parts: dict[str, Any],
    identity: Line,
    chosen: dict[str, Any],
    work: Path,
    run: Path,
) -> Recipe:
    """The demo's recipe of the stage on these parts, with the option's changes."""
    rows, length = ("sft_batch", "sft_seq") if identity["corpus"] == "builtin" else ("batch", "seq")
    table = read_toml(RECIPES / "demo" / f"{stage}.toml")
    table |= {"run": str(run), "data": str(work / "data"), "model": chosen["preset"], "parts": parts}
    table["train"] |= {
        "seed": identity["seed"], "batch_size": chosen[rows], "length": chosen[length], "device": chosen["device"],
        "compile": chosen["compile"], "log_every": 5,
    }  # fmt: skip
    table["eval"] = {"tokens": chosen["eval_tokens"], "prompts": []}
    table["checkpoint"] = {"keep": 1}
    apply_overrides(table, parse_overrides(_words(chosen["everywhere"])) | dict(changes))
    return validate(Recipe, table, f"the option {identity['option']}")


def _builtin_parts(stage: str, made: Path) -> dict[str, Any]:
    """The parts of the demo's recipe, with the shards that all runs share instead of files."""
    parts: dict[str, Any] = read_toml(RECIPES / "demo" / f"{stage}.toml")["parts"]
    for part in parts.values():
        (file,) = part.pop("files")
        part["shards"] = str(made / Path(file).stem)
    return parts


def _real_parts(data: Path) -> dict[str, Any]:
    langs = [lang for lang in Shards.open(data).langs if lang in ("zh", "en")]
    return {lang: {"shards": str(data), "lang": lang} for lang in langs} or {"text": {"shards": str(data)}}


def _shape(recipe: Recipe, tokenizer: Tokenizer) -> ModelConfig:
    table = {"preset": recipe.model} if isinstance(recipe.model, str) else recipe.model.model_dump()
    return validate(ModelConfig, table, "model").model_copy(update={"vocab_size": tokenizer.vocab_size})


def _records(metrics: Path) -> Line:
    """Tokens a second of a usual step (the first ones compile), and the last acceptance of a further token."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    rates = [record["tokens_per_second"] for record in records if record["event"] == "step"]
    last = [record for record in records if record["event"] == "eval"][-1]
    accepted = {"acceptance": last["acceptance"]} if "acceptance" in last else {}
    return {"tokens_per_second": statistics.median(rates[1:] or rates), **accepted}


def _examined(run: Path, file: Path, most: int) -> Line:
    """Exact match on held-out questions, spread over the file, greedily."""
    questions = read_questions(file)
    questions = questions[:: max(1, len(questions) // most)] if most else questions
    found = evaluate_questions(Oriole(run), questions)
    return {"exact_match": found["exact_match"], "loop_rate": found["loop_rate"], "questions": len(questions)}


# --- the table -------------------------------------------------------------------------------------------------------


def _lines(out: Path) -> list[Line]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def markdown(lines: list[Line]) -> str:
    """A table for each corpus and each choice of settings that the plain model has been run with."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        key = json.dumps([line["identity"]["corpus"], line["identity"]["settings"]], sort_keys=True)
        groups.setdefault(key, []).append(line)
    shown = [_table(own) for own in groups.values() if any(line["identity"]["option"] == "plain" for line in own)]
    return "\n\n".join(shown) or "no plain model has been run yet, so there is nothing to compare with"


def _table(lines: list[Line]) -> str:
    runs: dict[str, dict[int, Line]] = {}
    for line in lines:  # of an option that was changed and run again the newest counts
        runs.setdefault(line["identity"]["option"], {})[line["identity"]["seed"]] = line
    corpus, chosen = lines[0]["identity"]["corpus"], lines[0]["identity"]["settings"]
    known = options(int(chosen["sft_seq" if corpus == "builtin" else "seq"]))
    order = sorted(runs, key=lambda name: list(known).index(name) if name in known else len(known))
    parts = sorted(next(iter(runs["plain"].values()))["bpb"], reverse=True)  # zh, en
    columns = {f"bits per byte {part}": (_bpb, part, 3, 1.0) for part in parts}
    if corpus == "builtin":
        columns["exact match, %"] = (_exact, "", 1, 100.0)
    cells: dict[str, dict[str, str]] = {name: {} for name in order}
    for title, (figure, part, digits, scale) in columns.items():
        values = {name: {s: scale * figure(line, part) for s, line in runs[name].items()} for name in order}
        found = differences(values)
        for name in order:
            mean = f"{statistics.fmean(values[name].values()):.{digits}f}"
            cells[name][title] = mean + (f" ({_shown(found[name], digits)})" if name in found else "")
    for name in order:
        own = list(runs[name].values())
        cells[name] |= {
            "tokens": f"{sum(stage['tokens'] for stage in own[0]['stages'].values()) / 1e6:.2f}M",
            "tokens/s": f"{statistics.median(line['tokens_per_second'] for line in own):,.0f}",
            "memory, MB": f"{statistics.median(line['peak_memory_bytes'] for line in own) / 1e6:,.0f}",
            "cache, kB": f"{own[0]['cache_bytes'] / 1e3:,.0f}",
            "seeds": str(len(own)),
        }
    titles = ["option", "what it is", *cells[order[0]]]
    rows = [[f"`{name}`", known[name].what if name in known else "", *cells[name].values()] for name in order]
    lines_out = [" | ".join(titles), " | ".join("---" for _ in titles), *(" | ".join(row) for row in rows)]
    return "\n".join([_caption(corpus, lines), "", *(f"| {line} |" for line in lines_out), *_accepted(runs)])


def _caption(corpus: str, lines: list[Line]) -> str:
    first, commits = lines[0], sorted({line["commit"] for line in lines})
    budget = sum(s["flops"] for s in first["stages"].values())
    load = max((line["load"] or 0.0) for line in lines)
    others = len({line["identity"]["option"] for line in lines}) - 1
    where = f"{first['device']}, torch {first['torch']}, {first['threads']} threads, commit {', '.join(commits)}"
    preset = first["identity"]["settings"]["preset"]
    if also := first["identity"]["settings"].get("everywhere"):
        preset += f" with {also}"
    return (
        f"**{corpus}**, {preset}, {budget:.2g} training FLOPs each; {where}, load up to "
        f"{load:.1f}. In brackets the difference to plain with its 95 % interval, bold where zero lies outside; of "
        f"{others} options that were worth nothing {0.05 * others:.1f} would be bold in a column."
    )


def _accepted(runs: Mapping[str, Mapping[int, Line]]) -> list[str]:
    """How often a further token would be accepted, where one is predicted."""
    out = []
    for name, own in runs.items():
        known = [line["acceptance"] for line in own.values() if "acceptance" in line]
        if known:
            shares = {p: statistics.fmean(one[p]["2"] for one in known) for p in known[0]}
            out += ["", f"`{name}`: " + ", ".join(f"{p} {100 * s:.0f} %" for p, s in shares.items()) + " accepted."]
    return out


def _bpb(line: Line, part: str) -> float:
    return float(line["bpb"][part])


def _exact(line: Line, _: str) -> float:
    return statistics.fmean(share for key, share in line["exact_match"].items() if key != "by_kind")


def _shown(difference: Difference, digits: int) -> str:
    text = f"{difference.mean:+.{digits}f}"
    if math.isnan(difference.half):
        return text
    text += f" ± {difference.half:.{digits}f}"
    return f"**{text}**" if difference.clear else text


if __name__ == "__main__":
    main()
