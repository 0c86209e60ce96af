"""From a recipe's files to its tokenizer and token shards; made once in the run folder and found again later."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from oriole.errors import ConfigError, DataError
from oriole.log import say
from oriole.text.clean import language, normalise
from oriole.text.formats import Doc, Skipped, expand, read_chats, read_docs
from oriole.text.pack import HELDOUT
from oriole.text.shards import Shards, View, encode_chats, encode_docs, encode_questions, held_out, write_shards
from oriole.text.template import Chat
from oriole.text.tokenizer import Tokenizer, train_tokenizer
from oriole.train.recipe import Part, Recipe

__all__ = ["data_root", "make_shards", "make_tokenizer", "measured", "part_of", "weighted"]

PACKING_SLACK = 1.02
"""Shards of a run limited by `train.tokens` hold this much more than its share, for the holes of packing."""

Row = tuple[Sequence[int], Sequence[int] | None, str]
"""Token ids (n,), loss mask (n,) or None for all ones, and the source's name of one document."""


def make_tokenizer(recipe: Recipe, init: Path | None) -> Tokenizer:
    """The parent model's tokenizer, the run's, the one the recipe names, or a newly trained one."""
    if init is not None:
        return Tokenizer.load(init)
    folder = recipe.run / "tokenizer"
    if recipe.tokenizer.path is not None:
        return Tokenizer.load(recipe.tokenizer.path)
    packed = [part.shards for part in recipe.parts.values() if part.shards is not None]
    if packed:
        tokenizer = Tokenizer.load(packed[0] / "tokenizer")
        tokenizer.save(folder, chat=False)
        return tokenizer
    if (folder / "tokenizer.json").exists():
        return Tokenizer.load(folder)
    table = recipe.tokenizer
    say(f"training a tokenizer with {table.vocab_size:,} ids on up to {table.sample_mb:g} MB of text")
    texts = itertools.chain.from_iterable(
        _interleave(_texts(recipe, name, part) for name, part in recipe.parts.items())
    )
    tokenizer = train_tokenizer(texts, table.vocab_size, sample_bytes=int(table.sample_mb * 1e6), kind=table.kind)
    tokenizer.save(folder, chat=False)
    return tokenizer


def _texts(recipe: Recipe, name: str, part: Part) -> Iterator[tuple[str, str]]:
    """(language, text) of the training documents of one part."""
    paths = expand(part.files, data_root(recipe))
    match recipe.format_of(part):
        case "text":
            texts = (doc.text for doc in _docs(recipe, part, paths, "train", _skipped(recipe)))
        case "chat" | "question":
            chats = _chats(recipe, part, paths, "train", _skipped(recipe))
            texts = ("\n".join(m.content for m in chat.messages) for chat in chats)
        case "preference" | "prompt" as kind:
            raise ConfigError(f"a tokenizer is not learnt from {kind} data; start from a model (init=FOLDER)")
    for text in texts:
        yield (name if name in ("zh", "en") else language(text)), text


def _skipped(recipe: Recipe) -> Skipped | None:
    """Where records that do not fit are counted; None where they stop the run."""
    return Skipped() if recipe.skip_bad else None


def _docs(recipe: Recipe, part: Part, paths: Sequence[Path], split: str, skipped: Skipped | None) -> Iterator[Doc]:
    """Normalised documents that belong to the split; empty ones have nothing to teach and are left out."""
    for doc in read_docs(paths, skip_bad=skipped):
        text = normalise(doc.text)
        if text.strip() and (part.val or held_out(text, recipe.eval.holdout) == (split == "val")):
            yield replace(doc, text=text)


def _chats(recipe: Recipe, part: Part, paths: Sequence[Path], split: str, skipped: Skipped | None) -> Iterator[Chat]:
    for chat in read_chats(paths, skip_bad=skipped):
        key = "\x00".join(m.content for m in chat.messages)
        if part.val or held_out(key, recipe.eval.holdout) == (split == "val"):
            yield chat


def _rows(
    recipe: Recipe, part: Part, paths: Sequence[Path], split: str, tokenizer: Tokenizer, skipped: Skipped | None
) -> Iterator[Row]:
    match recipe.format_of(part):
        case "text":
            return encode_docs(_docs(recipe, part, paths, split, skipped), tokenizer)
        case "chat":
            return encode_chats(_chats(recipe, part, paths, split, skipped), tokenizer)
        case "question":
            return encode_questions(_chats(recipe, part, paths, split, skipped), tokenizer)
        case "preference" | "prompt" as kind:
            raise ConfigError(
                f"{recipe.stage} has no tokens of {kind} data to read; give a part the format text or chat"
            )


def _first_tokens(rows: Iterator[Row], limit: int) -> Iterator[Row]:
    """Rows from the front until `limit` tokens have been given out."""
    for ids, mask, source in rows:
        yield ids, mask, source
        limit -= len(ids)
        if limit <= 0:
            return


def _interleave(streams: Iterable[Iterator[tuple[str, str]]]) -> Iterator[list[tuple[str, str]]]:
    """One item of every stream in turn until all have ended, so that a bounded sample sees each language early."""
    for group in itertools.zip_longest(*streams):
        yield [item for item in group if item is not None]


def data_root(recipe: Recipe) -> Path:
    """The folder that a recipe's globs are relative to; `DataError` when it is none."""
    root = Path(recipe.data)
    if not root.is_dir():
        raise DataError(f"data={recipe.data} is not a folder; pass data=FOLDER with the files {_globs(recipe)}")
    return root


