""" "Is my loss normal?": the curves that a recipe is known to follow, and a run's comparison with them.

`recipes/<name>/reference.json` holds, for each stage, the loss and the bits per byte of finished runs with several
seeds (`python -m bench.reference` makes it). It is used only by a run of the very same thing: settings, shape, data and
tokenizer, all but the seed and what changes no result.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

import oriole
from oriole.config import Config, flat, validate
from oriole.errors import ConfigError
from oriole.log import say
from oriole.model.config import ModelConfig
from oriole.model.seq2seqconfig import Seq2SeqConfig
from oriole.train.recipe import Part, Recipe, TrainTable

__all__ = ["SCHEMA", "SIGMAS", "Curve", "StageReference", "Watch", "find", "identity", "read_reference"]

SCHEMA = 1

SIGMAS = 3.0
"""A figure further away from the mean than so many spreads is worth a warning."""

INDIFFERENT = {
    "run", "data", "init", "skip_bad", "track", "reference", "model", "checkpoint", "tokenizer.path", "tokenizer.kind",
    "train.seed", "train.device", "train.dtype", "train.compile", "train.resume", "train.log_every", "eval.every",
    "eval.prompts", "eval.questions", "gate", "optional",
}  # fmt: skip
"""Keys of a recipe that change nothing about the curve, or are told by fingerprints instead."""

PREFERENCES = {"reward", "dpo", "distill", "rollout", "ppo", "grpo", "seq2seq", "eval.pairs", "eval.holdout_pairs"}
"""Keys that the stages before the preferences do not read."""

INDIFFERENT_PART = ("files", "val", "shards", "lang")


class Curve(Config):
    """A figure over the tokens: its mean over the seeds, and its spread (one standard deviation)."""

    tokens: tuple[float, ...]
    mean: tuple[float, ...]
    spread: tuple[float, ...]

    def at(self, tokens: float) -> tuple[float, float]:
        """(mean, spread) between the two nearest points, nan outside of them."""
        if not self.tokens or not self.tokens[0] <= tokens <= self.tokens[-1]:
            return math.nan, math.nan
        mean, spread = (float(np.interp(tokens, self.tokens, column)) for column in (self.mean, self.spread))
        return mean, spread

    def point(self, tokens: float) -> tuple[float, float]:
        """(mean, spread) of the point at so many tokens (to one in a hundred), nan when there is none."""
        for at, mean, spread in zip(self.tokens, self.mean, self.spread, strict=True):
            if abs(at - tokens) <= 0.01 * tokens:
                return mean, spread
        return math.nan, math.nan


class StageReference(Config):
    """What is known of one stage."""

    identity: dict[str, Any]
    """What a run must share with it, by key (`identity`)."""
    seeds: tuple[int, ...] = Field(min_length=1)
    device: str
    """Where the runs ran: processor or accelerator, and arithmetic."""
    commit: str
    """The commit of Oriole they ran with."""
    loss: Curve
    """The training loss as recorded, the mean over `log_every` steps."""
    bpb: dict[str, Curve]
    """Bits per byte of each part at the evaluations."""


def read_reference(path: Path) -> dict[str, StageReference]:
    """The stages in a reference.json; `ConfigError` when it is none of this schema."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        schema, stages = table["schema"], dict(table["stages"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no reference of a recipe; make one with python -m bench.reference") from error
    if schema != SCHEMA:
        raise ConfigError(f"{path} has schema {schema}, this Oriole reads {SCHEMA}; make it anew")
    return {name: validate(StageReference, stage, str(path)) for name, stage in stages.items()}


