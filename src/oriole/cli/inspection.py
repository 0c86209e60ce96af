"""`oriole data inspect`: what a folder of shards, a data file or a run holds, and what its batches really contain."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oriole.apps.inspect import SCHEMA, InspectConfig, Records, batch_preview, describe_shards
from oriole.errors import DataError
from oriole.text.census import table
from oriole.text.kinds import find_kind
from oriole.text.mixture import Mixture
from oriole.text.pack import chat_rows, load_tokenizer, text_rows
from oriole.text.paths import expand
from oriole.text.shards import Shards, View
from oriole.text.tokenizer import Tokenizer
from oriole.text.writer import Writer

if TYPE_CHECKING:
    from oriole.train.recipe import Recipe

__all__ = ["inspect"]

LENGTH, BATCH_SIZE, SEED = 512, 16, 1337
"""Of a batch, where neither the keys nor a run say them: the defaults of `train`."""
STAGES = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo", "distill", "seq2seq")


def inspect(path: Path, config: InspectConfig) -> dict[str, Any]:
    """The description of what lies at `path`: {"schema", "path", "what", "tokenizer", "parts", "batch"}."""
    if (path / "index.json").exists():
        return _of_shards(path, config)
    if any((path / stage / "recipe.toml").exists() for stage in STAGES):
        return _of_run(path, config)
    return _of_files(path, config)


def _made(
    path: Path, what: str, tok: Tokenizer | None, parts: list[dict[str, Any]], batch: dict[str, Any] | None
) -> dict[str, Any]:
    known = {"vocab_size": tok.vocab_size, "fingerprint": tok.fingerprint()} if tok else None
    return {"schema": SCHEMA, "path": str(path), "what": what, "tokenizer": known, "parts": parts, "batch": batch}


def _batch(
    parts: Mapping[str, View | Shards], weights: Mapping[str, float], tok: Tokenizer, config: InspectConfig, title: str
) -> dict[str, Any] | None:
    """The first batches that training on these parts would see."""
    if not config.rows:
        return None
    from oriole.train.batch import Packer

    length = config.length or LENGTH
    stream = Mixture(parts, weights, SEED if config.seed is None else config.seed, length=length)
    packer = Packer(stream, config.batch_size or BATCH_SIZE, length)
    return {"title": title, **batch_preview(packer, tok, config.rows)}


# --- shards ----------------------------------------------------------------------------------------------------------


def _of_shards(path: Path, config: InspectConfig) -> dict[str, Any]:
    shards = Shards.open(path)
    tok = _tokenizer_of(path, config)
    part = {"name": "", **describe_shards(shards, tok, config.length or LENGTH, config.samples)}
    batch = _batch({"": shards}, {"": 1}, tok, config, "A batch of it, each document as often as the others")
    return _made(path, "shards", tok, [part], batch)


def _tokenizer_of(path: Path, config: InspectConfig) -> Tokenizer:
    """The tokenizer that was named, or the one that lies in or above a folder of shards."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    path = path.absolute()
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "tokenizer" / "tokenizer.json").exists():
            return load_tokenizer(folder)
    raise DataError(f"no tokenizer in or above {path}; name the one that made the shards: tokenizer=DIR")


# --- runs ------------------------------------------------------------------------------------------------------------


def _of_run(run: Path, config: InspectConfig) -> dict[str, Any]:
    from oriole.config import read_toml, validate
    from oriole.train.prepare import data_root, part_of, weighted
    from oriole.train.recipe import Recipe

    stages = [stage for stage in STAGES if (run / stage / "recipe.toml").exists()]
    stage = config.stage or stages[-1]
    if stage not in stages:
        raise DataError(f"{run} has no stage '{stage}'; it has {', '.join(stages)}")
    recipe = validate(Recipe, read_toml(run / stage / "recipe.toml"), str(run / stage / "recipe.toml"))
    config = config.model_copy(
        update={
            "length": config.length or recipe.train.length,
            "batch_size": config.batch_size or recipe.train.batch_size,
            "seed": recipe.train.seed if config.seed is None else config.seed,
        }
    )
    own = run if (run / "tokenizer").exists() else run / stage / "model"  # of a parent that lies elsewhere
    tok = load_tokenizer(config.tokenizer or own)
    what = f"run, stage {stage}"
    if recipe.stage in ("ppo", "grpo"):  # they have prompts and make the rest themselves
        files = {name: expand(part.files, data_root(recipe)) for name, part in recipe.trained.items()}
        return _made(run, what, tok, [{"name": name, **_prompts(paths, config)} for name, paths in files.items()], None)
    prefix = "pairs" if recipe.stage in ("reward", "dpo") else stage
    shards = {
        name: Shards.open(part.shards) if part.shards else _newest(run, prefix, name)
        for name, part in recipe.trained.items()
    }
    weights = {name: part.weight for name, part in recipe.trained.items()}
    total = sum(weights.values())
    parts = []
    for name, part in recipe.trained.items():
        made = describe_shards(shards[name], tok, config.length or LENGTH, config.samples)
        if part.lang:  # a part of a packed folder: of what was counted its rows remain
            made = {
                **table(row for row in made["sources"] if row["lang"] == part.lang),
                "kind": "shards",
                "samples": [],
            }
        parts.append({"name": name, "share": weights[name] / total, **made})
    title = f"The first batch of {stage}"
    if prefix == "pairs":
        return _made(run, what, tok, parts, _batch_of_pairs(recipe, shards, tok, config, title))
    used = {name: part_of(part, shards[name]) for name, part in recipe.parts.items()}
    return _made(run, what, tok, parts, _batch(*weighted(recipe, used), tok, config, title))


