"""`oriole doctor` and `oriole plan`: what this machine can do, and what training will take, before it is started."""

import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from pydantic import field_validator

from oriole.cli.common import Json, Settings
from oriole.config import Config
from oriole.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from oriole.model.config import ModelConfig
    from oriole.train.accelerators import Cluster
    from oriole.train.doctor import Item
    from oriole.train.plan import StagePlan
    from oriole.train.recipe import Recipe
    from oriole.train.workload import Tokens

__all__ = ["doctor", "plan"]

SCHEMA = 1


class PlanKeys(Config):
    """What `oriole plan` knows beside the recipe's own keys."""

    device: str = ""
    """A machine that is not here: 4090, 8xH100, 4x8xH200 (four machines of eight); empty: this one."""
    price: float | None = None
    """Of an hour of the whole machine, in whatever currency."""
    network: float | None = None
    """Gbit/s between machines for each GPU; by default 400 for server GPUs, 10 for a machine of cards."""
    probe: float = 20.0
    """Seconds of steady steps to measure on this machine."""

    @field_validator("device", mode="before")
    @classmethod
    def _text(cls, value: object) -> str:
        return str(value)  # 4090 is read as a number


# --- plan ------------------------------------------------------------------------------------------------------------


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe, a folder of recipes, or a model preset: demo/sft, 26m, 1b.")],
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """What training will take: parameters, tokens, FLOPs, memory by part, time and cost, measured before it starts."""
    from oriole.config import parse_overrides, validate

    own = [s for s in settings or [] if s.partition("=")[0] in PlanKeys.model_fields]
    keys = validate(PlanKeys, parse_overrides(own), "oriole plan")
    cluster = None
    if keys.device:
        from oriole.train.accelerators import parse_cluster

        cluster = parse_cluster(keys.device)
    recipes = _plannable(_recipes(recipe, [s for s in settings or [] if s not in own], cluster))
    with tempfile.TemporaryDirectory() as scratch:
        plans = [_plan_stage(name, one, recipes, keys, cluster, Path(scratch)) for name, one in recipes.items()]
    if as_json:
        table = {"schema": SCHEMA, "stages": [_as_json(p) for p in plans], **_totals(plans)}
        print(json.dumps(table, ensure_ascii=False))
    else:
        _show(plans)


def _recipes(name: str, settings: Sequence[str], cluster: "Cluster | None") -> dict[str, "Recipe"]:
    """The recipes to plan by name: one file, a folder's in the order of its stages, or one made for a preset."""
    from oriole.cli import RECIPES, load_recipe, load_recipes
    from oriole.model.config import PRESETS

    if name.endswith(".toml") or (RECIPES / f"{name}.toml").exists():
        return {name: load_recipe(name, settings)}
    if name in PRESETS and not Path(name).is_dir() and not (RECIPES / name).is_dir():
        from oriole.train.workload import preset_recipe

        return {name: preset_recipe(name, settings, cluster)}
    return {f"{Path(name).name}/{r.stage}": r for r in load_recipes(name, settings)}


def _plannable(recipes: dict[str, "Recipe"]) -> dict[str, "Recipe"]:
    """Those of which can be said beforehand what they take; the others are named."""
    from oriole.cli import left_out
    from oriole.log import say

    out = {}
    for name, recipe in recipes.items():
        if recipe.stage in ("ppo", "grpo"):
            say(f"{name} is not planned: how long its answers will be, and take, nobody knows beforehand", "yellow")
        elif not left_out(recipe):
            out[name] = recipe
    if not out:
        raise ConfigError(f"nothing is left to plan of {', '.join(recipes)}")
    return out


def _plan_stage(
    name: str,
    recipe: "Recipe",
    recipes: dict[str, "Recipe"],
    keys: PlanKeys,
    cluster: "Cluster | None",
    scratch: Path,
) -> "StagePlan":
    from oriole.train.plan import plan_here, plan_there
    from oriole.train.workload import steps_of

    shape = _shape(name, recipe, recipes)
    if problem := recipe.too_long_for(shape):
        raise ConfigError(f"{name}: {problem}")
    tokens = _tokens(recipe, scratch)
    if cluster is not None:
        return plan_there(name, recipe, shape, tokens, cluster, network=keys.network, price=keys.price)
    from oriole.log import say
    from oriole.train.device import choose_device, choose_dtype
    from oriole.train.machine import device_memory_limit, peak_flops, usable_cores
    from oriole.train.probe import probe

    say(f"measuring {name} on this machine (about {keys.probe:g} s, and compiling) …", "dim")
    device = choose_device(recipe.train.device)
    measured = probe(recipe, shape, steps_of(recipe, tokens.count), keys.probe)
    peak = peak_flops(device, choose_dtype(device, recipe.train.dtype)[0])
    allowed, quota = usable_cores()
    return plan_here(
        name,
        recipe,
        shape,
        tokens,
        measured,
        peak_flops=peak.flops,
        memory_limit=device_memory_limit(device),
        cores=min(allowed, quota or allowed),
        price=keys.price,
    )


