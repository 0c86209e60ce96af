"""`oriole tokenizer …`: train, look at, check and extend tokenizers."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oriole.cli.common import Json, new_app
from oriole.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from rich.table import Table

    from oriole.text.files import Skipped
    from oriole.text.tokenizer import Tokenizer

__all__ = ["app"]

app = new_app("tokenizer", "Train, report on, show, check and extend tokenizers.")

Folder = Annotated[Path, typer.Argument(help="A folder with a tokenizer.json: a tokenizer's, a model's or a run's.")]
Inputs = Annotated[
    list[str], typer.Argument(help="Files, folders or globs, then settings.", metavar="IN... [KEY=VALUE]...")
]

_COLOURS = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")
_VISIBLE = str.maketrans({" ": "·", "\t": "⇥", "\n": "⏎", "\r": "␍", "\0": "␀"})


@app.command(epilog="Example: oriole tokenizer train DATA/*.jsonl.xz out=tokenizer vocab_size=16384")
def train(words: Inputs, as_json: Json = False) -> None:
    """Learn a vocabulary from text and chats, in memory that does not grow with them; kind=char: single characters."""
    from oriole.config import parse_overrides, validate
    from oriole.log import human, say
    from oriole.text.clean import language
    from oriole.text.formats import Skipped, expand
    from oriole.text.kinds import read_texts
    from oriole.text.tokenizer import TrainConfig, train_tokenizer

    paths, settings = _split(words)
    config = validate(TrainConfig, parse_overrides(settings), "oriole tokenizer train")
    if (config.out / "tokenizer.json").exists():
        raise ConfigError(
            f"out={config.out} holds a tokenizer already, and models may depend on it; name another folder"
        )
    skipped = Skipped() if config.skip_bad else None
    start = time.perf_counter()
    docs = read_texts(expand(paths), skipped)
    texts: Iterator[tuple[str, str]] = ((doc.lang or language(doc.text), doc.text) for doc in docs)
    texts = _then_say(texts, f"learning {config.vocab_size:,} ids" if config.kind == "bpe" else "choosing characters")
    tokenizer = train_tokenizer(texts, config.vocab_size, int(config.sample_mb * 1e6), config.seed, config.kind)
    tokenizer.save(config.out)
    seconds = time.perf_counter() - start
    _tell_skipped(skipped)
    if as_json:
        print(json.dumps({"out": str(config.out), "vocab_size": tokenizer.vocab_size, "kind": tokenizer.kind,
                          "fingerprint": tokenizer.fingerprint(), "seconds": seconds}))  # fmt: skip
        return
    say(f"{tokenizer.vocab_size:,} ids in {config.out}, learnt in {human(seconds)} s")
    if config.kind == "char" and tokenizer.vocab_size < config.vocab_size:
        say(f"the text has no more characters than that; a model for it needs vocab_size={tokenizer.vocab_size}")
    say(f"next: oriole tokenizer report {config.out} {' '.join(paths)}")


@app.command(epilog="Example: oriole tokenizer show runs/demo '两个黄鹂 sing 🎉'")
def show(
    folder: Folder,
    text: Annotated[str | None, typer.Argument(help="A text to cut into tokens; without one, the vocabulary.")] = None,
    as_json: Json = False,
) -> None:
    """The tokens of a text, each with its id and bytes; without a text, what the vocabulary holds."""
    from rich.console import Console
    from rich.text import Text

    from oriole.text.tokreport import describe, overview

    tokenizer = _load(folder)
    if text is None:
        made = overview(tokenizer)
        if as_json:
            print(json.dumps(made, ensure_ascii=False))
        else:
            Console().print(_overview_table(made))
        return
    rows = describe(tokenizer, text)
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    line, table = Text(), _table("token", "id>", "bytes", "text", "")
    for n, row in enumerate(rows):
        colour = _COLOURS[n % len(_COLOURS)]
        shown = "".join(f"‹{b}›" for b in row["bytes"].split()) if row["part"] else row["text"].translate(_VISIBLE)
        line.append(shown, colour)
        table.add_row(str(n), str(row["id"]), row["bytes"], Text(shown, colour), row["part"])
    console = Console(highlight=False)
    console.print(line)
    console.print(table)
    console.print(f"{len(rows)} tokens, {len(text)} characters, {len(text) / max(1, len(rows)):.2f} characters a token")


@app.command(epilog="Example: oriole tokenizer check runs/demo/tokenizer")
def check(
    path: Annotated[Path, typer.Argument(help="A folder with a tokenizer.json, or any such file, Oriole's or not.")],
    as_json: Json = False,
) -> None:
    """Whether any text comes back whole, role tokens cannot be typed, streams and template are right; exit 2 if not."""
    from rich.console import Console

    from oriole.text.tokcheck import check_tokenizer

    path = _folder(path)
    findings = check_tokenizer(path)
    failed = [f for f in findings if not f.ok]
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [f._asdict() for f in findings]}, ensure_ascii=False))
    else:
        table = _table("", "question", "what was seen")
        for finding in findings:
            table.add_row("[green]✓[/]" if finding.ok else "[red]✗[/]", finding.name, _plain(finding.detail))
        Console(highlight=False).print(table)
    if failed:
        raise ModelError(
            f"{path} fails {len(failed)} of {len(findings)} checks: "
            + "; ".join(f"{f.name} ({f.detail})" for f in failed[:4])
            + (f"; and {len(failed) - 4} more" if len(failed) > 4 else "")
        )


@app.command(epilog="Example: oriole tokenizer add runs/demo/tokenizer 黄鹂 GPT-4 out=tokenizer")
def add(
    folder: Folder,
    words: Annotated[list[str], typer.Argument(help="Tokens to add, and out=DIR.", metavar="TOKEN... out=DIR")],
    as_json: Json = False,
) -> None:
    """Add tokens behind the last id: every id there was keeps its meaning. The model's embedding must then grow."""
    from oriole.log import say

    outs = [w.removeprefix("out=") for w in words if w.startswith("out=")]
    tokens = [w for w in words if not w.startswith("out=")]
    if len(outs) != 1 or not outs[0] or not tokens:
        raise ConfigError("oriole tokenizer add needs at least one token and one out=DIR")
    out, folder = Path(outs[0]), _folder(folder)
    old = _load(folder)
    new = old.with_tokens(tokens)
    added = new.added[len(old.added) :]
    known = [t for t in dict.fromkeys(tokens) if t not in added]
    if not added:
        raise ConfigError(f"{folder} has a token for each of {', '.join(known)} already; nothing to add")
    if (out / "tokenizer.json").exists() and out.resolve() != folder.resolve():
        raise ConfigError(
            f"out={out} holds another tokenizer already, and models may depend on it; name another folder"
        )
    new.save(out, **_saved_as(folder))
    result: dict[str, Any] = {
        "out": str(out), "vocab_size": new.vocab_size, "before": old.vocab_size,
        "added": {token: old.vocab_size + i for i, token in enumerate(added)}, "known": known,
    }  # fmt: skip
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    for token, id in result["added"].items():
        print(f"{id}\t{token}")
    if known:
        say(f"in the vocabulary already: {', '.join(known)}")
    say(
        f"{out} has {new.vocab_size:,} ids, {folder} had {old.vocab_size:,}: a model of the old one must "
        f"grow its embedding by {new.vocab_size - old.vocab_size} rows and learn them before it can use this tokenizer",
        "yellow",
    )


