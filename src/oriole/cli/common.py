"""What the verbs share: the look of an app, and the words that stand in every signature."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["InOut", "Json", "Settings", "new_app", "paths_and_settings"]

Settings = Annotated[list[str] | None, typer.Argument(help="Settings as key=value.", metavar="[KEY=VALUE]...")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]

InOut = Annotated[
    list[str],
    typer.Argument(help="Files, folders or globs, the folder to write, settings.", metavar="IN... OUT [KEY=VALUE]..."),
]


def new_app(name: str, help: str) -> typer.Typer:
    """A group of verbs that looks like every other one."""
    return typer.Typer(
        name=name,
        help=help,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def paths_and_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What of `IN... OUT key=value...` are paths and what are settings; a file whose name looks like one is a path."""
    settings = [w for w in words if re.match(r"[a-z_.]+=", w) and not Path(w).exists()]
    return [w for w in words if w not in settings], settings