def identity(
    recipe: Recipe, shape: ModelConfig | Seq2SeqConfig, tokenizer: str, train: Mapping[str, str], val: Mapping[str, str]
) -> dict[str, Any]:
    """What decides the curve, by dotted key; `tokenizer`, `train` and `val` are fingerprints."""
    model = {"model": shape.model_dump(mode="json")}
    data = {"tokenizer": {"fingerprint": tokenizer}, "train_data": dict(train), "val_data": dict(val)}
    start = {"start": "random" if recipe.stage == "pretrain" and not recipe.init else recipe.init or "previous stage"}
    return _settings(recipe) | flat(model) | flat(data) | start


def _settings(recipe: Recipe) -> dict[str, Any]:
    without = INDIFFERENT | PREFERENCES if recipe.stage in ("pretrain", "sft") else INDIFFERENT
    settings = flat({k: v for k, v in recipe.model_dump(mode="json").items() if k not in without})
    own = {f"parts.{part}.{key}" for part in recipe.parts for key in INDIFFERENT_PART}
    return {key: value for key, value in settings.items() if key not in without and key not in own}


def find(recipe: Recipe, mine: Mapping[str, Any]) -> StageReference | None:
    """The reference of the run that `mine` identifies: in the file the recipe names, else beside a built-in recipe.

    A stage that starts from the one before it has one only when that one had.
    """
    if recipe.stage != "pretrain" and not recipe.init and not (recipe.run / "pretrain" / "reference.json").exists():
        return None
    built_in = (Path(oriole.__file__).parent / "recipes").glob("*/reference.json")
    for path in [recipe.reference] if recipe.reference else sorted(built_in):
        found = read_reference(path).get(recipe.stage)
        if found is not None and _fits(found.identity, mine, recipe):
            return found
    return None


def _fits(theirs: Mapping[str, Any], mine: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether all that the reference knows is equal, and what it does not know yet (newer keys) is at its default."""
    parts = {name: Part(files=["*"]) for name in recipe.parts}
    plain = Recipe(stage=recipe.stage, parts=parts, train=TrainTable(tokens=1), distill=recipe.distill)
    defaults = flat({"model": ModelConfig.defaults()}) | _settings(plain)
    return all(mine.get(key) == value for key, value in theirs.items()) and all(
        key in defaults and defaults[key] == value for key, value in mine.items() if key not in theirs
    )


class Watch:
    """Compares every evaluation with the reference and says so in one line; a sink of the run's metrics."""

    def __init__(self, reference: StageReference) -> None:
        self.reference = reference
        self._loss: tuple[float, float] | None = None  # (tokens, loss) of the last step record

    def write(self, record: Mapping[str, Any]) -> None:
        """A step is remembered, an evaluation compared."""
        match record.get("event"):
            case "step":
                self._loss = (record["tokens"], record["loss"])
            case "eval" if record["step"]:
                say(*self._compared(record))

    def close(self) -> None:
        """Nothing is open."""

    def _compared(self, record: Mapping[str, Any]) -> tuple[str, str]:
        """(what to say, its style)."""
        figures = []
        if self._loss is not None:
            figures.append(("loss", self._loss[1], self.reference.loss.at(self._loss[0])))
        for part, value in (record.get("bpb") or {}).items():
            if part in self.reference.bpb:
                figures.append((part, value, self.reference.bpb[part].point(record["tokens"])))
        known = [(name, value, at) for name, value, at in figures if math.isfinite(at[0])]
        if not known:
            return "nothing is known yet of what to expect after so many tokens", ""
        said = [f"{name} {value:.3f} (reference {at[0]:.3f} ± {at[1]:.3f})" for name, value, at in known]
        off = [not abs(value - mean) <= SIGMAS * spread for _, value, (mean, spread) in known]
        if not any(off):
            return f"as expected: {', '.join(said)}", "green"
        wrong = ", ".join(words for words, bad in zip(said, off, strict=True) if bad)
        if all(value < mean for (_, value, (mean, _)), bad in zip(known, off, strict=True) if bad):
            return f"better than expected: {wrong}", "green"
        return f"not as expected, more than {SIGMAS:.0f} standard deviations off: {wrong}", "yellow"
