"""A description of data (`apps.inspect`) on the terminal, the loss mask in colour."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from oriole.log import human

__all__ = ["MESSAGE_KEYS", "bar", "percent", "shortened", "show", "truncation_said"]

STYLES = {"trained": "green", "context": "bright_black", "mark": "magenta", "trained mark": "bold green reverse"}
"""How the runs of a document look; `apps.inspectpage` has the same in CSS."""
SHOWN_CHARS = 360
"""Characters of a document that are shown, two thirds from its beginning."""
BAR = 28
WIDE = 110
"""Columns of a terminal from which on tables show all they have."""
MOST_SOURCES = 24

Span = Sequence[str]
"""(kind, text)."""


def show(made: Mapping[str, Any], console: Console) -> None:
    """Print the whole description."""
    console.print(_title(made))
    for part in made["parts"]:
        _heading(console, part)
        console.print(_in(_counts(part, console.width)))
        if "lengths" in part:
            console.print(_in(_lengths(part)))
        if part.get("validation"):
            console.print(_in(_validation(part["validation"])))
        if part.get("skipped", {}).get("total"):
            console.print(_in(_skipped(part["skipped"])))
    if unread := made.get("unread"):
        console.print(Text(f"\n{len(unread)} files could not be read", style="yellow"))
        console.print(_in(Group(*(Text(reason) for reason in unread[:5]))))
    if made["batch"]:
        console.print(_batch(made["batch"]))
    for part in made["parts"]:
        if part["samples"]:
            console.print(Text(f"\nSamples{_of(part)}", style="bold"))
            for sample in part["samples"]:
                console.print(_in(_sample(sample)))


def _title(made: Mapping[str, Any]) -> Text:
    tok = made["tokenizer"]
    told = f"{tok['vocab_size']:,} ids" if tok else "no tokenizer (name one to count tokens: tokenizer=DIR)"
    return Text.assemble((made["path"], "bold"), f" · {made['what']} · ", told)


def _of(part: Mapping[str, Any]) -> str:
    return f" · {part['name']}" if part["name"] else ""


def _heading(console: Console, part: Mapping[str, Any]) -> None:
    total = part["total"]
    if not total:
        console.print(Text(f"\n{part['name'] or part['kind']}: nothing could be read", style="bold"))
        return
    head = f"\n{part['name']} · " if part["name"] else "\n"
    share = f" · {percent(part['share'])} of the training tokens" if "share" in part else ""
    tokens = f"{human(total['tokens'])} tokens in " if "tokens" in total else ""
    limited = " (and more: limit= stopped here)" if part.get("limited") else ""
    console.print(Text(f"{head}{tokens}{_unit(part['kind'], total['documents'])}{share}{limited}", style="bold"))


def _unit(kind: str, count: int) -> str:
    names = {"chat": "chats", "preference": "preference pairs", "feedback": "judged answers"}
    name = names.get(kind, "documents")
    return f"{count:,} {name.removesuffix('s') if count == 1 else name}"


def _in(content: RenderableType) -> Padding:
    return Padding(content, (0, 0, 0, 2))


def percent(share: float) -> str:
    """`0.1234` -> `12 %`; below ten with one digit after the point."""
    return f"{100 * share:.{0 if share >= 0.0995 or share == 0 else 1}f} %"


def bar(share: float, width: int = BAR) -> str:
    """A bar of that share of the width, in eighths of a character."""
    whole, rest = divmod(round(share * width * 8), 8)
    return "█" * whole + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[rest]


# --- counts ----------------------------------------------------------------------------------------------------------


def _counts(part: Mapping[str, Any], width: int) -> Table:
    """Sources and languages with their counts, the small ones together; characters and bars where there is room."""
    tokens = "tokens" in part["total"]
    main = "tokens" if tokens else "characters"
    names = ["documents", *(["tokens", "trained"] if tokens else []), "characters", "bytes"]
    names += ["bytes/token", "chars/token"] if tokens else ["bytes/char"]
    if tokens and width < WIDE:
        names.remove("characters")
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bright_black")
    grid.add_column("source", no_wrap=True, max_width=24)
    grid.add_column("lang", no_wrap=True)
    for name in names:
        grid.add_column(name.replace("/", "\n/") if width < WIDE else name, justify="right", no_wrap=True)
    grid.add_column(f"of the {main}", no_wrap=True)
    whole = max(1, part["total"].get(main, 0))
    rows = part["sources"]
    if len(rows) > MOST_SOURCES:
        rest = rows[MOST_SOURCES - 1 :]
        summed = {key: sum(row[key] for row in rest) for key in part["total"]}
        rows = [*rows[: MOST_SOURCES - 1], {"source": f"… {len(rest)} more", "lang": "", **summed}]
    size = 20 if width >= WIDE else 6
    for row in rows:
        share = row[main] / whole
        grid.add_row(*_cells(row, names), Text.assemble(f"{percent(share):>6} ", (bar(share, size), "cyan")))
    if len(rows) > 1:
        grid.add_row(*_cells({"source": "all", "lang": "", **part["total"]}, names), style="bold")
    return grid


def _cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    out = [row["source"] or "—", row["lang"]]
    for name in names:
        match name:
            case "documents":
                out.append(f"{row['documents']:,}")
            case "trained":
                out.append(percent(row["trained_tokens"] / max(1, row["tokens"])))
            case "bytes/token":
                out.append(f"{row['bytes'] / max(1, row['tokens']):.2f}")
            case "chars/token":
                out.append(f"{row['characters'] / max(1, row['tokens']):.2f}")
            case "bytes/char":
                out.append(f"{row['bytes'] / max(1, row['characters']):.2f}")
            case _:
                out.append(human(row[name]))
    return out


def _lengths(part: Mapping[str, Any]) -> Group:
    lengths, cut = part["lengths"], part["truncation"]
    most = max(step["documents"] for step in lengths["histogram"])
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bright_black")
    grid.add_column("length in tokens", justify="right")
    grid.add_column("documents", min_width=BAR + 8)
    grid.add_column("of the tokens", justify="right")
    tokens = part["total"]["tokens"]
    for step in lengths["histogram"]:
        bars = Text.assemble((bar(step["documents"] / most), "cyan"), f" {step['documents']:,}")
        grid.add_row(f"{step['from']:,}–{step['to']:,}", bars, percent(step["tokens"] / tokens))
    return Group(Text(""), grid, Text(truncation_said(lengths, cut)))


def truncation_said(lengths: Mapping[str, Any], cut: Mapping[str, Any]) -> str:
    """What the length of a row means for these documents, as a sentence or two."""
    said = f"median {lengths['median']:,}, longest {lengths['longest']:,} tokens; "
    if not cut["documents"]:
        return f"{said}none is longer than length={cut['length']:,}"
    return (
        f"{said}{cut['documents']:,} ({percent(cut['rate'])}) are longer than length={cut['length']:,}: "
        f"what lies beyond, {percent(cut['lost_rate'])} of all tokens, starts anew in another row"
    )


def _validation(validation: Mapping[str, Any]) -> Group:
    chats, sound = validation["chats"], validation["sound"]
    lines = [Text(f"\n{sound:,} of {chats:,} chats are sound", style="green" if sound == chats else "yellow")]
    lines += [Text(f"  {count:>6,}  {problem}") for problem, count in validation["problems"].items()]
    return Group(*lines)


def _skipped(skipped: Mapping[str, Any]) -> Group:
    lines = [Text(f"\n{skipped['total']:,} records could not be read", style="yellow")]
    return Group(*lines, *(Text(f"  {example}") for example in skipped["examples"][:5]))


# --- text with its mask ----------------------------------------------------------------------------------------------


def _batch(batch: Mapping[str, Any]) -> Group:
    out: list[RenderableType] = [
        Text(f"\n{batch['title']}: {batch['batch_size']} rows of {batch['length']:,} tokens", style="bold"),
        _in(
            Text(
                f"{percent(1 - batch['fill'])} padding · {percent(batch['trained'])} of the places are trained · "
                f"{batch['documents_per_row']:.1f} documents in a row"
            )
        ),
        _in(_legend()),
    ]
    for row in batch["rows"]:
        out.append(Text(f"\n  row {row['row'] + 1}", style="bold"))
        for n, document in enumerate(row["documents"], 1):
            head = (
                f"document {n} · positions {document['from']:,}–{document['to']:,} · "
                f"{document['trained_tokens']:,} of {document['tokens']:,} trained"
            )
            out.append(_in(Text.assemble(("▍ ", "cyan"), (head, "cyan"))))
            out.append(Padding(coloured(document["spans"]), (0, 0, 0, 4)))
        if row["padding"]:
            out.append(_in(Text(f"▍ padding: {row['padding']:,} {'░' * min(row['padding'], 40)}", "bright_black")))
    return Group(*out)


def _legend() -> Text:
    """What the colours mean."""
    return Text.assemble(
        ("trained", STYLES["trained"]), " · ", ("context, not trained", STYLES["context"]), " · ",
        ("<|role token|>", STYLES["mark"]), " · ", ("<|trained role token|>", STYLES["trained mark"]),
    )  # fmt: skip


def coloured(spans: Iterable[Span]) -> Text:
    """A document with its mask, shortened, line breaks as ⏎."""
    text = Text()
    for kind, run in shortened(spans, SHOWN_CHARS):
        text.append(run.replace("\n", "⏎").replace("\t", "⇥"), style=STYLES.get(kind, "yellow"))
    return text


def shortened(spans: Iterable[Span], limit: int) -> list[tuple[str, str]]:
    """The runs with the middle of a long document left out."""
    whole = [(kind, text) for kind, text in spans]
    total = sum(len(text) for _, text in whole)
    if total <= limit * 1.2:
        return whole
    head, tail = limit * 2 // 3, total - limit // 3
    out: list[tuple[str, str]] = []
    at = 0
    for kind, text in whole:
        first = text[: max(0, head - at)]
        last = text[max(0, tail - at) :]
        if first:
            out.append((kind, first))
        if at < tail <= at + len(text):
            out.append(("cut", f" … {tail - head:,} characters … "))
        if last:
            out.append((kind, last))
        at += len(text)
    return out


def _sample(sample: Mapping[str, Any]) -> Group:
    head = " · ".join(str(x) for x in (sample["source"] or "—", sample["lang"]) if x)
    if "spans" in sample:
        head = f"document {sample['document']:,} · {head} · {sample['tokens']:,} tokens"
        body: RenderableType = coloured(sample["spans"])
    elif "text" in sample:
        body = Text(_short(sample["text"]))
    else:
        body = Group(*(_messages(key, sample[key]) for key in MESSAGE_KEYS if key in sample))
        if "label" in sample:
            head += " · good" if sample["label"] else " · bad"
    return Group(Text.assemble(("▍ ", "cyan"), (head, "cyan")), Padding(body, (0, 0, 0, 2)))


MESSAGE_KEYS = ("messages", "prompt", "chosen", "rejected", "completion")


def _messages(key: str, messages: Sequence[Mapping[str, str]]) -> Text:
    text = Text()
    for n, message in enumerate(messages):
        name = message["role"] if key == "messages" else f"{key} · {message['role']}"
        style = "green" if message["role"] == "assistant" and key != "rejected" else ""
        text.append("\n" if n else "").append(f"{name}  ", style="magenta").append(
            _short(message["content"]), style=style
        )
    return text


def _short(text: str) -> str:
    return "".join(run for _, run in shortened([("", text)], SHOWN_CHARS)).replace("\n", "⏎").replace("\t", "⇥")