def _globs(recipe: Recipe) -> str:
    return ", ".join(glob for part in recipe.parts.values() for glob in part.files)


# --- shards ----------------------------------------------------------------------------------------------------------


def make_shards(recipe: Recipe, tokenizer: Tokenizer) -> tuple[dict[str, Shards | View], dict[str, Shards | View]]:
    """Training and validation shards of every part, made where they are missing or made from other files."""
    train: dict[str, Shards | View] = {}
    val: dict[str, Shards | View] = {}
    for name, part in recipe.parts.items():
        if part.shards is not None:
            train[name] = _packed(part, part.shards, tokenizer, name)
        else:
            train[name] = _part_shards(recipe, tokenizer, name, part, "train", _token_limit(recipe, name))
        # A replay is there against forgetting, not to be measured; distillation has formats of either kind.
        if part.format is not None and recipe.stage not in ("distill", "seq2seq"):
            continue
        val[name] = _validation(recipe, tokenizer, name, part)
    return train, val


def measured(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Shards | View]:
    """The validation shards of a preference stage's text and chats: nothing of these parts is trained on there."""
    return {
        name: _validation(recipe, tokenizer, name, part)
        for name, part in recipe.parts.items()
        if recipe.format_of(part) in ("text", "chat")
    }


def _validation(recipe: Recipe, tokenizer: Tokenizer, name: str, part: Part) -> Shards | View:
    if part.shards is not None and not part.val:
        return _packed(part, part.shards / HELDOUT, tokenizer, name)
    return _part_shards(recipe, tokenizer, name, part, "val", recipe.eval.tokens)


def _packed(part: Part, folder: Path, tokenizer: Tokenizer, name: str) -> Shards | View:
    """The documents of a packed folder that a part asks for; refused where another tokenizer made them."""
    if folder.name == HELDOUT and not (folder / "index.json").exists():
        raise DataError(
            f"{folder.parent} has no held-out documents to validate parts.{name} with; pack it with heldout=0.005, or "
            f"name files: parts.{name}.val"
        )
    shards = Shards.open(folder)
    if shards.tokenizer != tokenizer.fingerprint():
        raise DataError(f"parts.{name}: {folder} was packed with another tokenizer than the model's; pack it again")
    chosen = part_of(part, shards)
    if not len(chosen):
        known = ", ".join(filter(None, shards.langs)) or "no languages"
        raise DataError(f"parts.{name}: {folder} holds no documents with lang = '{part.lang}'; it holds {known}")
    return chosen


def part_of(part: Part, shards: Shards) -> Shards | View:
    """The documents of a packed folder in the language that the part names."""
    return View(shards, shards.where(lang=part.lang)) if part.lang else shards


def _token_limit(recipe: Recipe, name: str) -> int | None:
    """How many tokens of a part a run of `train.tokens` can use; None: all of them."""
    if recipe.train.tokens is None:
        return None
    share = recipe.parts[name].weight / sum(p.weight for p in recipe.parts.values())
    if recipe.stage == "seq2seq":  # what is counted are targets, of which a text gives so many only
        share /= recipe.seq2seq.noise
    return int(recipe.train.tokens * share * PACKING_SLACK) + recipe.train.length


def _part_shards(recipe: Recipe, tokenizer: Tokenizer, name: str, part: Part, split: str, limit: int | None) -> Shards:
    root = data_root(recipe)
    paths = expand(part.val if split == "val" and part.val else part.files, root)
    files = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    made_from = [
        recipe.format_of(part),
        split,
        files,
        bool(part.val),
        recipe.eval.holdout,
        recipe.skip_bad,
        limit,
        tokenizer.fingerprint(),
    ]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    folder = recipe.run / "shards" / f"{recipe.stage}-{name}-{split}-{key}"
    if folder.exists():
        return Shards.open(folder)

    skipped = _skipped(recipe)
    chosen = _rows(recipe, part, paths, split, tokenizer, skipped)
    if limit is not None:
        chosen = _first_tokens(chosen, limit)
    try:
        made = write_shards(chosen, tokenizer, folder)
        if skipped is not None and skipped.total:
            say(f"{skipped.total:,} bad records skipped, for example: {skipped.examples[0]}", "yellow")
        return made
    except DataError as error:
        where = f"{split} part '{name}' of {recipe.stage}, from {', '.join(map(str, paths))}"
        raise DataError(f"{error} ({where})") from error


def weighted(recipe: Recipe, train: Mapping[str, Shards | View]) -> tuple[dict[str, View], dict[str, float]]:
    """The mixture's parts and their token shares: single sources a recipe names become parts of their own."""
    parts: dict[str, View] = {}
    shares: dict[str, float] = {}
    for name, given in train.items():
        part = recipe.parts[name]
        shards = given if isinstance(given, View) else View(given, np.arange(len(given)))
        rest = np.ones(len(shards), dtype=bool)
        for source, share in part.sources.items():
            if source not in shards.sources:
                say(f"parts.{name}.sources names '{source}', but the data has none of it; left out", "yellow")
                continue
            chosen = shards.source_ids == shards.sources.index(source)
            parts[f"{name}/{source}"] = shards.only(np.flatnonzero(chosen))
            shares[f"{name}/{source}"] = part.weight * share
            rest &= ~chosen
        if rest.any():
            parts[name] = shards.only(np.flatnonzero(rest))
            shares[name] = part.weight - sum(s for key, s in shares.items() if key.startswith(f"{name}/"))
    return parts, shares