def _prompts(paths: list[Path], config: InspectConfig) -> dict[str, Any]:
    records = Records("prompt", config.samples, config.limit)
    for _ in records.read(paths):
        pass
    return records.describe()


def _batch_of_pairs(
    recipe: "Recipe", shards: Mapping[str, Shards], tok: Tokenizer, config: InspectConfig, title: str
) -> dict[str, Any] | None:
    """As `_batch`: both sides of a pair, the better one first, stand in one row."""
    if not config.rows:
        return None
    from oriole.train.pairs import PairPacker, mixed

    assert config.seed is not None and config.batch_size is not None and config.length is not None
    pairs, shares = mixed(recipe, shards, whole=recipe.stage == "reward")
    packer = PairPacker(pairs, shares, config.seed, config.batch_size, config.length)
    return {"title": title, **batch_preview(packer, tok, config.rows)}


def _newest(run: Path, stage: str, part: str) -> Shards:
    found = [p for p in (run / "shards").glob(f"{stage}-{part}-train-*") if (p / "index.json").exists()]
    if not found:
        raise DataError(f"{run / 'shards'} holds no shards of {stage}'s part '{part}'; train the stage first")
    return Shards.open(max(found, key=lambda p: p.stat().st_mtime_ns))


# --- files -----------------------------------------------------------------------------------------------------------


def _of_files(path: Path, config: InspectConfig) -> dict[str, Any]:
    """Files of any format, each kind of record by itself; with a tokenizer as they would be after packing."""
    tok = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    kinds: dict[Any, list[Path]] = {}
    unread: list[str] = []
    for file in expand(path):
        try:
            kinds.setdefault(find_kind(file) if config.kind == "auto" else config.kind, []).append(file)
        except DataError as error:
            unread.append(str(error))
    if not kinds:
        raise DataError(unread[0])
    parts: list[dict[str, Any]] = []
    batch = None
    for kind, files in kinds.items():
        records = Records(kind, config.samples, config.limit)
        name = kind if len(kinds) > 1 else ""
        if tok is None or kind not in ("text", "chat"):
            for _ in records.read(files):
                pass
            parts.append({"name": name, **records.describe()})
            continue
        with tempfile.TemporaryDirectory(prefix="oriole-inspect-") as folder:
            shards = _packed(records, files, tok, Path(folder))
            counted = describe_shards(shards, tok, config.length or LENGTH, 0) if shards else {}
            parts.append({"name": name, **records.describe(), **{k: counted[k] for k in counted if k in _COUNTED}})
            if shards and batch is None:
                batch = _batch({"": shards}, {"": 1}, tok, config, f"A batch of it{f' ({kind})' if name else ''}")
            del shards  # before its files go
    return {**_made(path, "files", tok, parts, batch), "unread": unread}


_COUNTED = ("total", "sources", "lengths", "truncation")
"""What the shards of a file say better than its records: with tokens, and as cleaned for packing."""


def _packed(records: Records, files: list[Path], tok: Tokenizer, folder: Path) -> Shards | None:
    """The shards that packing the files would give; None when no record could be read."""
    writer = Writer(folder, tok, langs=True)
    rows = text_rows if records.kind == "text" else chat_rows
    for _, ids, mask, source, lang in rows(records.read(files), tok):
        writer.add(ids, mask, source, lang)
    try:
        if writer.docs:
            writer.finish()
    finally:
        writer.close()
    return Shards.open(folder) if writer.docs else None
