"""The command line: `oriole VERB paths… key=value …`.

The surface is closed: a new knob becomes a key of a recipe, never a flag. Verbs import what they need when they run,
so that `oriole --help` answers at once.
"""

import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oriole.cli import data, plan, tokenizer
from oriole.cli.common import InOut, Json, Settings, new_app, paths_and_settings
from oriole.errors import ConfigError, DataError, OrioleError, PeerFailed

if TYPE_CHECKING:
    from oriole.train.recipe import Recipe

__all__ = ["app", "load_recipe", "main"]

STAGES = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo", "distill", "seq2seq")
"""The stages of a run, in the order in which they follow one another."""

DEMO = ("pretrain", "sft", "dpo")
"""The stages of `oriole demo`, in minutes on a CPU."""

RECIPES = Path(__file__).parents[1] / "recipes"

app = new_app("oriole", "Train your own bilingual (Chinese + English) chat model from scratch, and talk to it.")
app.add_typer(data.app)
app.add_typer(tokenizer.app)
app.command(epilog="Example: oriole doctor --json")(plan.doctor)
app.command(
    epilog="Example: oriole plan 26m data=DATA price=1.5   (a machine that is not here: oriole plan 1b device=8xH100 "
    "price=20; then network=Gbit/s between machines)"
)(plan.plan)


def main() -> None:
    """Entry point of the `oriole` command: an `OrioleError` becomes one sentence and its exit code."""
    try:
        app()
    except PeerFailed as error:  # once for each machine: the process that failed says it, too
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"oriole: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OrioleError as error:
        print(f"oriole: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if any(not t.daemon for t in threading.enumerate() if t is not threading.main_thread()):
            # A checkpoint is being written, and Python would wait for it; whoever asks twice means now.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `oriole … | head`: the reader left; not worth a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        import oriole

        print(oriole.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


# --- training --------------------------------------------------------------------------------------------------------


@app.command(
    epilog="Example: oriole demo   (a second call goes on where the first was stopped; run=FOLDER for another place)"
)
def demo(settings: Settings = None) -> None:
    """The whole story on the built-in bilingual corpus: tokenizer, pretraining, fine-tuning, preferences, evaluation,
    report. `oriole run demo` goes on to a reward model, PPO and GRPO."""
    from oriole.log import say

    recipes = [recipe for recipe in load_recipes("demo", settings or []) if recipe.stage in DEMO]
    if not _run(recipes):
        return
    run = recipes[0].run
    _report(run)
    say("\nNext, try:")
    for line in (
        f"oriole chat {run}",
        f"oriole generate {run} input=questions.jsonl output=answers.jsonl",
        "oriole run 26m data=DATA     # your own text: see docs/quickstart.md",
    ):
        say(f"  {line}", "bold")


@app.command(epilog="Example: oriole train demo/pretrain run=/tmp/x train.lr=1e-3")
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a built-in recipe such as demo/pretrain.")],
    settings: Settings = None,
) -> None:
    """Train one stage; makes the tokenizer and the token shards first where they are missing."""
    _run([load_recipe(recipe, settings or [])])


@app.command(epilog="Example: oriole run 26m data=DATA run=runs/mine pretrain.train.tokens=3e6")
def run(
    recipes: Annotated[str, typer.Argument(help="A folder with recipes, or a built-in name: demo, 26m.")],
    settings: Settings = None,
) -> None:
    """Train all stages of a folder in order, skipping finished ones; then write the run's report."""
    loaded = [recipe for recipe in load_recipes(recipes, settings or []) if not left_out(recipe)]
    if _run(loaded):
        _report(loaded[0].run)


def left_out(recipe: "Recipe") -> bool:
    """Whether a stage is not needed and its files are not there, which is said."""
    from oriole.errors import DataError
    from oriole.log import say
    from oriole.text.formats import expand

    if not recipe.optional or recipe.data == "builtin":
        return False
    for part in recipe.trained.values():
        try:
            expand(part.files, Path(recipe.data))
        except DataError as error:
            say(f"{recipe.stage} is left out: {error}", "yellow")
            return True
    return False


def _run(recipes: Sequence["Recipe"]) -> bool:
    """Train the stages in order, each followed by its questions where the recipe names some; whether this is the first
    of the processes that do it together, or the only one."""
    from oriole.cli import gate
    from oriole.train import dist
    from oriole.train.lock import alone_in
    from oriole.train.stage import run_stage

    with dist.started(recipes[0].train.device), alone_in(recipes[0].run):  # between the stages, too
        for recipe in recipes:
            with dist.first():
                recipe = _with_builtin_data(recipe)
            run_stage(recipe)
            with dist.first() as is_first:
                if is_first and recipe.eval.questions:
                    _ask(recipe)
                if is_first:
                    gate.after_stage(recipe)
        return dist.rank() == 0


def _report(run: Path, as_json: bool = False) -> None:
    """Write a run's report and show it."""
    from oriole.apps import report
    from oriole.log import say

    made: dict[str, Any] = report.write(run)
    print(json.dumps(made, ensure_ascii=False) if as_json else report.text(made))
    say(f"\nThe same with pictures: {run / 'report.html'}")


def _with_builtin_data(recipe: "Recipe") -> "Recipe":
    """The recipe with data="builtin" replaced by a folder of the run, where the built-in corpus is written out."""
    if recipe.data != "builtin":
        return recipe
    from oriole.demo.corpus import write_corpus
    from oriole.log import say

    folder = recipe.run / "data"
    if not folder.exists():
        say(f"writing the built-in bilingual corpus to {folder}")
        write_corpus(folder)
    return recipe.model_copy(update={"data": str(folder)})


def _ask(recipe: "Recipe") -> None:
    """Ask a stage's model the recipe's held-out questions once and keep figures and answers in the stage's folder."""
    from oriole.apps.api import Oriole
    from oriole.apps.evaluate import evaluate_questions, read_questions
    from oriole.log import Metrics, last_record
    from oriole.text.formats import expand

    if last_record(recipe.folder / "metrics.jsonl", "questions", after="done"):
        return
    paths = expand([recipe.eval.questions], Path(recipe.data))
    questions = [question for path in paths for question in read_questions(path)]
    result = evaluate_questions(Oriole(recipe.folder / "model"), questions)
    with (recipe.folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in result.pop("answers"))
    metrics = Metrics(recipe.folder / "metrics.jsonl")
    metrics.write({"event": "questions", **result})
    metrics.close()


# --- recipes ---------------------------------------------------------------------------------------------------------


def load_recipe(name: str, settings: Sequence[str]) -> "Recipe":
    """The recipe in the file `name` or built in under that name, with `key=value` settings applied."""
    from oriole.config import apply_overrides, parse_overrides, read_toml, validate
    from oriole.train.recipe import Recipe

    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.exists():
        raise ConfigError(f"no recipe '{name}'; built in are {', '.join(builtin_recipes())}, or give a .toml file")
    table = read_toml(path)
    overrides = parse_overrides(settings)
    # A length given on the command line replaces the recipe's, in whichever of the two units that was.
    for given, other in (("tokens", "epochs"), ("epochs", "tokens")):
        if f"train.{given}" in overrides and f"train.{other}" not in overrides:
            table.get("train", {}).pop(other, None)
    apply_overrides(table, overrides)
    table.setdefault("run", f"runs/{path.resolve().parent.name}")
    table["run"] = str(table["run"]) if "/" in str(table["run"]) else f"runs/{table['run']}"
    return validate(Recipe, table, name)


def load_recipes(name: str, settings: Sequence[str]) -> list["Recipe"]:
    """All recipes of a folder, in stage order; a setting may be meant for one stage: `sft.train.epochs=1`."""
    folder = Path(name) if Path(name).is_dir() else RECIPES / name
    files = {stage: folder / f"{stage}.toml" for stage in STAGES}
    files = {stage: path for stage, path in files.items() if path.exists()}
    if not files:
        builtin = sorted({n.partition("/")[0] for n in builtin_recipes()})
        raise ConfigError(f"no recipes in '{name}'; built in are {', '.join(builtin)}, or give a folder of .toml files")
    out = []
    for stage, path in files.items():
        own = [
            s.removeprefix(f"{stage}.")
            for s in settings
            if s.partition(".")[0] not in files or s.startswith(f"{stage}.")
        ]
        out.append(load_recipe(str(path), own))
    return out


def builtin_recipes() -> list[str]:
    """Names of the recipes inside the package, for example demo/pretrain."""
    return sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.glob("*/*.toml"))