def _shape(name: str, recipe: "Recipe", recipes: dict[str, "Recipe"]) -> "ModelConfig":
    """The shape a stage will train: its parent's, made already or planned beside it, else its own."""
    from oriole.cli import RECIPES
    from oriole.model.config import preset
    from oriole.model.folder import read_config
    from oriole.model.seq2seqconfig import Seq2SeqConfig

    parent = Path(recipe.init) if recipe.init not in ("", "random") else recipe.run / "pretrain" / "model"
    if recipe.init != "random" and (recipe.stage not in ("pretrain", "seq2seq") or recipe.init):
        if (parent / "config.json").exists():
            return recipe.lengthened(read_config(parent))
        if recipe.init:
            raise ConfigError(f"init={recipe.init} is no model folder; give one, or leave init out")
        first = next((r for r in recipes.values() if r.stage == "pretrain"), None) or _sibling(name, RECIPES)
        if first is not None and first is not recipe:
            return recipe.lengthened(_shape(name, first, {}))
    shape = preset(recipe.model) if isinstance(recipe.model, str) else recipe.model
    if isinstance(shape, Seq2SeqConfig):
        raise ConfigError(
            f"oriole plan reckons decoder-only models; {name} trains an encoder-decoder, so just start it"
        )
    return shape.model_copy(update={"vocab_size": _vocab_size(recipe)})


def _sibling(name: str, builtin: Path) -> "Recipe | None":
    """The pretraining recipe beside a later stage's."""
    from oriole.cli import load_recipe

    path = (Path(name) if name.endswith(".toml") else builtin / f"{name}.toml").with_name("pretrain.toml")
    return load_recipe(str(path), []) if path.exists() else None


def _vocab_size(recipe: "Recipe") -> int:
    """Ids of the tokenizer that the stage will use, as far as it exists already."""
    from oriole.text.tokenizer import Tokenizer

    packed = [part.shards for part in recipe.parts.values() if part.shards is not None]
    places = [recipe.tokenizer.path, *(p / "tokenizer" for p in packed), recipe.run / "tokenizer"]
    for place in places:
        if place is not None and (place / "tokenizer.json").exists():
            return Tokenizer.load(place).vocab_size
    return recipe.tokenizer.vocab_size


def _tokens(recipe: "Recipe", scratch: Path) -> "Tokens":
    """Training tokens of a stage; epochs are reckoned from the data as far as it is here."""
    from oriole.errors import DataError
    from oriole.text.paths import expand
    from oriole.text.shards import Shards
    from oriole.train.workload import expected_tokens

    if recipe.train.tokens is not None:
        return expected_tokens(recipe, {}, {})
    root = Path(recipe.data)
    if recipe.data == "builtin":
        from oriole.demo.corpus import write_corpus

        root = next((p for p in (recipe.run / "data", scratch / "data") if p.exists()), scratch / "data")
        if not root.exists():
            write_corpus(root)
    shards: dict[str, int] = {}
    files: dict[str, list[Path]] = {}
    for name, part in recipe.trained.items():
        if part.shards is not None:
            if (part.shards / "index.json").exists():
                shards[name] = Shards.open(part.shards).num_tokens
            continue
        try:
            files[name] = list(expand(part.files, root))
        except DataError:
            files[name] = []
    return expected_tokens(recipe, shards, files)


# --- showing a plan --------------------------------------------------------------------------------------------------


def _totals(plans: Sequence["StagePlan"]) -> dict[str, Any]:
    costs = [p.cost for p in plans if p.cost is not None]
    return {
        "seconds": round(sum(p.total_seconds for p in plans), 1),
        "cost": round(sum(costs), 2) if costs else None,
        "fits": all(p.fits for p in plans),
    }


