"""What goes on inside a model (`apps.inside`) as a page of HTML that needs nothing else and opens without a network.

A section stands there when the model has the thing. The only script, which chooses a head, an expert and a token
(`insidemaps`), is known to the page's policy by its hash; whatever comes from the text or the tokenizer is escaped.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from oriole.apps import insidedraw as draw
from oriole.apps.charts import visible
from oriole.apps.insidemaps import about, chip, labels
from oriole.apps.insidemaps import sections as maps
from oriole.apps.insidetext import figures, size
from oriole.apps.reportpage import frame
from oriole.errors import raise_for_os_error
from oriole.log import human
from oriole.text.work import new_file

__all__ = ["depths", "lens_cells", "page", "stream_curves", "write_page"]

KINDS = {"zh": "Chinese", "en": "letters", "other": "digits, marks, blanks", "bytes": "part of a character",
         "mark": "role token"}  # fmt: skip


def write_page(made: Mapping[str, Any], path: Path) -> None:
    """Write the page to a file; `ResourceError` when that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(page(made).encode("utf-8", "replace"))
    except OSError as error:
        raise_for_os_error(error, "writing", path)


def page(made: Mapping[str, Any]) -> str:
    """The whole page."""
    here = Path(__file__)
    sections = [
        ("tokens", "Tokens", _tokens(made)),
        ("embeddings", "Embeddings", _embeddings(made)),
        *maps(made),
        ("stream", "Residual stream", _streams(made)),
        ("lens", "Logit lens", _lens(made)),
        ("steps", "Reasoning steps", _steps(made)),
        ("next", "What comes next", _next(made)),
    ]
    whose, losses, spread = figures(made)
    tokens, layers = size(made)
    lead = [
        (tokens, "tokens"),
        (f"{layers} × {made['heads']}", "layers × heads"),
        *([(f"{fmean(losses):.2f}", f"loss{whose}, nats a token")] if losses else []),
        (f"{fmean(spread):.2f}", f"entropy{whose}, nats"),
        (human(made["parameters"]), "parameters"),
        (f"{made['vocab_size']:,}", "ids in the vocabulary"),
    ]
    return frame(
        f"Inside {_name(Path(made['model']))}",
        lead,
        sections,
        style=draw.SVG_STYLE + here.with_suffix(".css").read_text(encoding="utf-8"),
        script=here.with_suffix(".js").read_text(encoding="utf-8"),
    )


def _name(folder: Path) -> str:
    """A short name of a model folder: run and stage where it lies in one."""
    parts = [part for part in folder.parts if part != folder.anchor]
    return "/".join(parts[-3:-1] if parts[-1:] == ["model"] and len(parts) > 2 else parts[-1:])


# --- tokens ----------------------------------------------------------------------------------------------------------


def _tokens(made: Mapping[str, Any]) -> str:
    source, written = made["source"], made["written"]
    sides = [made] if source is None else [source, made]
    tokens = [token for side in sides for token in side["tokens"]]
    kinds = [kind for kind in KINDS if any(token["kind"] == kind for token in tokens)]
    legend = "".join(f'<span><i class="c{draw.KINDS[kind]}"></i>{KINDS[kind]}</span>' for kind in kinds)
    if written < len(made["tokens"]):
        legend += '<span><i class="c4"></i>underlined: written by the model</span>'
    split = (
        " A dashed frame holds a character whose bytes (three for most Chinese ones) lie in several tokens."
        if any(side["split"] for side in sides)
        else ""
    )
    reads = "The text as the model reads it, each token with its id."
    if source is None:
        chips = _row(made, written)
    else:
        reads = "What the encoder reads and what the decoder writes behind its start mark, each token with its id."
        chips = f"<h3>Source</h3>{_row(source)}<h3>Answer</h3>{_row(made, written)}"
    return about(f"{reads}{split} ␣ is a blank, ⏎ a line break.") + f'<div class="kinds">{legend}</div>{chips}'


def _row(side: Mapping[str, Any], written: int | None = None) -> str:
    """The tokens of a side with their ids; the model wrote those from `written` on."""
    chips = [
        chip(
            token, written is not None and n >= written, f"<small>{token['id']}</small>",
            f' title="{n + 1}: bytes {token["bytes"] or "none"}"',
        )
        for n, token in enumerate(side["tokens"])
    ]  # fmt: skip
    out, at = [], 0
    for chars, first, last in _joined(side["split"]):
        out += chips[at:first]
        inner = "".join(chips[first : last + 1])
        out.append(f'<span class="shared"><b>{visible(chars)}</b><span class="in">{inner}</span></span>')
        at = last + 1
    return f'<div class="chips">{"".join([*out, *chips[at:]])}</div>'