# --- what other systems have left ------------------------------------------------------------------------------------


@app.command(
    "import",
    epilog="Example: oriole import khaosz/cached/*.pt imported tokenizer=khaosz/tokenizer.json   (kind=text, chat or "
    "preference where the names of the tensors do not say it; skip_bad=true; workers=)",
)
def import_tokens(words: InOut, as_json: Json = False) -> None:
    """Token tensors (.pt) that KHAOSZ was trained on, back into text: rows of JSON for all other verbs."""
    from oriole.config import parse_overrides, validate
    from oriole.log import say
    from oriole.train.importing import ImportConfig, import_files

    paths, settings = paths_and_settings(words)
    config = validate(ImportConfig, parse_overrides(settings), "oriole import")
    if len(paths) < 2:
        raise ConfigError("oriole import needs files and a folder to write: oriole import IN... OUT tokenizer=FILE")
    made = import_files(paths[:-1], Path(paths[-1]), config)
    if as_json:
        print(json.dumps(made, ensure_ascii=False))
        return
    for file in made:
        print(f"{paths[-1]}/{file['name']}.jsonl.zst   {file['rows']:,} rows, {file['kind']}")
        for example in file["examples"][:3]:
            say(f"  left out: {example}", "yellow")
    say(f"next: oriole data clean {paths[-1]} corpus   (kind=chat or kind=preference for rows of those)")


