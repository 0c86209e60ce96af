"""`oriole data …`: from files as they are found to shards that training reads."""

import json
from typing import Annotated

import typer

from oriole.cli.common import Json, Settings, new_app

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