def _joined(split: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Shared characters, those that have a token in common as one."""
    out: list[tuple[str, int, int]] = []
    for each in split:
        if out and each["from"] <= out[-1][2]:
            out[-1] = (out[-1][0] + each["text"], out[-1][1], each["to"])
        else:
            out.append((each["text"], each["from"], each["to"]))
    return out


# --- embeddings ------------------------------------------------------------------------------------------------------


def _embeddings(made: Mapping[str, Any]) -> str:
    table, tokens = made["embedding"], [*(made["source"] or {"tokens": []})["tokens"], *made["tokens"]]
    first = {token["id"]: n for n, token in reversed(list(enumerate(tokens)))}
    most = max(table["norms"]) or 1.0
    rows = []
    for n in sorted(first.values()):
        near = "".join(
            f"<span>{visible(draw.sign(word))} <small>{cosine:.2f}</small></span>"
            for word, cosine in table["neighbours"][tokens[n]["id"]]
        )
        norm = table["norms"][n]
        meter = f'<i class="meter" style="width:{60 * norm / most:.0f}px"></i>'
        rows.append(
            f'<tr><th class="tok">{visible(draw.sign(tokens[n]["text"]))}</th>'
            f'<td>{norm:.2f}{meter}</td><td class="near">{near}</td></tr>'
        )
    picture = ""
    if plane := table["map"]:
        by_id = {token["id"]: token for token in tokens}
        shown = [by_id[i] for i in plane["ids"]]
        share = " and ".join(f"{100 * s:.0f} %" for s in plane["shares"])
        svg = draw.plane(plane["points"], [t["text"] for t in shown], [t["kind"] for t in shown], "embeddings, by PCA")
        picture = f'<div class="pic fit">{svg}</div>' + about(
            f"The text's tokens by the two directions in which their embeddings differ most (PCA; {share} of their "
            "variance): two numbers in place of hundreds, so what lies far apart is far apart, but what lies close "
            "together need not be close."
        )
    heads = "".join(f"<th>{word}</th>" for word in ("token", "norm", "nearest by cosine"))
    return (
        about(
            "Each id is a row of the embedding table. Its length, and the rows of the whole vocabulary that point the "
            f"same way (cosine beside them); the mean length in the vocabulary is {table['mean_norm']:.2f}."
        )
        + picture
        + f'<div class="wide"><table class="numbers"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


# --- depths ----------------------------------------------------------------------------------------------------------


def stream_curves(side: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Mean norms over the positions behind the first, where they are often of another size, by layer."""
    after = slice(1, None) if len(side["tokens"]) > 1 else slice(None)

    def curve(rows: Sequence[Sequence[float]], first: int) -> list[tuple[float, float]]:
        return [(n, fmean(row[after])) for n, row in enumerate(rows, first)]

    across = side.get("crossed")
    return {
        "the stream": curve(side["residual"], 0),
        "attention adds": curve(side["attended"], 1),
        **({"cross-attention": curve(across, 1)} if across else {}),
        "the MLP adds": curve(side["transformed"], 1),
    }


def _streams(made: Mapping[str, Any]) -> str:
    source = made["source"]
    what = "attention and MLP" if source is None else "attention, cross-attention and MLP"
    after = "adds to it" if made["norm_at"] == "pre" else "adds to it; a norm behind each sum scales it anew"
    words = about(
        f"Every layer reads this vector and {after}. Its length after each layer (0: the embedding), and how much "
        f"{what} add, as means over all tokens but the first."
    )
    if source is None:
        return words + _stream(made)
    return f"{words}<h3>Encoder</h3>{_stream(source)}<h3>Decoder</h3>{_stream(made)}"


def _stream(side: Mapping[str, Any]) -> str:
    most = max(max(row) for row in side["residual"]) or 1.0
    rows = [
        [
            (f"{v:.1f}", v / most, f"{draw.sign(token['text'])}: {v:.2f}")
            for v, token in zip(row, side["tokens"], strict=True)
        ]
        for row in reversed(side["residual"])
    ]
    return (
        f'<div class="pic fit curves">{draw.layers_chart(stream_curves(side), "Euclidean norm")}</div>'
        "<h3>Token by token</h3>"
        f'<div class="pic">{draw.grid(rows, depths(side), labels(side), "norms by layer")}</div>'
    )


def depths(made: Mapping[str, Any]) -> list[str]:
    """The names of the places in the residual stream, the last layer first."""
    return [*(f"layer {n}" for n in range(made["layers"], 0, -1)), "embedding"]


def lens_cells(depths: Iterable[Sequence[Any]]) -> list[list[tuple[str, float, str]]]:
    """Of each depth and position the likeliest next token, its probability, the runners-up."""
    return [
        [
            (top[0][0], top[0][1], " · ".join(f"{draw.sign(word)} {100 * p:.1f} %" for word, p in top))
            for top in row
        ]
        for row in depths
    ]  # fmt: skip


def _lens(made: Mapping[str, Any]) -> str:
    svg = draw.grid(
        lens_cells(reversed(made["lens"])), depths(made), labels(made), "the likeliest next token at each depth"
    )
    # Behind the blocks a latent block, where there is one, goes on: the steps below are its predictions.
    last = "" if made["steps"] else "; the uppermost row is the model's own prediction"
    whose = "the decoder" if made["source"] else "the model"
    reader = "its final norm and head" if made["norm_at"] == "pre" else "its head"
    return (
        about(
            f"What {whose} would say next if it stopped at a layer: {reader}, put on the stream of every depth. A "
            f"stronger colour is more certain{last}. A pointer on a cell shows the runners-up."
        )
        + f'<div class="pic">{svg}</div>'
    )


def _steps(made: Mapping[str, Any]) -> str:
    """Iterations of the latent block, the last one first; nothing for a model without."""
    steps = made["steps"]
    if not steps:
        return ""
    names = [f"step {n}" for n in range(len(steps), 0, -1)]
    sure = [
        [
            (f"{100 * c:.0f} %", c, f"after {draw.sign(token['text'])}")
            for c, token in zip(row, made["tokens"], strict=True)
        ]
        for row in (step["confidence"] for step in reversed(steps))
    ]
    said = draw.grid(
        lens_cells(step["lens"] for step in reversed(steps)), names, labels(made), "what each iteration says"
    )
    return (
        about(
            "Behind the last layer a latent block is applied again and again before anything is said. What each "
            "iteration would say next; the uppermost row is the model's prediction."
        )
        + f'<div class="pic">{said}</div>'
        + about("How sure its confidence head is that this is right. In use a token goes no further once it is sure.")
        + f'<div class="pic">{draw.grid(sure, names, labels(made), "confidence of each iteration")}</div>'
    )


# --- what comes next -------------------------------------------------------------------------------------------------


def _next(made: Mapping[str, Any]) -> str:
    tokens, written = made["tokens"], made["written"]
    shown = written if written < len(tokens) else len(tokens)  # the place whose ten likeliest lie open, from 1
    most = max(n["entropy"] for n in made["next"]) or 1.0
    heads = "".join(f"<span>{word}</span>" for word in ("", "after", "comes, with a loss of", "entropy", "likeliest"))
    out = [f'<div class="posh">{heads}</div>']
    for n, (token, what) in enumerate(zip(tokens, made["next"], strict=True)):
        following = tokens[n + 1]["text"] if n + 1 < len(tokens) else None
        then = "the end of the text"
        if following is not None:
            rank = "" if what["rank"] == 1 else f" · rank {what['rank']:,}"
            then = f"<b>{visible(draw.sign(following))}</b> <small>{what['loss']:.2f}{rank}</small>"
        three = " · ".join(f"{visible(draw.sign(word))} <small>{_share(p)}</small>" for word, p in what["top"][:3])
        bars = "".join(
            f"<span{' class=is' if word == following else ''}>{visible(draw.sign(word))}</span>"
            f'<span><i style="width:{100 * p:.1f}%"></i></span><b>{_share(p)}</b>'
            for word, p in what["top"]
        )
        entropy = f'<i style="width:{90 * what["entropy"] / most:.0f}px"></i><small>{what["entropy"]:.2f}</small>'
        opened = " open" if n + 1 == shown else ""
        own = " own" if n >= written else ""
        out.append(
            f'<details class="pos{own}"{opened}><summary><span class="n">{n + 1}</span>'
            f"<span>{visible(draw.sign(token['text']))}</span>"
            f'<span class="then">{then}</span><span class="ent">{entropy}</span>'
            f'<span class="three">{three}</span></summary>'
            f'<div class="inside bars">{bars}</div></details>'
        )
    return about(
        "After each token the model gives every id of the vocabulary a probability. The loss is −ln of the one that "
        "does come (nats); the entropy says over how many the model is in doubt: e to its power. Open a row for the "
        "ten likeliest."
    ) + "".join(out)


def _share(p: float) -> str:
    return f"{100 * p:.0f} %" if p >= 0.095 else f"{100 * p:.1f} %"