@app.command(epilog="Example: oriole tokenizer report tokenizer DATA/*.jsonl peer=other/tokenizer.json --json")
def report(folder: Folder, words: Inputs, as_json: Json = False) -> None:
    """Characters and bytes per token by language and source, the vocabulary's use, and its unreadable pieces."""
    from rich.console import Console

    from oriole.config import parse_overrides, validate
    from oriole.text.formats import Skipped, expand
    from oriole.text.kinds import read_texts
    from oriole.text.tokreport import ReportConfig, load_any
    from oriole.text.tokreport import report as make

    paths, settings = _split(words)
    config = validate(ReportConfig, parse_overrides(settings), "oriole tokenizer report")
    tokenizer = _load(folder)
    peers = {peer: load_any(Path(peer)) for peer in config.peer}
    skipped = Skipped() if config.skip_bad else None
    made = make(tokenizer, read_texts(expand(paths), skipped), peers)
    _tell_skipped(skipped)
    if as_json:
        print(json.dumps(made, ensure_ascii=False))
        return
    console = Console(highlight=False)
    for table in _report_tables(made):
        console.print(table)
    vocabulary = made["vocabulary"]
    used = ", ".join(f"{lang} {share:.1%}" for lang, share in vocabulary["used_by"].items())
    console.print(f"Of {made['vocab_size']:,} ids this text uses {vocabulary['used']:.1%} ({used}).")
    if vocabulary["unused_examples"]:
        console.print(
            _plain("Never used: " + " ".join(t.translate(_VISIBLE) for t in vocabulary["unused_examples"][:10]))
        )