# --- using a model ---------------------------------------------------------------------------------------------------


@app.command(epilog="Example: oriole chat runs/demo temperature=0.7")
def chat(
    path: Annotated[Path, typer.Argument(help="A run, a stage, or a model folder.")],
    settings: Settings = None,
) -> None:
    """Talk to a model in the terminal. /help lists the commands inside."""
    from oriole.apps.chat import chat as talk

    talk(path, settings or [])


@app.command(epilog="Example: oriole generate runs/demo input=questions.jsonl output=answers.jsonl temperature=0")
def generate(
    path: Annotated[Path, typer.Argument(help="A run, a stage, or a model folder.")],
    settings: Settings = None,
) -> None:
    """Answer a file of questions, one JSON object a line; a second call goes on where the first was stopped."""
    from oriole.apps.generate import generate_file

    generate_file(path, settings or [])


@app.command(
    "eval",
    epilog="Example: oriole eval runs/demo questions=runs/demo/data/eval.jsonl --json   (against=runs/demo/sft: which "
    "of the two answers better; reward_model=FOLDER judges, too)",
)
def evaluate(
    path: Annotated[Path, typer.Argument(help="A run, a stage, or a model folder.")],
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Exact match and loop rate on a file of questions with accepted answers; or which of two models answers better."""
    from oriole.apps import report
    from oriole.apps.api import Oriole
    from oriole.apps.evaluate import evaluate_questions, read_questions
    from oriole.config import parse_overrides

    given = parse_overrides(settings or [])
    questions = Path(given.pop("questions", path / "data" / "eval.jsonl"))
    other, reward = given.pop("against", None), given.pop("reward_model", None)
    if given:
        raise ConfigError(
            f"oriole eval: unknown key '{next(iter(given))}'; known here: questions, against, reward_model"
        )
    if not questions.exists():
        raise DataError(f"no questions at {questions}; name a file with questions=FILE.jsonl")
    if other is not None:
        from oriole.cli.gate import against

        compared = against(path, Path(str(other)), questions, Path(str(reward)) if reward is not None else None)
        print(json.dumps(compared, ensure_ascii=False) if as_json else report.gate_table(compared))
        return
    result = evaluate_questions(Oriole(path), read_questions(questions))
    result.pop("answers")
    print(json.dumps(result, ensure_ascii=False) if as_json else report.questions_table(result))


@app.command(
    epilog='Example: oriole inspect runs/demo "两个黄鹂鸣翠柳"   (mode=text: the text without roles; answer=0: nothing '
    "after it; html=FILE for the page; what a run's data holds: oriole data inspect RUN)"
)
def inspect(
    path: Annotated[Path, typer.Argument(help="A run, a stage, or a model folder.", metavar="RUN")],
    text: Annotated[str, typer.Argument(help="What the model is to read.", metavar="TEXT")],
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """What a model does with a text: tokens, embeddings, attention, experts, what every layer would say, what comes
    next; of an encoder-decoder the text is the source, and what it answers is looked at beside it."""
    from rich.console import Console

    from oriole.apps.api import Oriole
    from oriole.apps.inside import InsideConfig, describe
    from oriole.apps.insidepage import write_page
    from oriole.apps.insidetext import show
    from oriole.config import parse_overrides, validate
    from oriole.log import say

    config = validate(InsideConfig, parse_overrides(settings or []), "oriole inspect")
    made = describe(Oriole(path), text, config)
    if as_json:
        print(json.dumps(made, ensure_ascii=False))
        return
    write_page(made, config.html)
    console = Console(highlight=False)
    show(made, console if console.is_terminal else Console(highlight=False, width=120))
    say(f"\nthe same with pictures: {config.html}")


@app.command("report", epilog="Example: oriole report runs/demo --json")
def show_report(
    path: Annotated[Path, typer.Argument(help="A run folder.")],
    as_json: Json = False,
) -> None:
    """What a run has reached so far, from the files in its folder; with pictures in its report.html."""
    _report(path, as_json)


@app.command("compare", epilog="Example: oriole compare runs/a runs/b output=compare.html")
def compare_runs(
    words: Annotated[list[str], typer.Argument(help="Run folders, and settings.", metavar="RUN... [KEY=VALUE]...")],
    as_json: Json = False,
) -> None:
    """Runs beside each other: what they have reached and which settings differ; output=FILE.html draws their curves."""
    from oriole.apps import compare
    from oriole.config import parse_overrides
    from oriole.log import say

    paths, settings = paths_and_settings(words)
    given = parse_overrides(settings)
    output = given.pop("output", None)
    if given:
        raise ConfigError(f"oriole compare: unknown key '{next(iter(given))}'; known here: output")
    compared = compare.Compared([Path(path) for path in paths])
    print(json.dumps(compared.table, ensure_ascii=False) if as_json else compare.text(compared))
    if output is not None:
        compare.write_page(compared, Path(str(output)))
        say(f"\nThe curves in one picture: {output}")
