"""What a stage has to do: tokens, steps, evaluations, checkpoints; the recipe that a bare preset means. No torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from oriole.config import Config, apply_overrides, parse_overrides, validate
from oriole.model.config import ModelConfig, preset
from oriole.train.accelerators import Cluster
from oriole.train.costs import Load, Strategy, device_memory
from oriole.train.recipe import PREFERRING, Recipe

__all__ = [
    "Tokens",
    "expected_tokens",
    "measured_parts",
    "preparing_seconds",
    "preset_recipe",
    "schedule_counts",
    "steps_of",
    "trained_share",
]


class Tokens(Config):
    """How many tokens a stage trains on, and how that is known."""

    count: float = Field(gt=0)
    """Positions of packed batches in all."""
    source: str
    """In words."""
    known: bool = True
    """False: an assumption, because the data is not here."""


class Counts(Config):
    """How often a stage evaluates and saves."""

    evaluations: int
    """The first and the last included."""
    checkpoints: int
    """The last included."""


def schedule_counts(recipe: Recipe, steps: int) -> Counts:
    """Evaluations and checkpoints of a stage, by the keys that the loop reads."""
    every = recipe.eval.every or max(1, math.ceil(steps / 5))
    save = recipe.checkpoint.every or max(1, math.ceil(steps / 10))
    return Counts(evaluations=len({0, steps, *range(0, steps, every)}), checkpoints=math.ceil(steps / save))


def trained_share(recipe: Recipe, shape: ModelConfig) -> float:
    """Share of the weights that train, those of [deep] among them; all without LoRA."""
    if recipe.lora is None:
        return 1.0
    beside = 0 if recipe.deep is None else recipe.deep.num_params(shape)
    return (recipe.lora.num_params(shape) + beside) / (shape.num_params() + beside)


def measured_parts(recipe: Recipe) -> int:
    """Parts of the mixture that are evaluated; a replay is not."""
    if recipe.stage in PREFERRING:
        return len(recipe.parts)
    return sum(part.format is None or recipe.stage == "distill" for part in recipe.parts.values())


def steps_of(recipe: Recipe, tokens: float) -> int:
    """Optimizer steps for so many tokens."""
    table = recipe.train
    return max(1, math.ceil(tokens / (table.batch_size * table.length * table.accumulate)))


# --- tokens ----------------------------------------------------------------------------------------------------------

BYTES_PER_TOKEN = 4.0
"""UTF-8 bytes of a token, both languages together, with vocabularies of 6,400 to 32,768 (docs/results.md)."""
PACKED = {".gz": 3.0, ".bz2": 3.8, ".xz": 4.0, ".zst": 3.3}
"""Bytes of text in a byte of a compressed file."""
OVERHEAD = 1.08
"""Bytes of a JSON line over its text's."""
ASSUMED = 100e6


def expected_tokens(recipe: Recipe, shards: Mapping[str, int], files: Mapping[str, list[Path]]) -> Tokens:
    """Training tokens of a stage: as the recipe says, or epochs over tokens that are counted or reckoned.

    `shards` gives the tokens of the parts that are packed already, `files` the others' files as far as they are here.
    """
    table = recipe.train
    if table.tokens is not None:
        return Tokens(count=table.tokens, source="train.tokens")
    epochs = table.epochs or 1.0
    missing = [name for name in recipe.trained if name not in shards and not files.get(name)]
    if missing:
        return Tokens(
            count=ASSUMED,
            source=f"the data of {', '.join(missing)} is not here, so 100M tokens are assumed; "
            "give data=FOLDER or train.tokens=N",
            known=False,
        )
    reckoned = sum(_bytes(path) for name in recipe.trained if name not in shards for path in files[name])
    count = sum(shards.values()) + reckoned / OVERHEAD / BYTES_PER_TOKEN
    how = "reckoned from the files' sizes" if reckoned else "counted"
    return Tokens(count=epochs * count, source=f"{epochs:g} epochs of {count:,.0f} tokens, {how}")


def _bytes(path: Path) -> float:
    return path.stat().st_size * PACKED.get(path.suffix, 1.0)


# --- before training -------------------------------------------------------------------------------------------------

TOKENIZED, LEARNT = 1.1e6, 2.2e6
"""Tokens that one core reads, encodes and writes in a second, and bytes of sample from which a tokenizer is learnt in
a second (docs/results.md)."""


def preparing_seconds(recipe: Recipe, tokens: Tokens, cores: float) -> float:
    """About how long a stage takes to make its tokenizer and shards; 0 for what is packed or made already."""
    if all(part.shards is not None for part in recipe.parts.values()):
        return 0.0
    made = any((recipe.run / "shards").glob(f"{recipe.stage}-*-train-*"))
    epochs = recipe.train.epochs or 1.0
    seconds = 0.0 if made else tokens.count / epochs / (TOKENIZED * cores)
    has_tokenizer = recipe.tokenizer.path is not None or (recipe.run / "tokenizer" / "tokenizer.json").exists()
    if recipe.stage == "pretrain" and not has_tokenizer:
        seconds += min(1e6 * recipe.tokenizer.sample_mb, tokens.count / epochs * BYTES_PER_TOKEN) / LEARNT
    return seconds


# --- a preset alone --------------------------------------------------------------------------------------------------

TOKENS_PER_PARAMETER = 20
"""Compute-optimal training (Hoffmann et al. 2022, table A3)."""
STEP_TOKENS = {True: 2**19, False: 2**17}
"""Tokens of a step for models from 100M parameters on, and below."""
ROWS = (64, 32, 16, 8, 4, 2, 1)
"""Sizes of micro-batches that are tried, largest first."""


def preset_recipe(name: str, settings: Sequence[str], cluster: Cluster | None) -> Recipe:
    """The recipe that `oriole plan 1b` means: pretraining on 20 tokens a parameter, in micro-batches that fit, with
    recomputed activations where not even one row does.

    `settings` (key=value) change it like any recipe. Without a cluster the micro-batch has 8 rows.
    """
    shape = preset(name)
    length = min(2048, shape.context)
    large = shape.num_params() >= 100e6
    rows, gpus, recompute = 8, 1, False
    if cluster is not None:
        gpus = cluster.gpus
        limit = 0.85 * cluster.gpu.memory * 1e9
        strategy: Strategy = "fsdp" if gpus > 1 and shape.num_params() * 16 > 0.5 * limit else "one"
        loads = (Load(shape, r, length, 1, "muon", recompute=again) for again in (False, True) for r in ROWS)
        load = next((one for one in loads if _peak(one, cluster, strategy) <= limit), None)
        rows, recompute = (1, True) if load is None else (load.rows, load.recompute)
    accumulate = gpus * max(1, STEP_TOKENS[large] // (rows * length * gpus))
    table: dict[str, Any] = {
        "stage": "pretrain",
        "run": f"runs/{name}",
        "data": "data",
        "model": name,
        "parts": {"text": {"files": ["*.jsonl*"]}},
        "tokenizer": {"vocab_size": shape.vocab_size},
        "train": {
            "tokens": float(TOKENS_PER_PARAMETER * shape.num_params()),
            "length": length,
            "batch_size": rows,
            "accumulate": accumulate,
            "optimizer": "muon",
            "recompute": recompute,
        },
    }
    overrides = parse_overrides(settings)
    if "train.epochs" in overrides:
        table["train"].pop("tokens")
    apply_overrides(table, overrides)
    return validate(Recipe, table, name)


def _peak(load: Load, cluster: Cluster, strategy: Strategy) -> int:
    return sum(device_memory(load, cluster, strategy).values())