# --- words and folders -----------------------------------------------------------------------------------------------


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths, and settings: words like `key=value` that are no file."""
    settings = [w for w in words if re.match(r"[a-z_]+=", w) and not Path(w).exists()]
    paths = [w for w in words if w not in settings]
    if not paths:
        raise ConfigError("name the text: files, folders or globs of jsonl, json, txt or md")
    return paths, settings


def _then_say(texts: Iterator[tuple[str, str]], message: str) -> Iterator[tuple[str, str]]:
    """The texts, and a remark once all are read: learning takes a while, and shows no progress."""
    from oriole.log import say

    yield from texts
    say(message)


def _folder(path: Path) -> Path:
    """The path, or the tokenizer of the run that it is."""
    inside = path / "tokenizer"
    return inside if not (path / "tokenizer.json").exists() and (inside / "tokenizer.json").exists() else path


def _load(path: Path) -> "Tokenizer":
    from oriole.text.tokenizer import Tokenizer

    return Tokenizer.load(_folder(path))


def _saved_as(folder: Path) -> dict[str, Any]:
    """End mark and context of the folder's tokenizer_config.json, so that a copy keeps them."""
    from oriole.text.tokenizer import IM_END, RESERVED

    file = folder / "tokenizer_config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return {"chat": config["eos_token"] == RESERVED[IM_END], "context": int(config["model_max_length"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} cannot be read ({error!r}); copy it again or remove it") from error


def _tell_skipped(skipped: "Skipped | None") -> None:
    from oriole.log import say

    if skipped is not None and skipped.total:
        say(f"{skipped.total:,} records were left out, the first: {skipped.examples[0]}", "yellow")


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(*columns: str) -> "Table":
    """A table; a column whose name ends in > is aligned to the right."""
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left")
    return table


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _overview_table(made: Mapping[str, Any]) -> "Table":
    table = _table("what", "ids>", "examples")
    table.title = f"{made['vocab_size']:,} ids, kind {made['kind']}"
    for row in made["groups"]:
        table.add_row(row["what"], f"{row['ids']:,}", _plain("  ".join(t.translate(_VISIBLE) for t in row["examples"])))
    return table


def _short(path: str) -> str:
    """A name for a peer: its folder's, where the file is called as they all are."""
    given = Path(path)
    return given.parent.name if given.name == "tokenizer.json" and given.parent.name else given.name


def _report_tables(made: Mapping[str, Any]) -> list["Table"]:
    from oriole.log import human

    rows = [(lang, "all", row) for lang, row in made["languages"].items()]
    rows += [(row["lang"], row["source"], row) for row in made["sources"]]
    peers = list(next((row["peers"] for _, _, row in rows), {}))
    table = _table(
        "", "source", "docs>", "characters>", "tokens>", "chars/token>", "bytes/token>", "tokens/word>",
        *(f"{_short(peer)}>" for peer in peers),
    )  # fmt: skip
    table.caption = "tokens/word: a Han character counts as a word" + "; then chars/token of the others" * bool(peers)
    for n, (lang, source, row) in enumerate(rows, 1):
        own = row["characters_per_token"]
        theirs = [row["peers"][peer]["characters_per_token"] for peer in peers]
        table.add_row(
            lang, _plain(source), human(row["docs"]), human(row["characters"]), human(row["tokens"]), f"{own:.3f}",
            f"{row['bytes_per_token']:.3f}", f"{row['fertility']:.3f}",
            *(f"{each:.3f} ({each / own - 1:+.1%})" for each in theirs), end_section=n == len(made["languages"]),
        )  # fmt: skip
    unreadable = made["unreadable"]
    pieces = _table("id>", "bytes", "uses>", "what it is")
    pieces.title = (
        f"{unreadable['ids']:,} ids are no text by themselves ({unreadable['single_bytes']} are single bytes); "
        f"{unreadable['share_of_tokens']:.2%} of the tokens"
    )
    for row in unreadable["examples"][:15]:
        pieces.add_row(str(row["id"]), row["bytes"], f"{row['uses']:,}", _plain(row["meaning"]))
    return [table, pieces]