def _as_json(one: "StagePlan") -> dict[str, Any]:
    return one.model_dump(mode="json") | {"total_seconds": one.total_seconds, "peak_bytes": one.peak}


def _print(*what: "RenderableType") -> None:
    """Results go to stdout: in colour on a terminal, elsewhere as plain lines that are never wrapped."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console(highlight=False).print(*what, sep="\n")
        return
    plain = Console(highlight=False, no_color=True, width=1000, file=io.StringIO())
    plain.print(*what, sep="\n")
    text = cast(io.StringIO, plain.file).getvalue()
    print("\n".join(line.rstrip() for line in text.splitlines()))


def _show(plans: Sequence["StagePlan"]) -> None:
    from rich.table import Table

    for one in plans:
        table = Table(box=None, show_header=False, padding=(0, 1))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for label, text in _lines(one):
            table.add_row(label, text, style="bold red" if label == "memory" and not one.fits else "")
        for note in one.notes:
            table.add_row("note", note, style="yellow")
        how = {"one": "", "ddp": ", DDP", "fsdp": ", FSDP2"}[one.strategy]
        _print(f"[bold]{one.name} on {one.device}{how}[/]", table, "")
    if len(plans) > 1:
        totals = _totals(plans)
        cost = "" if totals["cost"] is None else f", cost {totals['cost']:.2f}"
        _print(f"[bold]all stages: {_time(totals['seconds'])}{cost}[/]")


def _lines(one: "StagePlan") -> list[tuple[str, str]]:
    """What is said of a stage: label and text of each line."""
    from oriole.log import human

    share = f"{one.accumulate} x {one.rows} x {one.length}" + (f" on each of {one.gpus} GPUs" if one.gpus > 1 else "")
    mfu = "" if one.mfu is None else f", MFU {one.mfu:.0%}"
    parts = " + ".join(f"{name} {_time(s)}" for name, s in one.seconds.items() if s >= 0.5)
    memory = ", ".join(f"{name} {_size(n)}" for name, n in one.memory.items() if n >= 1e6)
    active = "" if one.active_parameters == one.parameters else f" ({human(one.active_parameters)} for each token)"
    fits = "fits" if one.fits else "DOES NOT FIT"
    lines = [
        ("model", f"{human(one.parameters)} parameters{active}, {one.dtype}"),
        ("tokens", f"{human(one.tokens.count)} ({one.tokens.source if one.tokens.known else 'assumed'})"),
        ("steps", f"{one.steps:,} of {human(one.step_tokens)} tokens: {share}"),
        ("compute", f"{one.flops:.3g} FLOPs at {human(one.tokens_per_second)} tokens/s{mfu} ({one.basis})"),
        ("time", f"{_time(one.total_seconds)} = {parts}"),
        ("memory", f"{fits}: {_size(one.peak)} of {_size(one.memory_limit)} = {memory}"),
        ("disk", _size(one.disk)),
    ]
    if one.cost is not None:
        lines.append(("cost", f"{one.cost:.2f} at {one.price:g} an hour"))
    return lines


def _time(seconds: float) -> str:
    """`75` -> `1:15`; from two days on `3.1 days`."""
    from oriole.log import duration

    return duration(seconds) if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _size(n: float) -> str:
    """`18e9` -> `18.0 GB`."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


# --- doctor ----------------------------------------------------------------------------------------------------------


def doctor(as_json: Json = False) -> None:
    """What this machine can do: cores, memory, disk, GPU, compiler; what Oriole will use, and why."""
    from oriole.train.doctor import examine

    items = examine(Path("runs"))
    if as_json:
        print(json.dumps({"schema": SCHEMA, "items": [i._asdict() for i in items]}, ensure_ascii=False))
    else:
        _show_items(items)


def _show_items(items: Sequence["Item"]) -> None:
    from rich.table import Table

    marks = {"ok": ("✓", "green"), "note": ("•", "yellow"), "problem": ("✗", "red")}
    table = Table(box=None, show_header=False, padding=(0, 1))
    for _ in range(3):
        table.add_column()
    for item in items:
        mark, colour = marks[item.verdict]
        text = item.found + (f"\n→ {item.advice}" if item.advice else "")
        table.add_row(f"[{colour}]{mark}[/]", f"[bold]{item.name}[/]", text)
    problems = sum(i.verdict == "problem" for i in items)
    mend = f"{problems} problem{'s' if problems != 1 else ''} to mend first (✗)"
    _print(table, "", mend if problems else "ready to train: oriole demo")
