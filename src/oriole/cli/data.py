"""`oriole data …`: from files as they are found to shards that training reads."""

import json
from pathlib import Path
from typing import Annotated

import typer

from oriole.cli.common import InOut, Json, Settings, new_app, paths_and_settings
from oriole.errors import ConfigError, DataError

__all__ = ["app"]

app = new_app("data", "Clean, deduplicate, fetch, pack and look at data.")

Yes = Annotated[bool, typer.Option("--yes", help="Do it without asking, however large it is.")]


@app.command(
    epilog="Example: oriole data fetch belle-0.5m   (without a name: the list; kind=chat lang=zh narrows it; show=true "
    "tells all about one set; mirror=hf-mirror, proxy=, out=, files=, max_files= as needed)"
)
def fetch(
    name: Annotated[str | None, typer.Argument(help="A name from the list; without one, the list is printed.")] = None,
    settings: Settings = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Bring a public data set into data/NAME: resumed, checked, in a form that can be read, with its licence."""
    from oriole.config import parse_overrides, validate
    from oriole.log import say
    from oriole.text import catalogue
    from oriole.text.fetch import FetchConfig, report
    from oriole.text.fetch import fetch as bring

    words = [*([name] if name and "=" in name else []), *(settings or [])]
    given = parse_overrides(words)
    if not name or "=" in name:
        entries = catalogue.select(given)
        if as_json:
            print(json.dumps([e.model_dump(mode="json") for e in entries], ensure_ascii=False))
        else:
            print(catalogue.table(entries))
            say("\n! has a note: oriole data fetch NAME show=true   * the hub asks for consent   ? unknown")
        return
    config = validate(FetchConfig, given, "oriole data fetch")
    if config.show:
        entry = catalogue.find(name, catalogue.catalogue())
        print(json.dumps(entry.model_dump(mode="json"), ensure_ascii=False) if as_json else catalogue.describe(entry))
        return
    result = bring(name, config, yes=yes)
    if as_json:
        print(json.dumps(result.as_json(), ensure_ascii=False))
        return
    report(result)
    print("\n".join(result.following))


@app.command(
    epilog="Example: oriole data clean raw/*.jsonl.gz corpus decontaminate=eval/*.jsonl heldout=0.01   (kind=chat or "
    "preference for rows of those; rules=light; config=FILE.toml for everything; then open corpus/report.html)"
)
def clean(words: InOut, as_json: Json = False) -> None:
    """Clean, decontaminate and deduplicate text, with a report to tune it by; a second call goes on where it was.

    Exit code 2, with the report written, when nothing is left to train on.
    """
    from oriole.log import say
    from oriole.text import cleanreport, pipeline

    paths, settings = paths_and_settings(words)
    config = pipeline.read_config(settings)
    if len(paths) < 2:
        raise ConfigError("oriole data clean needs what to clean and a folder to write: oriole data clean IN... OUT")
    report = pipeline.clean(paths[:-1], Path(paths[-1]), config)
    print(json.dumps(cleanreport.summary(report), ensure_ascii=False) if as_json else cleanreport.text(report))
    if why := cleanreport.nothing_left(report, Path(paths[-1])):
        raise DataError(why)
    say(f"\nread {paths[-1]}/report.html to see what went, and why")


@app.command(
    epilog="Example: oriole data pack corpus packed tokenizer=runs/demo   (kind=, heldout=0.01, skip_bad=true, "
    'workers=, engine=ray as needed; then [parts.zh] shards = "packed", lang = "zh" in a recipe)'
)
def pack(words: InOut, as_json: Json = False) -> None:
    """Text and chats to token shards, on all cores; a second call does only what is missing or has changed."""
    from oriole.config import parse_overrides, validate
    from oriole.log import human, say
    from oriole.text.pack import HELDOUT, PackConfig
    from oriole.text.pack import pack as make

    paths, settings = paths_and_settings(words)
    config = validate(PackConfig, parse_overrides(settings), "oriole data pack")
    if len(paths) < 2:
        raise ConfigError("oriole data pack needs what to pack and a folder to write: oriole data pack IN... OUT")
    made = make(paths[:-1], Path(paths[-1]), config)
    if as_json:
        print(json.dumps(made, ensure_ascii=False))
        return
    held = f", {made[HELDOUT]['documents']:,} more held out" if made[HELDOUT]["documents"] else ""
    print(f"{human(made['tokens'])} tokens in {made['documents']:,} documents of {len(made['files'])} inputs{held}")
    if made["skipped"]:
        say(f"{made['skipped']:,} records could not be read, for example:", "yellow")
        for example in made["examples"][:5]:
            say(f"  {example}")
    say(f"next: oriole data inspect {paths[-1]}")


@app.command(
    epilog="Example: oriole data inspect packed length=2048 html=packed.html   (or a run, or files of any format with "
    "tokenizer=DIR; rows=, samples=, batch_size=, stage=, kind=, limit= as needed)"
)
def inspect(
    path: Annotated[str, typer.Argument(help="A folder of shards, a run, or files: a path, folder or glob.")],
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Sources, tokens, lengths, samples, and what a batch really contains, with the loss mask in colour."""
    from rich.console import Console

    from oriole.apps.inspect import InspectConfig
    from oriole.apps.inspectpage import write_page
    from oriole.apps.inspecttext import show
    from oriole.cli.inspection import inspect as describe
    from oriole.config import parse_overrides, validate
    from oriole.log import say

    config = validate(InspectConfig, parse_overrides(settings or []), "oriole data inspect")
    made = describe(Path(path), config)
    if config.html:
        write_page(made, config.html)
    if as_json:
        print(json.dumps(made, ensure_ascii=False))
        return
    console = Console(highlight=False)
    show(made, console if console.is_terminal else Console(highlight=False, width=120))
    if config.html:
        say(f"\nwritten to {config.html}")


@app.command(
    epilog="Example: oriole data prefer runs/demo checkpoint=step-400 output=pairs.jsonl   (chosen=best samples=8 "
    "judge=reward: the best of several answers to the worst; input=, limit=, similarity=, temperature= as needed)"
)
def prefer(
    path: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Preference pairs from a model's own answers: the data's answer against an earlier checkpoint's, or the best of
    several against the worst; a second call goes on where the first was stopped."""
    from oriole.apps.prefer import PreferConfig, prefer, summary
    from oriole.cli.prefer import judge_for, model_for
    from oriole.config import parse_overrides, validate
    from oriole.log import say

    config = validate(PreferConfig, parse_overrides(settings or []), "oriole data prefer")
    model = model_for(path, config)
    made = prefer(path, model, config, judge_for(path, config, model))
    print(json.dumps(made, ensure_ascii=False) if as_json else summary(made))
    if not made["pairs"]:
        raise DataError(f"no pairs were found in {made['chats']:,} chats; sample more, or from an earlier checkpoint")
    say(f'next: [parts.own] files = ["{made["output"]}"] in a dpo or reward recipe')
